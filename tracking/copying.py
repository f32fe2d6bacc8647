"""Copying a task's runs from one result database to another; a copy may be interrupted and repeated.

Runs are the same if they have the same fingerprint and start; for parents the fingerprint suffices. While a run is
copied, this process owns it, as in training. Status and end of a copy are written last, after the copy has been
compared with its source, so that a run with an end is complete.
"""

import contextlib
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking import owners
from tracking.artifacts import Artifacts, file_digests
from tracking.keys import AGAIN, PARENT
from tracking.outages import SHORT, persist
from tracking.store import Store, all_pages

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric
    from mlflow.entities import Run as MlflowRun

METRICS_A_CALL, OTHERS_A_CALL = 1000, 100  # MLflow's limits
NOT_COPIED = "figures_of"  # has the run ids of the source; without it, the task's next command draws the figures anew


@dataclasses.dataclass
class Report:
    """Numbers of runs of a task, parents included, and the result of the verification."""

    copied: int = 0
    there: int = 0  # before
    running: int = 0  # at the source, so not copied
    elsewhere: int = 0  # being written at the destination by another process, so not copied
    verified: Counter[str] = dataclasses.field(default_factory=Counter)  # compared with the source, by kind
    differences: list[str] = dataclasses.field(default_factory=list)  # a sentence for each run and kind
    # names of the parents at the destination that had other splits, so that their summary is outdated
    outdated: list[str] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """Describe the report in one line."""
        others = f", {self.elsewhere:,} left to another process" if self.elsewhere else ""
        verified = ", ".join(f"{count:,} {kind}" for kind, count in self.verified.items()) or "nothing"
        runs = f"{self.copied:,} copied, {self.there:,} already there, {self.running:,} left out (still running)"
        return f"{runs}{others}; verified: {verified}"


def copy_task(
    source: Store, destination: Store, task: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Copy the finished runs of a task and the parents of those splits; existing copies are skipped.

    The source, which must have the task's experiment, is only read. `progress` is called with the numbers of runs that
    are done and of all runs. After an error of one of the stores, or an interrupt, a second call goes on.
    """
    experiment = source.experiment_id(task)
    assert experiment is not None
    read = _Side(source, experiment)
    made = persist(lambda: destination.make_experiment(task, read.name))
    copy = _Copy(read, _Side(destination, made), persist(read.runs))
    try:
        for done in copy.steps():
            progress(done, copy.total)
    except BaseException:
        with contextlib.suppress(Exception):  # the store itself may have failed
            for run_id in list(copy.begun):
                copy.give_up(run_id, "it was not copied completely")
        raise
    return copy.report


class _Side:
    """The task's experiment in one of the two databases."""

    def __init__(self, store: Store, experiment_id: str) -> None:
        self.store = store
        self.client = store.client
        self.experiment = experiment_id
        experiment = persist(lambda: self.client.get_experiment(experiment_id))
        self.name: str = experiment.name
        self.tags: dict[str, str] = experiment.tags  # description and views, among others
        self.artifacts = Artifacts(store, experiment)

    def runs(self, query: str = "") -> "list[MlflowRun]":
        """All runs that are not deleted."""
        search = self.client.search_runs
        return list(all_pages(lambda token: search([self.experiment], query, max_results=1000, page_token=token)))

    def alike(self, run: "MlflowRun") -> "list[MlflowRun]":
        """Runs with the fingerprint of a run, or with its start if it was made by hand and has none."""
        fingerprint = run.data.tags.get("fingerprint")
        query = f"tags.fingerprint = '{fingerprint}'" if fingerprint else f"start_time = {run.info.start_time}"
        return [other for other in self.runs(query) if other.data.tags.get("fingerprint") == fingerprint]

    def points(self, run: "MlflowRun") -> "dict[str, list[Metric]]":
        """All points of each metric."""
        read = self.client.get_metric_history
        return {key: persist(functools.partial(read, run.info.run_id, key)) for key in run.data.metrics}


class _Copy:
    """The work on one task."""

    def __init__(self, source: _Side, destination: _Side, runs: "list[MlflowRun]") -> None:
        self.source = source
        self.destination = destination
        self.client = destination.client
        self.signs = functools.partial(owners.signs_of_life, destination.store.command)
        self.report = Report()
        self.runs = {run.info.run_id: run for run in runs}  # of the source
        self.begun: set[str] = set()  # incomplete copies of this process
        self.ids: dict[str, str] = {}  # id at the destination, by id at the source
        self.known = {_identity(run) for run in runs}
        self.grown: set[str] = set()  # parents at the destination with new splits
        self.children = [run for run in runs if PARENT in run.data.tags and run.info.status != "RUNNING"]
        needed = {run.data.tags[PARENT] for run in self.children}
        parents = [run for run in runs if PARENT not in run.data.tags]
        self.parents = [run for run in parents if run.info.status != "RUNNING" or run.info.run_id in needed]
        self.report.running = len(runs) - len(self.children) - len(self.parents)
        self.total = len(self.parents) + len(self.children)

    def steps(self) -> Iterable[int]:
        """Copy, and yield the number of runs after each."""
        from mlflow.exceptions import MlflowException

        for key in self.source.tags.keys() - self.destination.tags.keys():
            tag = self.destination.experiment, key, self.source.tags[key]
            with contextlib.suppress(MlflowException):  # a server may permit to write runs only
                persist(functools.partial(self.client.set_experiment_tag, *tag), SHORT)
        for run in self.parents:
            self.ids[run.info.run_id] = persist(functools.partial(self._find_or_make_parent, run))
        # newer runs first, so that the id of the run that superseded another is known
        for done, run in enumerate(sorted(self.children, key=self._times_superseded), 1):
            self._copy_child(run)
            yield done
        for done, run in enumerate(self.parents, 1 + len(self.children)):  # after the runs that they summarise
            self._copy_parent(run)
            yield done

    def give_up(self, run_id: str, reason: str) -> None:
        """End an incomplete copy, which another attempt completes."""
        self.client.set_tag(run_id, "failure", reason)
        self.client.set_terminated(run_id, "KILLED")
        self.begun.discard(run_id)

    def _times_superseded(self, run: "MlflowRun") -> int:
        """Count the runs that superseded a run one after the other."""
        times, mark = 0, run.data.tags.get("superseded_by")
        while mark in self.runs and times < len(self.runs):
            times, mark = times + 1, self.runs[mark].data.tags.get("superseded_by")
        return times

    def _find_or_make_parent(self, run: "MlflowRun") -> str:
        with self.destination.store.lock():
            for other in self.destination.alike(run):
                if PARENT not in other.data.tags:
                    return str(other.info.run_id)
            return self._make(run)

    def _copy_child(self, run: "MlflowRun") -> None:
        found, state = persist(lambda: self._find_or_make(run))
        self.ids[run.info.run_id] = found
        if state == "ours":
            self.grown.add(self.ids.get(run.data.tags[PARENT], ""))
            self._fill(run, found)
        elif state == "elsewhere":
            self.report.elsewhere += 1
        else:
            self.report.there += 1
            persist(lambda: self._supersede(run, found))

    def _find_or_make(self, run: "MlflowRun") -> tuple[str, str]:
        """Return the id of a split's copy, and whether it is `there`, written `elsewhere`, or `ours` to fill."""
        with self.destination.store.lock():
            found = self.destination.alike(run)
            for other in found:
                if _identity(other) == _identity(run):
                    if self._is_others(other):
                        return other.info.run_id, "elsewhere"
                    if other.info.status == "FINISHED" or _have_same_end(other, run):
                        return other.info.run_id, "there"
                    self._take(other.info.run_id)
                    return other.info.run_id, "ours"
            for other in found:  # trained at the destination as well
                counts = other.info.status == "FINISHED" and other.data.tags.get("superseded_by") in (None, AGAIN)
                if counts and _identity(other) not in self.known:
                    return other.info.run_id, "there"
            return self._make(run), "ours"

    def _copy_parent(self, run: "MlflowRun") -> None:
        copy_id = self.ids[run.info.run_id]
        below = persist(lambda: self.destination.runs(f"tags.`{PARENT}` = '{copy_id}'"))
        copy = persist(lambda: self.client.get_run(copy_id))
        own = {_identity(child) for child in self.runs.values() if child.data.tags.get(PARENT) == run.info.run_id}
        if copy_id in self.begun:
            self._fill(run, copy_id)
        elif any(_identity(child) not in own for child in below):
            self.report.there += 1  # the source's summary does not cover all these splits
            if copy_id in self.grown:
                self.report.outdated.append(copy.info.run_name)
        elif self._is_others(copy):
            self.report.elsewhere += 1
        elif _have_same_end(copy, run) or copy.info.status == "FINISHED" != run.info.status:
            self.report.there += 1
        else:
            persist(lambda: self._take(copy_id))
            self._fill(run, copy_id)

    def _is_others(self, run: "MlflowRun") -> bool:
        return run.info.status == "RUNNING" and owners.is_others(run.data.tags, self.destination.store.command)

    def _make(self, run: "MlflowRun") -> str:
        tags = {**self._tags(run), **self.signs()}
        made = self.client.create_run(self.destination.experiment, run.info.start_time, tags, run.info.run_name)
        self.begun.add(made.info.run_id)
        return str(made.info.run_id)

    def _take(self, run_id: str) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(*tag) for tag in self.signs().items()])
        self.client.update_run(run_id, status="RUNNING")
        self.begun.add(run_id)

    def _tags(self, run: "MlflowRun") -> dict[str, str]:
        """Translate a run's tags to the destination; ids of deleted runs are kept."""
        tags = {key: value for key, value in run.data.tags.items() if key != NOT_COPIED}
        mapped = {key: self.ids.get(tags[key], tags[key]) for key in (PARENT, "superseded_by") if key in tags}
        return tags | mapped

    def _supersede(self, run: "MlflowRun", copy_id: str) -> None:
        """Mark a copy as superseded if its source was superseded later."""
        newer = self.runs.get(run.data.tags.get("superseded_by", ""))
        if newer is not None and self.ids.get(newer.info.run_id, copy_id) != copy_id:
            newer_id = self.ids[newer.info.run_id]
            marks = [self.client.get_run(run_id).data.tags.get("superseded_by") for run_id in (copy_id, newer_id)]
            if marks == [None, self._tags(newer).get("superseded_by")]:  # else the destination decided otherwise
                self.client.set_tag(copy_id, "superseded_by", newer_id)

    def _fill(self, run: "MlflowRun", copy_id: str) -> None:
        """Write a run, compare it with its source, and end it. Repeating this changes nothing."""
        with owners.heartbeat(self.destination.store, copy_id), self.destination.store.scratch() as scratch:
            points, files = self.source.points(run), self.source.artifacts.fetch(run, Path(scratch) / "from")
            tags = {key: value for key, value in self._tags(run).items() if key not in self.signs()}
            self._write(run, persist(lambda: self.client.get_run(copy_id)), points, tags, files)
            copy = persist(lambda: self.client.get_run(copy_id))
            arrived = self.destination.artifacts.fetch(copy, Path(scratch) / "to")
            pairs: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
                "params": (run.data.params, copy.data.params),
                "tags": (tags, copy.data.tags),
                "metric points": (_comparable(points), _comparable(self.destination.points(copy))),
                "data sets": (dict.fromkeys(_datasets(run), True), dict.fromkeys(_datasets(copy), True)),
                "files": (file_digests(files) | _noted(run), file_digests(arrived)),
            }
        differences = []
        for kind, (expected, found) in pairs.items():
            self.report.verified[kind] += sum(len(v) if isinstance(v, list) else 1 for v in expected.values())
            if wrong := sorted(key for key, value in expected.items() if found.get(key) != value):
                title = f"{run.info.run_name} ({run.info.run_id})"
                differences.append(f"{title}: {kind} differ from the source: {', '.join(wrong)}")
        self.report.differences += differences
        if differences:
            persist(lambda: self.give_up(copy_id, "its copy differs from the source"))
        else:
            persist(lambda: self._end(run, copy_id))
            self.begun.discard(copy_id)
            self.report.copied += 1

    def _write(
        self, run: "MlflowRun", copy: "MlflowRun", points: "dict[str, list[Metric]]", tags: dict[str, str], files: Path
    ) -> None:
        from mlflow.entities import Param, RunTag

        log = functools.partial(self.client.log_batch, copy.info.run_id)
        for metrics in _parts([point for of_key in points.values() for point in of_key], METRICS_A_CALL):
            persist(functools.partial(log, metrics=metrics))
        lacking = [Param(key, value) for key, value in run.data.params.items() if key not in copy.data.params]
        for params in _parts(lacking, OTHERS_A_CALL):  # MLflow refuses to change a param
            persist(functools.partial(log, params=params))
        for part in _parts([RunTag(*tag) for tag in tags.items()], OTHERS_A_CALL):
            persist(functools.partial(log, tags=part))
        if datasets := list(_datasets(run).values()):
            persist(lambda: self.client.log_inputs(copy.info.run_id, datasets))
        if any(files.rglob("*")):
            persist(lambda: self.destination.artifacts.upload(copy, files))

    def _end(self, run: "MlflowRun", copy_id: str) -> None:
        """Give a copy exactly the tags of its source, and its end unless that is running."""
        from mlflow.entities import RunTag

        tags = self._tags(run)
        self.client.log_batch(copy_id, tags=[RunTag(key, tags[key]) for key in self.signs() if key in tags])
        for key in self.client.get_run(copy_id).data.tags.keys() - tags.keys():
            self.client.delete_tag(copy_id, key)
        if run.info.status != "RUNNING":
            self.client.set_terminated(copy_id, run.info.status, run.info.end_time)


def _identity(run: "MlflowRun") -> tuple[str | None, int]:
    return run.data.tags.get("fingerprint"), run.info.start_time


def _have_same_end(one: "MlflowRun", other: "MlflowRun") -> bool:
    ends = [run.info.status == "RUNNING" or (run.info.status, run.info.end_time) for run in (one, other)]
    return ends[0] == ends[1]


def _parts(entities: list[Any], size: int) -> Iterable[list[Any]]:
    return (entities[start : start + size] for start in range(0, len(entities), size))


def _comparable(points: "Mapping[str, list[Metric]]") -> dict[str, list[tuple[int, int, str]]]:
    """Points with their values as text, since NaN does not equal itself."""
    return {key: sorted((p.step, p.timestamp, repr(p.value)) for p in of_key) for key, of_key in points.items()}


def _datasets(run: "MlflowRun") -> "dict[str, DatasetInput]":
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {f"{entry.dataset.name} {entry.dataset.digest}": entry for entry in inputs}


def _noted(run: "MlflowRun") -> dict[str, str]:
    """Digests of a split's files when they were written, which expose files lost or damaged since then."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return dict(json.loads(run.data.tags["file_digests"]))
    return {}

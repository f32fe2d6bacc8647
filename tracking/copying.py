"""Copying a task's runs from one result database to another, which may be interrupted and repeated.

A run there is the same run where it has the same fingerprint and start; of a parent the fingerprint is enough. What is
being copied belongs to this process, as if it trained it. A run's status and end are written last, once the copy has
been compared with its source, so that a run which has them is complete.
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
from tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric
    from mlflow.entities import Run as MlflowRun

METRICS_A_CALL, OTHERS_A_CALL = 1000, 100  # the most that MLflow takes
# A digest of the ids that runs have at the source. Left out, it says what is true at the destination: no figures have
# been drawn of its runs yet; the next command of the task draws them. Those of the source are there until then.
NOT_COPIED = "figures_of"


@dataclasses.dataclass
class Report:
    """What became of a task's runs, parents among them.

    Attributes
    ----------
    copied, there : int
        Runs that were copied, and those that were there already.
    running : int
        Left out, since they are still running at the source.
    elsewhere : int
        Left out, since another process is at work on them at the destination.
    verified : collections.Counter
        What was compared with the source after it had been written, and how much of it.
    differences : list of str
        One sentence for each kind of thing in a run that did not arrive as it is at the source.
    outdated : list of str
        Parents at the destination that had splits of their own: with those that came, their summary is another one.
    """

    copied: int = 0
    there: int = 0
    running: int = 0
    elsewhere: int = 0
    verified: Counter[str] = dataclasses.field(default_factory=Counter)
    differences: list[str] = dataclasses.field(default_factory=list)
    outdated: list[str] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """Say it in one line."""
        parts = [
            f"{self.copied:,} copied",
            f"{self.there:,} already there",
            f"{self.running:,} left out (still running)",
        ]
        if self.elsewhere:
            parts.append(f"{self.elsewhere:,} left to another process")
        verified = ", ".join(f"{count:,} {what}" for what, count in self.verified.items())
        return ", ".join(parts) + f"; verified: {verified or 'nothing'}"


def copy_task(
    source: Store, destination: Store, task: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Copy a task's runs that have ended, and the parents of those splits; what is there already is not touched.

    Parameters
    ----------
    source, destination : Store
        The source is only read.
    task : str
        The source has its experiment.
    progress : callable
        Is told how many runs have been looked at, and of how many.

    Returns
    -------
    Report

    Raises
    ------
    StoreError, OSError, mlflow.exceptions.MlflowException
        One of the two cannot be used (any more). As after an interrupt, a second call goes on.
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
        with contextlib.suppress(Exception):  # the store itself may be what failed
            for run_id in list(copy.begun):
                copy.give_up(run_id, "it has not been copied completely")
        raise
    return copy.report


class _Side:
    """A task's experiment in one of the two databases."""

    def __init__(self, store: Store, experiment_id: str) -> None:
        self.store = store
        self.client = store.client
        self.experiment = experiment_id
        experiment = persist(lambda: self.client.get_experiment(experiment_id))
        self.name: str = experiment.name
        self.tags: dict[str, str] = experiment.tags  # of the experiment: its description and views, and others
        self.artifacts = Artifacts(store, experiment)

    def runs(self, query: str = "") -> "list[MlflowRun]":
        """All that are not deleted."""
        found: list[MlflowRun] = []
        token = None
        while token != "":
            page = self.client.search_runs([self.experiment], query, max_results=1000, page_token=token)
            found += page
            token = page.token or ""
        return found

    def alike(self, run: "MlflowRun") -> "list[MlflowRun]":
        """Those with the fingerprint of a run; where that has none, as one made by hand, those of the same start."""
        fingerprint = run.data.tags.get("fingerprint")
        query = f"tags.fingerprint = '{fingerprint}'" if fingerprint else f"start_time = {run.info.start_time}"
        return [other for other in self.runs(query) if other.data.tags.get("fingerprint") == fingerprint]

    def points(self, run: "MlflowRun") -> "dict[str, list[Metric]]":
        """All that was logged, by metric."""
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
        self.begun: set[str] = set()  # at the destination, by this process, and without an end
        self.ids: dict[str, str] = {}  # what stands at the destination for a run of the source
        self.known = {_identity(run) for run in runs}
        self.grown: set[str] = set()  # parents at the destination that got a split
        self.children = [run for run in runs if PARENT in run.data.tags and run.info.status != "RUNNING"]
        needed = {run.data.tags[PARENT] for run in self.children}
        self.parents = [
            run
            for run in runs
            if PARENT not in run.data.tags and (run.info.status != "RUNNING" or run.info.run_id in needed)
        ]
        self.report.running = len(runs) - len(self.children) - len(self.parents)
        self.total = len(self.parents) + len(self.children)

    def steps(self) -> Iterable[int]:
        """Copy, and yield after each run how many there have been."""
        from mlflow.exceptions import MlflowException

        for key in self.source.tags.keys() - self.destination.tags.keys():
            tag = self.destination.experiment, key, self.source.tags[key]
            with contextlib.suppress(MlflowException):  # a server may let us write runs only; the UI explains less then
                persist(functools.partial(self.client.set_experiment_tag, *tag), SHORT)
        for run in self.parents:
            self.ids[run.info.run_id] = persist(functools.partial(self._find_or_make_parent, run))
        # what superseded a run comes before it, so that its id is known
        for done, run in enumerate(sorted(self.children, key=self._times_superseded), 1):
            self._copy_child(run)
            yield done
        for done, run in enumerate(self.parents, 1 + len(self.children)):  # once what they summarise is there
            self._copy_parent(run)
            yield done

    def give_up(self, run_id: str, reason: str) -> None:
        """End what is incomplete as such; it is completed by another attempt."""
        self.client.set_tag(run_id, "failure", reason)
        self.client.set_terminated(run_id, "KILLED")
        self.begun.discard(run_id)

    def _times_superseded(self, run: "MlflowRun") -> int:
        """How often a split was done again after this run, as the marks say."""
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
        """Return the run that stands for a split's, and whether it is `there`, `elsewhere`, or `ours` to be filled."""
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
            for other in found:  # the split was done there, too
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
            self.report.there += 1  # the source's summary is not one of these splits
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
        """A run's tags as they are at the destination."""
        tags = {key: value for key, value in run.data.tags.items() if key != NOT_COPIED}
        # one that was deleted is named as it was: nothing has that id at either place
        mapped = {key: self.ids.get(tags[key], tags[key]) for key in (PARENT, "superseded_by") if key in tags}
        return tags | mapped

    def _supersede(self, run: "MlflowRun", copy_id: str) -> None:
        """Let a run be superseded that was superseded at the source after it had been copied."""
        newer = self.runs.get(run.data.tags.get("superseded_by", ""))
        if newer is not None and self.ids.get(newer.info.run_id, copy_id) != copy_id:
            newer_id = self.ids[newer.info.run_id]
            marks = [self.client.get_run(run_id).data.tags.get("superseded_by") for run_id in (copy_id, newer_id)]
            if marks == [None, self._tags(newer).get("superseded_by")]:  # else something else was decided there
                self.client.set_tag(copy_id, "superseded_by", newer_id)

    def _fill(self, run: "MlflowRun", copy_id: str) -> None:
        """Write all of a run, compare, and give it its end; a second time changes nothing."""
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
        differs = False
        for what, (expected, found) in pairs.items():
            counts = (len(value) if isinstance(value, list) else 1 for value in expected.values())
            self.report.verified[what] += sum(counts)
            if wrong := sorted(key for key, value in expected.items() if found.get(key) != value):
                title = f"{run.info.run_name} ({run.info.run_id})"
                self.report.differences.append(f"{title}: {what} are not those of the source: {', '.join(wrong)}")
                differs = True
        if differs:
            persist(lambda: self.give_up(copy_id, "its copy differs from the source"))
        else:
            persist(lambda: self._end(run, copy_id))
            self.begun.discard(copy_id)
            self.report.copied += 1

    def _write(
        self,
        run: "MlflowRun",
        copy: "MlflowRun",
        points: "Mapping[str, list[Metric]]",
        tags: Mapping[str, str],
        files: Path,
    ) -> None:
        from mlflow.entities import Param, RunTag

        log = functools.partial(self.client.log_batch, copy.info.run_id)
        for metrics in _parts([point for of_key in points.values() for point in of_key], METRICS_A_CALL):
            persist(functools.partial(log, metrics=metrics))
        lacking = [Param(key, value) for key, value in run.data.params.items() if key not in copy.data.params]
        for params in _parts(lacking, OTHERS_A_CALL):  # MLflow refuses to change one
            persist(functools.partial(log, params=params))
        for part in _parts([RunTag(*tag) for tag in tags.items()], OTHERS_A_CALL):
            persist(functools.partial(log, tags=part))
        if datasets := list(_datasets(run).values()):
            persist(lambda: self.client.log_inputs(copy.info.run_id, datasets))
        if any(files.rglob("*")):
            persist(lambda: self.destination.artifacts.upload(copy, files))

    def _end(self, run: "MlflowRun", copy_id: str) -> None:
        """Give a copy the tags that its source has, and no others, and its end; a running one has none."""
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
    """Points as they compare: NaN is no number, and equals nothing."""
    return {
        key: sorted((point.step, point.timestamp, repr(point.value)) for point in of_key)
        for key, of_key in points.items()
    }


def _datasets(run: "MlflowRun") -> "dict[str, DatasetInput]":
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return {f"{entry.dataset.name} {entry.dataset.digest}": entry for entry in inputs}


def _noted(run: "MlflowRun") -> dict[str, str]:
    """Digests of a split's files when they were written: what was lost or damaged since then differs from them."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return dict(json.loads(run.data.tags["file_digests"]))
    return {}

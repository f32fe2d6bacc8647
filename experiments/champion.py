"""The champion of a task: its best network so far, as an MLflow model that needs none of this program's source."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import analysis
import tracking
from analysis.groups import group_id
from analysis.tables import NAMES, PART_NAMES, interval, number, verdict_sentences
from datasets import ImageData
from experiments.config import Task
from experiments.stored import Rebuilt, rebuild
from tracking import Store, registry
from tracking.keys import BASELINES, CHECKPOINT, SAMPLE
from tracking.registry import Champion


class Classifier(nn.Module):
    """A model with all that stands around it: from pixels to probabilities.

    Parameters
    ----------
    model : nn.Module
        From normalised images, shape (N, channels, H, W), to logits, shape (N, K).
    mean, std : Tensor of float32, shape (channels,)
        What pixels from 0 to 255 are normalised with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        """Map images, uint8 of shape (N, H, W, channels), to probabilities, float32 of shape (N, K)."""
        normalised = (images.to(torch.float32) - self.mean) / self.std
        return torch.softmax(self.model(normalised.permute(0, 3, 1, 2)), 1)


def crown(
    store: Store, task: Task, usual_splits: int, data: ImageData, runs: pd.DataFrame, evidence: analysis.Evidence
) -> str:
    """Register the best network of a comparison group as the task's champion, where it takes the place of the last.

    Of the networks that have all their splits it is the one with the best mean test score (validation score where
    there is no test part), with the weights of its best split by the same score. Within a group the better takes the
    place of the worse, otherwise real data that of the sample, then a whole protocol that of a reduced one (fewer
    splits or epochs, or less patience, than the task has), and else the newer that of the older.

    Parameters
    ----------
    store : Store
    task : Task
    usual_splits : int
        The task's own number of them.
    data : ImageData
        That the group's runs were made from.
    runs : pandas.DataFrame
        All of the task, from `load_runs`.
    evidence : Evidence
        Of the group.

    Returns
    -------
    str
        A sentence on who is the champion now; empty where the group has no network with all its splits.
    """
    metric = analysis.default_metric(evidence.group)
    best = best_split(evidence, metric)
    if best is None:
        return ""
    whole = {"n_splits": usual_splits, "epochs": task.training.epochs, "patience": task.training.patience}

    def look() -> tuple[Champion | None, bool, str]:
        nonlocal runs
        held = registry.read_champion(store, task.name)
        if held is not None and not runs["run_id"].eq(held.run_id).any():  # of a command that ended a moment ago?
            runs = analysis.load_runs([task.name], store.uri)
        return held, *decide(whole, runs, evidence, metric, best, held)

    held, stays, reason = tracking.persist(look)
    if not stays:
        with store.scratch() as scratch:
            folder = Path(scratch) / "model"
            try:
                save(folder, rebuild(analysis.local_artifact(best, CHECKPOINT, store.uri)), data, str(best["run_id"]))
            except Exception as error:  # noqa: BLE001 - torch.export refuses models in many ways; damaged checkpoints
                return f"not registered, since {_title(best)}, cannot be exported: {tracking.in_one_line(error)}"

            def register_unless_it_stays() -> tuple[Champion | None, bool, str]:
                with store.lock():  # another command of the task may have registered its own meanwhile
                    held, stays, reason = look()
                    if not stays:
                        about = f"{task.question} The best network of {task.name} so far; each version says which."
                        text = describe(evidence, metric, best, data, reason)
                        where = (task.name, str(best["run_id"]), str(best["model"]))
                        held = registry.register_champion(store, *where, folder, about, text)
                    return held, stays, reason

            held, stays, reason = tracking.persist(register_unless_it_stays)
    assert held is not None  # now at least
    if stays:
        champion = _title(runs[runs["run_id"] == held.run_id].iloc[0])
        return f"{champion}, as before{f': {reason}' if reason else ''}"
    return f"{_title(best)}, now version {held.version} of models:/{task.name}: {reason}"


def best_split(evidence: analysis.Evidence, metric: str) -> "pd.Series[Any] | None":
    """The best run of the best network that has all its splits; None where there is none."""
    networks = evidence.runs[~evidence.runs["model"].isin(BASELINES)]
    complete = networks.groupby("model")[metric].agg(["mean", "size"])
    complete = complete[complete["size"] >= evidence.group["n_splits"].max()].dropna()
    if complete.empty:
        return None
    of_best = networks[networks["model"] == complete["mean"].idxmax()].sort_values("split")
    row: pd.Series[Any] = of_best.loc[of_best[metric].idxmax()]
    return row


def decide(
    whole: Mapping[str, int],
    runs: pd.DataFrame,
    evidence: analysis.Evidence,
    metric: str,
    best: "pd.Series[Any]",
    held: Champion | None,
) -> tuple[bool, str]:
    """Say whether the champion stays, and why it does or does not; nothing where it is the best of its group."""
    if held is None:
        return False, "it is the first one"
    former = f"version {held.version}"
    groups = analysis.comparison_groups(runs)
    group = next((group for group in groups if group["run_id"].eq(held.run_id).any()), None)
    if group is None:
        return False, f"the run of {former} was deleted"
    if group_id(group) == group_id(evidence.group):
        better = _better_than(evidence, metric, best, held)
        return not better, better
    ours, theirs = _rank(evidence.group, whole), _rank(group, whole)
    if ours != theirs:
        why = "real data come before generated images" if ours[0] != theirs[0] else "a whole protocol before a reduced"
        return ours < theirs, why
    newer = evidence.runs["end_time"].max() > analysis.finished(group)["end_time"].max()
    return not newer, f"it is newer than {former}, and they differ in settings or data" if newer else "it is newer"


def _better_than(evidence: analysis.Evidence, metric: str, best: "pd.Series[Any]", held: Champion) -> str:
    """Why the best takes the place of a champion of the same comparison group; empty where it does not."""
    former = evidence.runs[evidence.runs["run_id"] == held.run_id]
    if former.empty:
        return f"the split of version {held.version} was trained again"
    row = former.iloc[0]
    if best["model"] == row["model"]:
        ours, theirs, what = best[metric], row[metric], f"{NAMES[metric.split('/')[1]]} on its split"
    else:
        ours, theirs = (evidence.of(model)[metric].mean() for model in (best["model"], row["model"]))
        what = f"mean {NAMES[metric.split('/')[1]]}"
    if ours <= theirs:
        return ""
    against = f"that of {_title(row)} (version {held.version}) was {number(theirs, metric)} %"
    return f"its {what} is {number(ours, metric)} %, {against}"


def _rank(group: pd.DataFrame, whole: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether a group is of real data, and whether it is a whole protocol: no setting is smaller than there."""
    first = group.iloc[0]
    is_real = not str(first["dataset"]).startswith(SAMPLE)
    return is_real, all(first[key] >= value for key, value in whole.items())


def _title(row: "pd.Series[Any]") -> str:
    return f"{row['model']}, split {row['split']}"


def describe(evidence: analysis.Evidence, metric: str, best: "pd.Series[Any]", data: ImageData, reason: str) -> str:
    """Write what a user of the registered version must know, in Markdown."""
    model, part = str(best["model"]), metric.split("/")[0]
    what = f"{NAMES[metric.split('/')[1]]}, {PART_NAMES[part]}"
    estimate = evidence.estimate(metric, model)
    ends = interval(estimate.test.low, estimate.test.high, metric, " to ")
    networks = evidence.runs.loc[~evidence.runs["model"].isin(BASELINES), "model"].nunique()
    height, width, channels = data.images.shape[1:]
    lines = [
        f"**{_title(best)}** of {best['task']}: {best['question']} Trained on {best['dataset']}.",
        f"Why this one: {reason}.",
        f"- {what}: {number(estimate.test.mean, metric)} % in the mean over {estimate.n} splits"
        f"{f' (95 % interval {ends} %)' if ends else ''}, {number(best[metric], metric)} % in this split. It is the "
        f"best of {networks} network{'s' if networks != 1 else ''} and {estimate.n} splits by this very score, so "
        "expect a little less on other images.",
        f"- Input: images of uint8, shape (N, {height}, {width}, {channels}), 0 to 255. Output: probabilities of "
        f"{', '.join(data.classes)}, in this order, whatever is on the picture.",
        f"- Run `{best['run_id']}`, comparison group `{group_id(evidence.group)}`, data `{best['dataset_digest']}`.",
    ]
    found = [text for text in verdict_sentences(evidence, metric, 0.01) if model in text.split(maxsplit=3)[:3]]
    if found:
        lines.append("What the comparison says of it:")
        lines += [f"- {sentence}" for sentence in found]
    if str(best["dataset"]).startswith(SAMPLE):
        lines.append("It was trained on generated images and knows nothing of real ones.")
    return "\n\n".join(lines)


def save(folder: Path, rebuilt: Rebuilt, data: ImageData, run_id: str) -> None:
    """Write the MLflow model: a `torch.export` program (pt2), which is run without the source of the model."""
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    # one image of each of two classes: torch.export would take a batch of one for a model of single images
    example = data.images[np.unique(data.labels, return_index=True)[1][:2]]
    shape = (-1, *data.images.shape[1:])
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(data.classes)))]),
    )
    with _quiet():
        mlflow.pytorch.save_model(
            Classifier(rebuilt.model, rebuilt.checkpoint.mean, rebuilt.checkpoint.std).eval(),
            folder,
            mlflow_model=Model(run_id=run_id),
            signature=signature,
            input_example=example,
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],  # inferring them takes ten seconds
            metadata={"classes": list(data.classes)},
            serialization_format="pt2",
        )


def load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Read what `save` wrote, without executing anything in it.

    Returns
    -------
    program : nn.Module
        As `Classifier`.
    about : dict
        Its `classes`, and `size` and `channels` of its images.
    """
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    import mlflow.pytorch
    from mlflow.models import Model

    with _quiet():
        program: nn.Module = mlflow.pytorch.load_model(str(folder))
    saved = Model.load(str(folder))
    shape = saved.signature.inputs.inputs[0].shape
    return program, {**(saved.metadata or {}), "size": shape[1], "channels": shape[3]}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch and MLflow tell their developers off the screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""The champion as an MLflow model: a `torch.export` program, and a copy of what serves it."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL
import torch
from torch import Tensor, nn

import analysis
import tracking
from datasets import ImageData, decoding
from experiments.champion import serving
from experiments.jobs.rebuilt import Rebuilt, rebuild
from experiments.provenance import fingerprint
from tracking import Store, StoreError
from tracking.keys import CHECKPOINT


class Classifier(nn.Module):
    """A model with its pre- and postprocessing: from pixels to probabilities.

    `mean` and `std`, float32 of shape (channels,), normalise pixels from 0 to 255; `model` maps normalised images,
    shape (N, channels, H, W), to logits, shape (N, K).
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


def export(folder: Path, store: Store, best: "pd.Series[Any]", data: ImageData) -> None:
    """Write the model of a run, if the source that is here is the one that gave its scores."""
    try:
        rebuilt = rebuild(analysis.local_artifact(best, CHECKPOINT, store.uri))
        if fingerprint.source_of(rebuilt.model).digest == best["source_digest"]:
            save(folder, rebuilt, data, str(best["run_id"]))
            return
        reason = "other source trained it; train it again"
    except Exception as error:  # noqa: BLE001 - torch.export refuses models in many ways; a checkpoint may be damaged
        reason = tracking.in_one_line(error)
    raise StoreError(f"{best['model']}, split {best['split']}, cannot be exported: {reason}")


def save(folder: Path, rebuilt: Rebuilt, data: ImageData, run_id: str) -> None:
    """Write the MLflow model: a `torch.export` program (pt2), which is run without the source of the model."""
    import mlflow.pyfunc
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    # one image of each of two classes: torch.export would take a batch of one for a model of single images
    example = data.images[np.unique(data.labels, return_index=True)[1][:2]]
    # MLflow would cut 0.5 to 0 for a signature of uint8 (findings/mlflow_uint8_signature.sh); it passes on all that
    # this one takes, for `serving` to judge
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(object), (-1,))]),
        outputs=Schema([ColSpec(DataType.float, name) for name in data.classes]),
    )
    about = Model(run_id=run_id)
    with _quiet():
        mlflow.pytorch.save_model(
            Classifier(rebuilt.model, rebuilt.checkpoint.mean, rebuilt.checkpoint.std).eval(),
            folder,
            mlflow_model=about,
            signature=signature,
            input_example=example,
            pip_requirements=_requirements(),  # inferring them takes ten seconds
            metadata={"classes": list(data.classes), "shape": list(data.images.shape[1:]), "depth": data.depth},
            serialization_format="pt2",
        )
    (folder / "code").mkdir()
    for source in (serving.__file__, decoding.__file__):
        shutil.copy(str(source), folder / "code")
    served = {mlflow.pyfunc.MAIN: "serving", mlflow.pyfunc.CODE: "code"}
    about.flavors[mlflow.pyfunc.FLAVOR_NAME] = {
        key: value for key, value in about.flavors[mlflow.pyfunc.FLAVOR_NAME].items() if key != "config"
    } | served
    about.save(folder / "MLmodel")


def _requirements() -> list[str]:
    """Return the requirements of serving; MLflow adds its own, which bring NumPy and pandas."""
    return [f"torch=={torch.__version__.partition('+')[0]}", f"pillow=={PIL.__version__}"]


def load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Read a model that `save` wrote, without executing anything that came with it.

    Returns
    -------
    program : nn.Module
        As `Classifier`.
    about : dict
        Its `classes`, and `size`, `channels` and `depth` of its images.

    Raises
    ------
    StoreError
        It is something else, or damaged.
    """
    import mlflow.pytorch
    from mlflow.models import Model

    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    try:
        about = Model.load(str(folder))
        flavor = about.flavors["pytorch"]
        programs = [path.name for path in (folder / "data").iterdir()]
        # MLflow would import other files that it finds before it looks for pickles
        if flavor.get("code") or flavor["model_data"] != "data" or programs != ["model.pt2"]:
            raise ValueError("it brings code")
        with _quiet():
            program: nn.Module = mlflow.pytorch.load_model(str(folder))
        metadata = about.metadata or {}
        # champions of older versions have a signature of pixels
        size, _, channels = metadata.get("shape") or about.signature.inputs.inputs[0].shape[1:]
        depth = {kind: (float(low), float(high)) for kind, (low, high) in (metadata.get("depth") or {}).items()}
        return program, {
            "classes": list(metadata["classes"]), "size": size, "channels": channels, "depth": depth
        }  # fmt: skip
    except Exception as error:  # noqa: BLE001 - readers raise whatever a damaged or foreign file makes them trip over
        reason = f"{type(error).__name__}: {tracking.in_one_line(error)}"
        raise StoreError(f"{folder} holds no model that was registered by this program ({reason})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings that torch and MLflow write for their developers off the screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""The Python model with which MLflow serves a champion.

A copy of this file goes with each champion, beside `decoding.py`; so it imports nothing else of this program.

The input is pixels, whole numbers from 0 to 255 of shape (N, size, size, channels), or N strings: image files of any
format and size in base64. The answer has a row for each image, and in it the probability of each class by name.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from torch import nn


class Server:
    """A champion that answers requests.

    Parameters
    ----------
    program : nn.Module
        Maps images, uint8 of shape (N, size, size, channels), to probabilities, float32 of shape (N, K).
    classes : sequence of str
        K names.
    shape : sequence of int
        Size, size, channels.
    depth : dict
        See `decoding.decode`.
    """

    def __init__(self, program: nn.Module, classes: Sequence[str], shape: Sequence[int], depth: dict[str, Any]) -> None:
        self._program = program
        self._classes = classes
        self._shape = tuple(shape)
        self._depth = {kind: tuple(values) for kind, values in depth.items()}

    def predict(self, inputs: Any, params: object = None) -> pd.DataFrame:
        """Return probabilities, float32, a row for each image and a column for each class.

        Raises
        ------
        MlflowException
            These are no such images. The server answers with code 400 and the message.
        """
        images = self._images(inputs.to_numpy() if isinstance(inputs, pd.DataFrame) else np.asarray(inputs))
        with torch.inference_mode():
            probabilities = self._program(torch.from_numpy(images)).numpy()
        return pd.DataFrame(probabilities, columns=list(self._classes))

    def _images(self, inputs: np.ndarray) -> np.ndarray:
        texts = inputs.reshape(-1).tolist()
        if texts and all(isinstance(text, str) for text in texts):
            return np.stack([self._decoded(text, number) for number, text in enumerate(texts)])
        if inputs.dtype == object:  # what JSON gives
            try:
                inputs = np.array(inputs.tolist())
            except ValueError:
                raise _refusal(f"the images differ in shape; each has shape {self._shape}") from None
        if inputs.ndim != 4 or inputs.shape[1:] != self._shape or not len(inputs):
            shape = ", ".join(["N", *map(str, self._shape)])
            raise _refusal(f"images have shape ({shape}), or are files in base64; this has shape {inputs.shape}")
        if inputs.dtype.kind not in "iuf":
            raise _refusal(f"pixels are numbers from 0 to 255, not {inputs.dtype}")
        wrong = inputs[~((inputs >= 0) & (inputs <= 255) & (inputs == np.trunc(inputs)))]
        if wrong.size:
            hint = "; multiply by 255 if yours go from 0 to 1" if 0 < wrong[0] < 1 else ""
            raise _refusal(f"pixels are whole numbers from 0 to 255, and {wrong[0]} is none{hint}")
        return inputs.astype(np.uint8)

    def _decoded(self, text: str, number: int) -> np.ndarray:
        from decoding import decode  # type: ignore[import-not-found]  # the copy beside this one

        try:
            file = io.BytesIO(base64.b64decode(text, validate=True))
        except ValueError:
            raise _refusal(f"string {number} is not base64") from None
        try:
            image: np.ndarray = decode(file, self._shape[0], self._shape[2], self._depth)
        except Exception as error:  # noqa: BLE001 - Pillow's parsers raise whatever a broken file makes them trip over
            reason = " ".join(str(error).split()) or "it is no image"
            raise _refusal(f"string {number} is base64 of a file that cannot be read as an image ({reason})") from None
        return image


def _refusal(sentence: str) -> MlflowException:
    return MlflowException(sentence, error_code=INVALID_PARAMETER_VALUE)


def _load_pyfunc(folder: str) -> Server:
    """Load a champion, as MLflow calls it."""
    import mlflow.pytorch

    about = Model.load(str(Path(folder).parent)).metadata or {}
    program = mlflow.pytorch.load_model(str(Path(folder).parent))
    return Server(program, about["classes"], about["shape"], about.get("depth") or {})

"""The served champion: images of all kinds in, probabilities by name out, and one sentence for all else."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import load_model, scoring_server
from PIL import Image

import models
from datasets.decoding import decode
from experiments.champion import export

CLASSES = ["T-shirt/top", "dog", "muffin"]
SIZE = 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registered model of fresh weights."""
    torch.manual_seed(0)
    network = models.build("lenet5", 3, 3, SIZE)
    checkpoint = SimpleNamespace(mean=torch.full((3,), 100.0), std=torch.full((3,), 50.0))
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
    data = SimpleNamespace(images=pixels, labels=np.arange(3), classes=CLASSES, depth={"integers": (0.0, 4095.0)})
    folder = tmp_path_factory.mktemp("served") / "model"
    export.save(folder, SimpleNamespace(model=network, checkpoint=checkpoint), data, "0" * 32)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)


def ask(model: Any, inputs: object) -> list[dict[str, float]]:
    """What MLflow's server answers to a request, without a port."""
    body = json.dumps({"inputs": inputs})
    invocations: Any = scoring_server.invocations
    reply = invocations(body, "application/json", model, model.metadata.get_input_schema())
    assert reply.status == 200
    predictions: list[dict[str, float]] = json.loads(reply.response)["predictions"]
    return predictions


def expected(folder: Path, images: np.ndarray) -> pd.DataFrame:
    program, about = export.load(folder)
    assert about == {"classes": CLASSES, "size": SIZE, "channels": 3, "depth": {"integers": (0.0, 4095.0)}}
    with torch.inference_mode():
        return pd.DataFrame(program(torch.from_numpy(images)).numpy(), columns=CLASSES)


def encoded(image: Image.Image, form: str) -> tuple[str, bytes]:
    file = io.BytesIO()
    image.save(file, form)
    return base64.b64encode(file.getvalue()).decode(), file.getvalue()


def test_pixels_get_probabilities_by_name(model: Any, folder: Path, pixels: np.ndarray) -> None:
    answer = expected(folder, pixels)
    pd.testing.assert_frame_equal(pd.DataFrame(ask(model, pixels.tolist())), answer, check_dtype=False)
    for inputs in (pixels, pixels.astype(np.float64), pixels.astype(np.int64)):
        pd.testing.assert_frame_equal(model.predict(inputs), answer)


def test_picture_files_are_seen_as_predict_sees_them(model: Any, folder: Path, tmp_path: Path) -> None:
    scene = Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 40, 3)).astype(np.uint8)).resize((400, 300))
    deep = Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40))
    texts, seen = [], []
    for number, (image, form) in enumerate(((scene, "JPEG"), (scene.convert("L"), "PNG"), (deep, "PNG"))):
        text, content = encoded(image, form)
        (tmp_path / f"{number}.{form.lower()}").write_bytes(content)
        texts.append(text)
        seen.append(decode(tmp_path / f"{number}.{form.lower()}", SIZE, 3, {"integers": (0.0, 4095.0)}))
    answer = expected(folder, np.stack(seen))
    pd.testing.assert_frame_equal(pd.DataFrame(ask(model, texts)), answer, check_dtype=False)
    pd.testing.assert_frame_equal(model.predict(pd.DataFrame({"picture": texts})), answer)


def test_what_is_no_image_is_refused_in_one_sentence(model: Any, pixels: np.ndarray) -> None:
    fractions = (pixels / 255).tolist()
    fractions[0][0][0][0] = 0.5
    beyond, negative = pixels.astype(int), pixels.astype(int)
    beyond[0, 0, 0, 0], negative[0, 0, 0, 0] = 300, -1
    for inputs, sentence in (
        (fractions, "pixels are whole numbers from 0 to 255, and 0.5 is none; multiply by 255 if yours go from 0 to 1"),
        (beyond.tolist(), "pixels are whole numbers from 0 to 255, and 300 is none"),
        (negative.tolist(), "pixels are whole numbers from 0 to 255, and -1 is none"),
        (
            pixels[:, :-1].tolist(),
            "images have shape (N, 28, 28, 3), or are files in base64; this has shape (2, 27, 28",
        ),
        (pixels[0].tolist(), "this has shape (28, 28, 3)"),
        ([pixels[0].tolist(), pixels[0, 1:].tolist()], "the images differ in shape; each has shape (28, 28, 3)"),
        (["dog.jpg"], "string 0 is not base64"),
        ([base64.b64encode(b"no picture").decode()], "string 0 is base64 of a file that cannot be read as an image"),
    ):
        with pytest.raises(MlflowException) as error:
            ask(model, inputs)
        assert error.value.error_code == "INVALID_PARAMETER_VALUE"  # the server's 400
        assert sentence in error.value.message and "Traceback" not in error.value.message
    with pytest.raises(MlflowException, match="nan is none"):
        model.predict(np.full((1, SIZE, SIZE, 3), np.nan))

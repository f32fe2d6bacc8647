"""Figures whose text may need other fonts, and which images a contact sheet shows."""

import io
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from analysis.figures import (
    KNOWN,
    colour,
    confusion_figure,
    cost_figure,
    curves_figure,
    file_name,
    mistakes_figure,
    most_confused,
)
from analysis.fonts import _installed_fonts, font_families
from tests.conftest import ROOT


def test_confusion_figure_is_drawn(tmp_path: Path) -> None:
    figure = confusion_figure(np.array([[5, 1], [0, 7]]), ["cat", "dog"], "title")
    figure.savefig(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 200
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["5", "1", "0", "7"]


def test_confusion_figure_takes_any_class_name_and_many_classes(tmp_path: Path) -> None:
    confusion_figure(np.eye(2, dtype=int), ["a$\\b$c", "$_$"], "$").savefig(tmp_path / "a.png")
    confusion_figure(np.eye(61, dtype=int), [f"class {i}" for i in range(61)], "many").savefig(tmp_path / "b.png")
    assert max(Image.open(tmp_path / "b.png").size) <= 1200


def test_plain_text_needs_no_other_font() -> None:
    assert font_families(["cats", "dogs", "Ankle boot", "café"]) == ["DejaVu Sans"]


@pytest.mark.skipif(
    not any(family.startswith(("Nanum", "Noto Sans CJK", "Noto Sans KR")) for family, _ in _installed_fonts()),
    reason="no Korean font is installed",
)
def test_korean_class_names_are_drawn() -> None:
    assert len(font_families(["고양이"])) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that no font has
        drawn = []
        for names in (["고양이", "강아지"], ["강아지", "고양이"]):
            figure = confusion_figure(np.eye(2, dtype=int), names, "한글")
            figure.savefig(buffer := io.BytesIO())
            drawn.append(buffer.getvalue())
    assert drawn[0] != drawn[1]  # boxes would look alike


def test_a_glyph_that_no_font_has_is_said_once_however_the_figure_is_saved() -> None:
    code = """import io, numpy as np
from analysis.figures import confusion_figure, encode
for _ in range(2):
    figure = confusion_figure(np.eye(2, dtype=int), ["\\U000F1234", "b"], "title")
    figure.savefig(io.BytesIO())
    encode(figure, "png")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("! no installed font has") and done.stderr.count("\n") == 1, done.stderr


def test_most_confident_mistakes_of_all_splits_are_among_those_of_each() -> None:
    rng = np.random.default_rng(0)
    splits = []
    for _ in range(4):
        index = rng.permutation(60)[:40]
        frame = pd.DataFrame({"index": index, "true": index % 3, "pred": rng.integers(0, 3, 40)})
        splits.append(frame.assign(prob=rng.choice([0.4, 0.5, 0.6], 40)))  # many ties
    kept = {int(image) for split in splits for image in most_confused(split, 5)["index"]}
    chosen = most_confused(pd.concat(splits), 5)
    assert set(chosen["index"]) <= kept and chosen["index"].is_unique
    assert (chosen["true"] != chosen["pred"]).all() and chosen["prob"].is_monotonic_decreasing
    assert chosen["prob"].iloc[0] == max(split.loc[split["true"] != split["pred"], "prob"].max() for split in splits)


@pytest.mark.parametrize(
    ("number", "name"), [(1, "a name of one's own that is long"), (20, "$a$ longer name"), (20, "M" * 20)]
)
def test_the_sheet_of_mistakes_overlaps_nowhere(number: int, name: str) -> None:
    wrong = pd.DataFrame({"index": range(number), "true": 0, "pred": 1, "prob": 0.999})
    pictures = {index: np.zeros((64, 64, 3), np.uint8) for index in range(number)}
    figure = mistakes_figure(wrong, pictures, [name, f"other {name}"], "title")
    assert figure is not None
    figure.canvas.draw()
    texts = [figure.texts[0], *(axes.title for axes in figure.axes if axes.title.get_text())]
    assert len(texts) == 1 + number
    images = [axes.images[0] for axes in figure.axes if axes.images]
    boxes = [artist.get_window_extent() for artist in (*texts, *images)]
    assert all(figure.bbox.padded(1).contains(x, y) for box in boxes for x, y in box.corners())
    assert not any(box.padded(-0.5).overlaps(other.padded(-0.5)) for box, other in itertools.combinations(boxes, 2))


def test_a_model_keeps_its_colour_and_baselines_are_gray() -> None:
    assert colour("vggnet") == colour("vggnet") != colour("lenet5")
    assert len(set(to_rgb(colour("linear")))) == 1
    assert to_rgb(colour("a model of one's own")) not in {to_rgb(colour(model)) for model in KNOWN}


@pytest.mark.parametrize("prefix", ["", "timm/a-model-whose-name-is-long-", "x" * 200])
def test_forty_models_are_told_apart_in_a_figure_of_bounded_size(prefix: str) -> None:
    models = [f"{prefix}model{number}" for number in range(40)]
    numbers = {"mean": np.linspace(0.9, 0.5, 40), "low": 0.4, "high": 0.95, "baseline": False}
    costs = {"parameters": np.arange(1, 41) * 1000, "macs": np.arange(1, 41) * 10_000, "mean/train_seconds": 3.0}
    figure = cost_figure(pd.DataFrame(numbers | costs, index=models), "test/accuracy")
    signs = [line.get_marker() for line in figure.axes[0].lines if line.get_marker() not in ("None", "_", "|", None)]
    assert len(signs) == len(set(signs)) == 40
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(named)) == 40
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and figure.get_size_inches()[1] < 12
    assert min(axes.get_window_extent().height for axes in figure.axes) > 0.8 * figure.dpi


def test_curves_of_many_models_are_those_of_the_best() -> None:
    models = [f"model{number}" for number in range(40)]
    values = {
        "epoch": 1,
        "best_epoch": 1,
        "val/loss": 1.0,
        "train/loss": 1.0,
        "val/accuracy": 0.5,
        "train/accuracy": 0.5,
    }
    curves = pd.DataFrame([{"model": model, "run_id": model} | values for model in models])
    figure = curves_figure(curves, models)
    assert len(figure.axes) == 24 and figure.get_size_inches()[1] < 16
    assert figure.legends[0].get_title().get_text() == "the best 12 of 40 models"


def test_models_with_different_names_have_different_files() -> None:
    models = ["lenet5", "a/b", "a-b", "a b", "timm/resnet18", "x" * 300, "x" * 301]
    files = [file_name(model) for model in models]
    assert len(set(files)) == len(files) and files[0] == "lenet5" and files[2] == "a-b"
    assert all(len(file) < 100 and "/" not in file and " " not in file for file in files)

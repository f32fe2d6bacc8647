"""Figures whose text may need other fonts, and which images a contact sheet shows."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import analysis
from analysis.fonts import _installed_fonts


def test_confusion_figure_is_drawn(tmp_path: Path) -> None:
    figure = analysis.confusion_figure(np.array([[5, 1], [0, 7]]), ["cat", "dog"], "title")
    figure.savefig(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 200
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["5", "1", "0", "7"]


def test_confusion_figure_takes_any_class_name_and_many_classes(tmp_path: Path) -> None:
    analysis.confusion_figure(np.eye(2, dtype=int), ["a$\\b$c", "$_$"], "$").savefig(tmp_path / "a.png")
    analysis.confusion_figure(np.eye(300, dtype=int), [f"class {i}" for i in range(300)], "many").savefig(
        tmp_path / "b.png"
    )
    assert max(Image.open(tmp_path / "b.png").size) <= 1200


def test_plain_text_needs_no_other_font() -> None:
    assert analysis.font_families(["cats", "dogs", "Ankle boot", "café"]) == ["DejaVu Sans"]


@pytest.mark.skipif(
    not any(family.startswith(("Nanum", "Noto Sans CJK", "Noto Sans KR")) for family, _ in _installed_fonts()),
    reason="no Korean font is installed",
)
def test_korean_class_names_are_drawn() -> None:
    assert len(analysis.font_families(["고양이"])) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that no font has
        drawn = []
        for names in (["고양이", "강아지"], ["강아지", "고양이"]):
            figure = analysis.confusion_figure(np.eye(2, dtype=int), names, "한글")
            figure.savefig(buffer := io.BytesIO())
            drawn.append(buffer.getvalue())
    assert drawn[0] != drawn[1]  # boxes would look alike

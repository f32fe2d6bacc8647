"""Figures, and the fonts that their text needs."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import seaborn
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

PREFERRED_FONTS = (  # for what DejaVu Sans, matplotlib's own, lacks; tried in this order, then all others
    "NanumGothic", "Noto Sans CJK KR", "Noto Sans KR", "Apple SD Gothic Neo", "Malgun Gothic",
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Microsoft YaHei", "Noto Sans",
)  # fmt: skip


def font_families(texts: Iterable[str]) -> list[str]:
    """Choose the fonts that together can draw `texts`: matplotlib's own first, then installed ones as needed.

    Returns
    -------
    list of str
        For the `fontfamily` of a text, which falls back from one to the next. Characters that no installed font
        has stay boxes.
    """
    families = ["DejaVu Sans"]
    needed = {ord(character) for text in texts for character in text if not character.isspace()}
    needed -= _characters(Path(font_manager.findfont("DejaVu Sans")))
    if not needed:
        return families
    for family, path in _installed_fonts():
        if covered := needed & _characters(path):
            font_manager.fontManager.addfont(path)  # it may be newer than matplotlib's own list
            families.append(family)
            needed -= covered
        if not needed:
            break
    return families


@cache
def _installed_fonts() -> list[tuple[str, Path]]:
    fonts = []
    for name in sorted(font_manager.findSystemFonts()):
        try:
            font = FT2Font(name)
        except (OSError, RuntimeError):  # not a font after all, or a format that FreeType cannot scale
            continue
        if font.style_name in ("Regular", "Book", "Medium"):
            fonts.append((font.family_name, Path(name)))
    rank = {family: position for position, family in enumerate(PREFERRED_FONTS)}
    return sorted(fonts, key=lambda font: rank.get(font[0], len(rank)))


@cache
def _characters(path: Path) -> frozenset[int]:
    return frozenset(FT2Font(str(path)).get_charmap())


def confusion_figure(confusion: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix: counts, coloured by their share of the true class.

    Parameters
    ----------
    confusion : numpy.ndarray of int, shape (K, K)
        Rows are true classes.
    classes : sequence of str
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        At most 12 inches wide; with many classes the numbers, and names that would overlap, are left out.
    """
    side = min(12.0, max(3.6, 0.5 * len(classes) + 1.6))  # inches
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    numbers = confusion if len(classes) <= 20 else False
    seaborn.heatmap(shares, annot=numbers, fmt=",d", annot_kws={"fontsize": 7}, cmap="Blues", vmin=0, vmax=1,
                    cbar=False, square=True, ax=axes)  # fmt: skip
    shown = range(0, len(classes), 1 + len(classes) // 60)
    names = [classes[label] for label in shown]
    # a class may be called "a$b$c", which is no formula
    style: dict[str, Any] = {"fontfamily": font_families([*classes, title]), "parse_math": False}
    axes.set_xticks([label + 0.5 for label in shown], names, rotation=45, ha="right", rotation_mode="anchor", **style)
    axes.set_yticks([label + 0.5 for label in shown], names, rotation=0, **style)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=10, **style)
    return figure

"""The fonts that a figure's text needs: class names may be in any script."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from matplotlib import font_manager
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

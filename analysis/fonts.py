"""Fonts for the text of a figure: class names may be in any script."""

import sys
import unicodedata
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

PREFERRED_FONTS = (  # tried in this order, then all others, for characters that DejaVu Sans lacks
    "NanumGothic", "Noto Sans CJK KR", "Noto Sans KR", "Apple SD Gothic Neo", "Malgun Gothic",
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Microsoft YaHei", "Noto Sans",
)  # fmt: skip
SHOWN = 10  # characters that no font has, in a message
warnings.filterwarnings("ignore", "Glyph ")  # wherever a figure is saved: `font_families` says it once


def font_families(texts: Iterable[str]) -> list[str]:
    """Choose fonts that together can draw `texts`: matplotlib's own first, then installed ones as needed.

    The result is a `fontfamily`, a list of fallbacks. Characters that no installed font has become boxes and are named.
    """
    families = ["DejaVu Sans"]
    needed = {ord(character) for text in texts for character in text if not character.isspace()}
    needed -= _characters(Path(font_manager.findfont("DejaVu Sans")))
    if not needed:
        return families
    for family, path in _installed_fonts():
        if covered := needed & _characters(path):
            font_manager.fontManager.addfont(path)  # it may be missing from matplotlib's cached list
            families.append(family)
            needed -= covered
        if not needed:
            break
    if needed:
        _say_what_is_missing("".join(sorted(map(chr, needed))))
    return families


@cache
def _say_what_is_missing(characters: str) -> None:
    korean = any("HANGUL" in unicodedata.name(character, "") for character in characters)
    package = "fonts-nanum" if korean else "fonts-noto-core and fonts-noto-cjk"
    more = "..." if len(characters) > SHOWN else ""
    print(
        f"! no installed font has {characters[:SHOWN]}{more}, which figures show as boxes; install a package of fonts, "
        f"such as {package}",
        file=sys.stderr,
    )


@cache
def _installed_fonts() -> list[tuple[str, Path]]:
    fonts = []
    for name in sorted(font_manager.findSystemFonts()):
        try:
            font = FT2Font(name)
        except (OSError, RuntimeError):  # no font, or one that FreeType cannot scale
            continue
        if font.style_name in ("Regular", "Book", "Medium"):
            fonts.append((font.family_name, Path(name)))
    rank = {family: position for position, family in enumerate(PREFERRED_FONTS)}
    return sorted(fonts, key=lambda font: rank.get(font[0], len(rank)))


@cache
def _characters(path: Path) -> frozenset[int]:
    return frozenset(FT2Font(str(path)).get_charmap())

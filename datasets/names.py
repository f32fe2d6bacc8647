"""Names of files, folders and classes as people read them."""

import os
import unicodedata
from pathlib import Path

# made by systems, not by people: thumbnails, resource forks, bins
SYSTEM_NAMES = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip
CONTROLS = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's categories of characters that a terminal executes or cannot show
DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C, 0x200E, 0x200F}  # let a name read as another


def readable_name(name: str) -> str:
    r"""Return a file name as printable, comparable text.

    It is in Unicode NFC. Bytes that are not UTF-8, and characters that control a terminal, are shown as `\x1b`.
    """
    text = unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
    return "".join(_escaped(character) for character in text)


def looks_like(name: str) -> str:
    """Return what equal-looking names have in common: case, spaces and invisible characters aside."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return "".join(
        character for character in text if not character.isspace() and unicodedata.category(character) != "Cf"
    )


def _escaped(character: str) -> str:
    if unicodedata.category(character) in CONTROLS or ord(character) in DIRECTIONS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden, or a system's own."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM_NAMES

"""Names that people type."""

import difflib
from collections.abc import Collection


def not_one_of(name: str, known: Collection[str]) -> str:
    """Say that a name is none of those known, and which one was probably meant."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name!r} is not one of {', '.join(known)}{hint}"

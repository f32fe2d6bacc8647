"""The source that this process started with: read once, before anything else, so that later edits do not count."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("analysis", "datasets", "experiments", "models", "tracking")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


TEXTS: Mapping[str, str] = {
    path.relative_to(ROOT).as_posix(): _read(path)
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def digests() -> dict[str, str]:
    """SHA-256 of each file as it was when this process started."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in TEXTS.items()}


def changed_since(started: Mapping[str, str], files: Iterable[str]) -> list[str]:
    """Those of the files whose source here differs from the digests of another process."""
    here = digests()
    return [name for name in files if here.get(name) != started.get(name)]


def changed_on_disk(files: Iterable[str]) -> list[str]:
    """Those of the files that were edited since this process started."""
    return [name for name in files if not (ROOT / name).is_file() or _read(ROOT / name) != TEXTS[name]]

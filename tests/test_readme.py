"""What the README promises: its links, its numbers, and the lines of code for a model and a task of one's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PUBLISHED = sorted((ROOT / "results").glob("task*"))


def rows(text: str) -> list[dict[str, str]]:
    """The rows of all Markdown tables, by the tables' headings."""
    found, heading = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            heading = None
        elif heading is None:
            heading = cells
        elif not set("".join(cells)) <= set("-: "):
            found.append(dict(zip(heading, cells, strict=True)))
    return found


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "results/README.md", "benchmarks/README.md"])
def test_links_resolve(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert targets or page == "CONTRIBUTING.md"
    for link in targets:
        assert (ROOT / page).parent.joinpath(link).exists(), link
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_readme_shows_the_published_table(folder: Path) -> None:
    published = [row for row in rows((folder / "README.md").read_text(encoding="utf-8")) if "accuracy" in row]
    shown = [row for row in rows(README) if "accuracy" in row]
    for row in published:
        assert {key: value for key, value in row.items() if key in shown[0]} in shown


def test_the_readme_shows_published_verdicts() -> None:
    published = rows((ROOT / "results" / "task3" / "verdicts.md").read_text(encoding="utf-8"))
    shown = re.findall(r"^(\w+) +(\+.*?)  ?(\S+ to \S+) +(.*?) (better|practically.*)\n−(\w+)$", README, re.MULTILINE)
    assert len(shown) == 3
    for model, difference, ends, numbers, verdict, other in shown:
        (row,) = (list(row.values()) for row in published if list(row.values())[:2] == [model, other])
        assert [verdict.strip(), difference.strip(), ends] == row[2:5]
        p, p_holm, same, better = numbers.split()
        assert [p, p_holm, same, better] == [*row[5:7], *row[8:10]]


def test_what_is_published_holds_no_photograph() -> None:
    assert PUBLISHED
    for path in (ROOT / "results").rglob("*"):
        assert path.is_dir() or path.suffix in {".md", ".csv", ".svg", ".png", ".html"}
        assert "most_confused" not in path.name
        if path.suffix in {".md", ".html", ".svg", ".csv"}:
            assert "most_confused" not in path.read_text(encoding="utf-8")


def test_a_model_and_a_task_of_ones_own_in_the_lines_that_it_gives(image_folder: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (model,) = (block for block in blocks if "class TwoLayers" in block)
    (task,) = (block for block in blocks if "TASK =" in block)
    assert max(len(re.findall(r"^.*\S", block, re.MULTILINE)) for block in (model, task)) < 10
    entries = re.findall(r'`("\w+":\s[^`]+)`', README)
    copy = tmp_path / "copy"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.split():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "models" / "twolayers.py").write_text(model)
    (copy / "experiments" / "task4.py").write_text(task)
    places = {"models/__init__.py": ("MODELS", "from models.twolayers import TwoLayers\n"),
              "datasets/__init__.py": ("SOURCES", ""), "tracking/keys.py": ("EXPERIMENTS", "")}  # fmt: skip
    assert len(entries) == len(places)
    for entry, (place, (dictionary, line)) in zip(entries, places.items(), strict=True):
        assert dictionary in README
        source = (copy / place).read_text()
        source = re.sub(rf"^({dictionary}\b.*= {{.*)$", rf"{line}\1\n    {entry},", source, flags=re.MULTILINE)
        (copy / place).write_text(source)
    command = [sys.executable, str(copy / "experiments" / "task4.py"), "--data-dir", str(image_folder)]
    result = subprocess.run(
        [*command, "-m", "twolayers", "-m", "lenet5", "--epochs", "1", "--n-splits", "2"],
        cwd=tmp_path, env=os.environ | {"CACHE_DIR": str(tmp_path / "cache")}, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Rose or tulip?" in result.stdout
    assert re.search(r"^twolayers\W+2/2 ", result.stdout, re.MULTILINE)
    assert "champion" in result.stdout

"""The promises of the README: its links, its numbers, and its example files of a model and a task."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from analysis.statistics import MIN_SPLITS
from tests.conftest import ROOT, copy_checkout, new_store

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    page for pattern in ("*.md", "docs/*.md", "*/README.md", "results/*/README.md") for page in ROOT.glob(pattern)
)
PUBLISHED = sorted((ROOT / "results").glob("task*"))
TUNED = "-tuned"  # ends the name of a folder of tuned runs


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        if "://" not in link:
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("folder", [each for each in PUBLISHED if TUNED not in each.name], ids=lambda each: each.name)
def test_the_readme_shows_the_published_table(folder: Path) -> None:
    published = [row for row in rows((folder / "README.md").read_text(encoding="utf-8")) if "accuracy" in row]
    shown = [row for row in rows(README) if "accuracy" in row]
    for row in published:
        if int(row["splits"].partition("/")[0]) < MIN_SPLITS:  # published before such an interval was refused
            row["95 % interval"] = ""
        assert {key: value for key, value in row.items() if key in shown[0]} in shown


@pytest.mark.parametrize("folder", [each for each in PUBLISHED if TUNED in each.name], ids=lambda each: each.name)
def test_the_page_of_results_shows_what_tuning_changed(folder: Path) -> None:
    task = folder.name.removesuffix(TUNED)
    shown = [row for row in rows((ROOT / "results" / "README.md").read_text(encoding="utf-8")) if task in row]
    for column, of in (("untuned", task), ("tuned", folder.name)):
        page = (ROOT / "results" / of / "README.md").read_text(encoding="utf-8")
        published = {row["model"].rstrip("†"): row["accuracy"] for row in rows(page) if "accuracy" in row}
        found = {row[task]: row[column] for row in shown if column in row}
        assert found == {model: published[model] for model in published if model != "majority"}


def test_the_readme_shows_published_verdicts() -> None:
    published = rows((ROOT / "results" / "task3" / "verdicts.md").read_text(encoding="utf-8"))
    shown = re.findall(r"^(\w+) +(\+.*?)  ?(\S+ to \S+) +(.*?) (better|practically.*)\n−(\w+)$", README, re.MULTILINE)
    assert len(shown) == 2
    for model, difference, ends, numbers, verdict, other in shown:
        (row,) = (list(row.values()) for row in published if list(row.values())[:2] == [model, other])
        assert [verdict.strip(), difference.strip(), ends] == row[2:5]
        p, p_holm, same, better = numbers.split()
        assert [p, p_holm, same, better] == [*row[5:7], *row[8:10]]


def test_what_is_published_holds_no_photograph() -> None:
    assert PUBLISHED
    for path in (ROOT / "results").rglob("*"):
        assert path.is_dir() or path.suffix in {".md", ".csv", ".tex", ".cff", ".svg", ".png", ".pdf", ".html"}
        assert "most_confused" not in path.name
        if path.suffix in {".md", ".html", ".svg", ".csv", ".tex", ".cff"}:
            assert "most_confused" not in path.read_text(encoding="utf-8")


# Each process imports for 5 s; so one process runs all commands, as if each were started by itself
IN_ONE_PROCESS = """
import runpy, shlex, sys
for command in sys.argv[1:]:
    print("$", command, flush=True)
    sys.argv = shlex.split(command)
    try:
        if sys.argv[0] == "-m":
            runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (command, end.code)
"""


@pytest.mark.slow
def test_a_model_and_a_task_are_one_file_each(empty_database: Path, image_folder: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (model,) = (block for block in blocks if "class TwoConvolutions(nn.Module)" in block)
    (task,) = (block for block in blocks if "TASK =" in block)
    assert max(len(re.findall(r"^.*\S", block, re.MULTILINE)) for block in (model, task)) <= 18
    copy = tmp_path / "copy"
    copy_checkout(copy, "*.py", "pyproject.toml")
    for file, block in (("models/twoconvolutions.py", model), ("experiments/task4.py", task)):
        assert f"`{file}`" in README and not (copy / file).exists()
        (copy / file).write_text(block)  # and no other file
    for arguments in (["check"], ["format", "--check"]):  # as `make test` does
        subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=copy, check=True)
    new_store(empty_database, copy / "mlruns")
    image_folder.rename(tmp_path / "flowers")
    commands = [
        "experiments/task4.py -m twoconvolutions -m lenet5 --epochs 1 --n-splits 2 --no-baselines",
        "experiments/task3.py --sample --n-splits 1 --split 0 --epochs 1 -m twoconvolutions --no-baselines",
        "-m analysis table task4",
        "-m datasets info task4",
        "-m experiments verify task4",
        f"-m experiments predict task4 {tmp_path / 'flowers' / 'test' / 'light' / '00.png'}",
        "-m pytest -p no:cacheprovider tests/test_models.py -k of_a_user_fits",
    ]
    result = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS, *commands], cwd=copy, capture_output=True, text=True, timeout=600,
        env=os.environ | {"HOME": str(tmp_path), "CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": "",
                          "MPLCONFIGDIR": matplotlib.get_configdir(), "COLUMNS": "120"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    answers = re.split(r"^\$ .*\n", result.stdout, flags=re.MULTILINE)[1:]
    assert len(answers) == len(commands)
    trained, garments, table, info, verified, predicted, checked = answers
    assert "Rose or tulip?" in trained and "champion" in trained
    assert re.search(r"128x128x3.*dark.*light", trained + info, re.DOTALL)
    assert re.search(r"^twoconvolutions\W+2/2 ", trained, re.MULTILINE)
    assert re.search(r"28x28x1.*^twoconvolutions\W+1/1 ", garments, re.DOTALL | re.MULTILINE)
    assert re.search(r"^twoconvolutions\W+2/2 ", table, re.MULTILINE)
    assert "task4: flowers, 128x128x3" in info
    assert " 0 differences" in verified
    assert re.search(r"00.png +[\d.]+%  (dark|light)", predicted)
    assert "2 passed" in checked

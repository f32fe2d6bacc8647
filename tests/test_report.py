"""The report: what a reader finds in the one file, and that nothing in it needs the network or the program."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import analysis
import tracking
from analysis.__main__ import app
from analysis.report import reproduce, write_report
from tests.conftest import new_store
from tests.test_comparison import log_model
from tracking import keys


class Page(HTMLParser):
    """What a browser would fetch, and the text that it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        assert tag not in ("script", "iframe", "link")
        if "src" in values:
            self.sources.append(values["src"] or "")
        if tag == "a":
            self.links.append(values["href"] or "")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def described_store(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with two networks and a baseline, whose parents have what a real run gives them. It is not changed."""
    tmp_path = tmp_path_factory.mktemp("report")
    store_uri = new_store(empty_database, tmp_path / "store")
    for model, skill in (("lenet5", 0.35), ("vggnet", 0.95), ("linear", 0.6)):
        log_model(store_uri, model, skill, tmp=tmp_path)
    store = tracking.open_store(store_uri)
    for parent, model in analysis.load_runs(["task3"], store_uri)[["parent_id", "model"]].drop_duplicates().to_numpy():
        run = tracking.Run(store, parent)
        run.log_dataset("d", "0" * 64, json.dumps({"images": 30, "classes": 3, "shape": [28, 28, 1]}))
        folder = tmp_path / parent
        folder.mkdir()
        (folder / keys.CLASSES).write_text(json.dumps(["<b>a</b>", "b & c", "개"]), encoding="utf-8")
        (folder / keys.MODEL_CARD).write_text(f"# {model}\n\n1 parameter\n\n`C5x5 <T>`\n\nWhy it is so.\n")
        run.log_files(folder)
    for run_id in analysis.load_runs(["task3"], store_uri)["run_id"]:
        folder = tmp_path / f"t{run_id}"
        folder.mkdir()
        np.savez(folder / keys.THUMBNAILS, index=np.arange(30), pixels=np.zeros((30, 8, 8, 1), np.uint8))
        tracking.Run(store, run_id).log_files(folder)
    return store_uri


@pytest.fixture(scope="module")
def whole_report(described_store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page about all of it, with thumbnails, as the command writes it into a new folder."""
    return page_of(described_store, "--thumbnails", tmp_path_factory.mktemp("whole") / "new")


def page_of(store_uri: str, option: str, folder: Path) -> str:
    arguments = ["report", "task3", option, "--out", str(folder / "report.html"), "--tracking-uri", store_uri]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return (folder / "report.html").read_text(encoding="utf-8")


def test_one_file_holds_everything(described_store: str, whole_report: str) -> None:
    runs = analysis.load_runs(["task3"], described_store)
    source = whole_report
    page = Page(source)
    assert page.open == []  # every element is closed, in order
    assert len(page.sources) == 4 + 2 * 2  # comparisons, then confusion matrix and contact sheet of each network
    assert all(address.startswith("data:image/") for address in page.sources)
    assert not re.search(r"url\(|@import|https?://(?!127\.0\.0\.1)", source)
    assert "<b>a</b>" in page.text and "b & c" in page.text and "개" in page.text  # names are text, not markup
    table = analysis.comparison_table(runs, tracking_uri=described_store)
    for model, row in table.iterrows():
        assert f"{100 * row['mean']:.1f}±{100 * row['sd']:.1f}" in page.text
        assert page.text.count("Why it is so.") == len(table), model
    for run_id, score in runs[["run_id", "test/accuracy"]].to_numpy():
        assert run_id in page.text and str(score) in page.text
        assert any(f"/runs/{run_id}?" in link for link in page.links)
    assert "Which?" in page.text and "30 images, 28×28×1, of 3 classes" in page.text
    assert (
        re.search(r"vggnet (is better than|and lenet5 are) ", page.text)
        and "one estimate over the scores of all single images" in page.text
    )
    assert "lenet5 is not shown to beat linear" in page.text
    assert "0" * 64 in page.text and reproduce(analysis.finished(analysis.choose_group(runs))) in page.text


def test_without_thumbnails_there_is_no_picture_of_the_data(
    described_store: str, whole_report: str, tmp_path: Path
) -> None:
    shown, hidden = Page(whole_report), Page(page_of(described_store, "--no-thumbnails", tmp_path))
    assert set(hidden.sources) < set(shown.sources) and len(hidden.sources) == len(shown.sources) - 2
    mistakes = re.compile(r"\n\w+: the images that were wrong with the most confidence\.")
    assert len(mistakes.findall(shown.text)) == 2 and mistakes.sub("", shown.text) == hidden.text
    assert shown.links == hidden.links


def test_one_model_and_one_split_say_what_can_be_said(described_store: str, tmp_path: Path) -> None:
    runs = analysis.load_runs(["task3"], described_store)
    one = runs[(runs["model"] == "vggnet") & (runs["split"] == 0)]
    evidence = analysis.Evidence(analysis.choose_group(one), described_store)
    write_report(tmp_path / "r.html", [(evidence, "test/accuracy")], tracking.open_store(described_store), 0.01)
    text = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert (
        "A comparison takes two models, one of them a network, so there is none." in text
        and "vggnet has 1 of 4 splits" in text
    )
    assert "1 split is finished, and an interval or a verdict takes 4" in text


def test_the_command_repeats_the_configuration(described_store: str) -> None:
    runs = analysis.load_runs(["task3"], described_store)
    threads = int(runs["threads"].iloc[0])
    assert reproduce(runs).splitlines() == [
        "git checkout 0123",
        "make .venv/ready",
        f"OMP_NUM_THREADS={threads} .venv/bin/python experiments/task3.py -m lenet5 -m vggnet --n-splits 4 --lr 0.001 "
        "--weight-decay 0.01 --batch-size 8 --epochs 2 --patience 7 --no-augment --precision fp32 --device cpu "
        "--seed 0",
    ]
    other = reproduce(runs.assign(seed=pd.NA, train_seed=7, augment=True, device="cuda:1", leak_free=True))
    assert other.endswith(" --augment --precision fp32 --device cuda --split-seed 0 --train-seed 7 --leak-free")
    sample = runs[runs["model"] != "linear"].assign(dataset="sample/X")
    assert reproduce(sample).endswith("--sample --no-baselines")

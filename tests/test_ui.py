"""What `python -m tracking ui` serves, in a browser: the runs as the printed link opens them, and a split's page."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from playwright.sync_api import Locator, Page, expect, sync_playwright

import tracking
from experiments.run import descriptions
from experiments.task1 import TASK as TASK1
from experiments.task2 import TASK as TASK2
from experiments.task3 import TASK
from tests.conftest import ROOT
from tests.servers import free_port
from tracking import keys
from tracking.view import NAME, shared_view

PATIENCE = 120  # seconds for what the UI takes one to do where nothing else runs
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
SETTINGS = "sample, 3 epochs"
# The UI opens a chat beside its first page, once, on every loopback address, and no option of the server prevents it.
SEEN = {"name": "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "value": "true"}


@pytest.fixture(scope="module")
def link(finished_task3: str) -> Iterator[str]:
    """The link that the command prints for a small store."""
    command = [sys.executable, "-m", "tracking", "ui", "--port", str(free_port()), "--tracking-uri", finished_task3]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        printed = process.stdout.readline()  # once the server answers
        assert printed.startswith("task3  http://127.0.0.1:"), printed
        yield printed.split()[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser that reaches nothing but this machine."""
    options = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # which Chromium refuses to root
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser(), args=options)
        yield running
        running.close()


@pytest.fixture
def page(chromium: Any, link: str) -> Iterator[Page]:
    """An empty page of a user who comes for the first time; nothing that it asks for may be elsewhere."""
    origin = link.partition("/#")[0]
    storage = {"cookies": [], "origins": [{"origin": origin, "localStorage": [SEEN]}]}
    with contextlib.closing(
        chromium.new_context(viewport={"width": 1600, "height": 900}, storage_state=storage)
    ) as context:
        context.set_default_timeout(PATIENCE * 1000)
        opened = context.new_page()
        asked: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        yield opened
        assert {address for address in asked if not address.startswith((f"{origin}/", "data:", "blob:"))} == set()


def browser() -> str:
    for name in CHROMIUM:
        if found := shutil.which(name):
            return found
    pytest.skip(f"needs Chromium: none of {', '.join(CHROMIUM)} in PATH (Debian's package chromium)")


def is_shown(what: Locator) -> None:
    expect(what).to_be_visible(timeout=PATIENCE * 1000)


def run(page: Page, name: str) -> Locator:
    return page.get_by_role("link", name=name, exact=True)


def column(page: Page, name: str, key: str) -> str:
    """What a run's row shows in a column."""
    row = page.get_by_role("row").filter(has=run(page, name)).first.get_attribute("row-id")
    return page.locator(f"[row-id='{row}'] [col-id='{key}']").inner_text()


def test_the_printed_link_opens_the_models_and_their_splits(page: Page, link: str) -> None:
    page.goto(link)
    for model in ("lenet5", "linear", "majority"):
        is_shown(run(page, f"{model}, {SETTINGS}"))
    assert run(page, "lenet5 split 0").count() == 0
    is_shown(page.get_by_role("button", name=NAME))  # the view that is open
    headings = page.locator(".ag-header-cell[col-id^='metrics.']")  # those that there is room for, in any order
    first = headings.and_(page.locator(f"[col-id*='`{keys.METRIC_COLUMNS[0]}`']"))
    expect(first).to_have_attribute("aria-colindex", "4", timeout=PATIENCE * 1000)  # checkbox, name and time before it
    in_order = "cells => cells.sort((a, b) => a.ariaColIndex - b.ariaColIndex).map(cell => cell.innerText)"
    texts = headings.evaluate_all(in_order)
    columns = [key for key in keys.METRIC_COLUMNS if not key.startswith(("low/", "high/"))]  # too few splits for these
    assert len(texts) >= 6 and texts == columns[: len(texts)]
    assert 0.3 < float(column(page, f"linear, {SETTINGS}", "metrics.`mean/test/accuracy`")) < 1
    page.get_by_role("row").filter(has=run(page, f"lenet5, {SETTINGS}")).get_by_role("button").click()
    for split in (0, 1):
        is_shown(run(page, f"lenet5 split {split}"))
        assert column(page, f"lenet5 split {split}", "metrics.`mean/test/accuracy`") == "-"
        assert column(page, f"lenet5 split {split}", "metrics.`test/accuracy`") != "-"


def test_the_description_explains_the_experiment(page: Page, link: str) -> None:
    page.goto(link)
    is_shown(page.get_by_text("Each row is a model under one configuration"))
    page.get_by_test_id("experiment-metadata-editor-edit-button").locator("xpath=following-sibling::button").click()
    for text in ("all images are divided anew, 10 times", "the honest score", "python -m analysis compare task3"):
        is_shown(page.get_by_text(text))


def test_a_split_has_its_curves_and_files(page: Page, link: str) -> None:
    page.goto(link)
    page.get_by_role("row").filter(has=run(page, f"lenet5, {SETTINGS}")).get_by_role("button").click()
    run(page, "lenet5 split 0").click()
    is_shown(page.get_by_role("heading", name="lenet5 split 0"))
    is_shown(page.get_by_role("link", name=f"lenet5, {SETTINGS}"))  # its parent
    is_shown(page.get_by_role("link", name="best_val/accuracy"))
    page.get_by_role("tab", name="Model metrics").click()
    page.get_by_placeholder("Search metric charts").fill("^train|^val")  # as the description says
    curve = page.locator(".scatterlayer .lines .js-line").first
    expect(curve).to_have_attribute("d", re.compile("M.*L.*L"), timeout=PATIENCE * 1000)  # through three points
    page.get_by_role("tab", name="Artifacts").click()
    for file in (keys.CONFUSION_FIGURE, keys.PREDICTIONS, keys.SPLIT, keys.HISTORY):
        is_shown(page.get_by_text(file, exact=True))
    page.get_by_text("checkpoint", exact=True).click()
    is_shown(page.get_by_text("best.pt", exact=True))
    page.get_by_text(keys.CONFUSION_FIGURE, exact=True).click()
    is_shown(page.get_by_role("img", name=keys.CONFUSION_FIGURE))
    page.wait_for_function(f"document.querySelector('img[alt=\"{keys.CONFUSION_FIGURE}\"]').naturalWidth > 100")


@pytest.mark.slow
def test_nothing_is_told_about_the_user(link: str) -> None:
    with urlopen(f"{link.partition('/#')[0]}/ajax-api/3.0/mlflow/ui-telemetry") as answer:
        assert json.load(answer)["disable_ui_telemetry"] is True


def params(**changed: object) -> dict[str, Any]:
    training = dataclasses.asdict(TASK.training) | {"device": "cpu", "precision": "bf16"}
    return {**training, "model": "lenet5", "dataset": "FashionMNIST", "n_splits": 10, "leak_free": False, **changed}


@pytest.mark.parametrize(("changed", "name"), [
    ({}, "lenet5"),
    ({"n_splits": 1, "epochs": 1}, "lenet5, 1 epoch"),
    ({"device": "cuda:1", "precision": "fp32", "threads": 3}, "lenet5"),
    ({"dataset": "sample/FashionMNIST", "n_splits": 2, "batch_size": 32, "epochs": 12},
     "lenet5, sample, 12 epochs, batch size 32"),
    ({"dataset": "my photos", "augment": True, "lr": 3e-3, "seed": 1, "leak_free": True},
     "lenet5, my photos, lr 0.003, augmented, seed 1, leak-free"),
    ({"split_seed": 1, "train_seed": 2}, "lenet5, split seed 1, train seed 2"),
])  # fmt: skip
def test_a_parent_is_called_by_what_is_unusual(changed: dict[str, Any], name: str) -> None:
    assert descriptions.parent_name(TASK, params(**changed)) == name


@pytest.mark.parametrize("task", [TASK1, TASK2, TASK], ids=lambda task: task.name)
def test_a_description_fits_its_task(task: Any) -> None:
    text = descriptions.description(task)
    first = text.partition("\n")[0]
    assert task.question in first and "parent" in first and "child" in first  # what is seen while it is folded up
    assert ("published test folder" in text) == (task.name != "task3")
    assert task.protocol.name in text.lower() and str(task.protocol.n_splits) in text
    assert all(f"`{key}`" in text for key in keys.METRIC_COLUMNS[:8]) and len(text) < 5000
    assert f"python -m analysis compare {task.name}" in text


def test_every_column_is_a_key() -> None:
    assert set(keys.METRIC_COLUMNS) <= set(keys.SUMMARY_METRICS) | set(keys.FINAL_METRICS)
    assert set(keys.PARAM_COLUMNS) <= set(keys.PARAMS)
    assert len(shared_view()) < 20_000  # the most that MLflow takes


def test_a_description_of_the_users_own_stays(store_uri: str) -> None:
    store = tracking.open_store(store_uri)
    experiment = store.make_experiment("task3")
    plain = store.runs_link("task3")
    assert plain.endswith(f"/#/experiments/{experiment}/runs?workflowType=machine_learning")
    descriptions.describe_experiment(store, TASK)
    tags = store.client.get_experiment(experiment).tags
    assert tags[keys.NOTE] == descriptions.description(TASK)
    assert store.runs_link("task3") == f"{plain}&viewStateShareKey={keys.VIEW}"
    for own in ("mine", ""):  # or none at all
        store.client.set_experiment_tag(experiment, keys.NOTE, own)
        descriptions.describe_experiment(store, TASK)
        assert store.client.get_experiment(experiment).tags[keys.NOTE] == own


def test_a_store_that_refuses_a_description_does_without(store_uri: str, monkeypatch, capsys) -> None:
    store = tracking.open_store(store_uri)

    def refuse(*_: object) -> None:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    monkeypatch.setattr(store.client, "set_experiment_tag", refuse)
    descriptions.describe_experiment(store, TASK)
    assert capsys.readouterr().err == (
        "the experiment in the UI gets no description (Permission denied); the runs do without\n"
    )
    assert "viewStateShareKey" not in store.runs_link("task3")

"""`compare --by`: groups of runs that differ in one setting, as paired tests for each model."""

import json
from pathlib import Path

import pandas as pd
import pytest

import analysis
from analysis.by_setting import setting_table
from analysis.comparison import compare
from analysis.evidence import Evidence
from analysis.groups import ComparisonError
from tests.conftest import new_store
from tests.test_comparison import log_model

RATES = {1e-3: 0.6, 3e-3: 0.9, 1e-2: 0.75}


@pytest.fixture(scope="module")
def store(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a store with lenet5 under three learning rates, vggnet and a baseline under two; four splits."""
    folder = tmp_path_factory.mktemp("by_setting")
    uri = new_store(empty_database, folder / "store")
    for lr, skill in RATES.items():
        for model in ("lenet5", "vggnet", "linear")[: 1 if lr == 1e-2 else 3]:
            log_model(uri, model, skill, tmp=folder, lr=lr)
    return uri


def test_each_pair_of_values_of_each_network_is_tested_on_the_same_splits(store: str) -> None:
    table = setting_table("task3", "lr", "test/accuracy", 0.01, tracking_uri=store)
    data = table.data.set_index(["model_a", "model_b"])
    assert list(data.index) == [
        ("lenet5 lr=0.003", "lenet5 lr=0.001"), ("lenet5 lr=0.01", "lenet5 lr=0.001"),
        ("lenet5 lr=0.01", "lenet5 lr=0.003"), ("vggnet lr=0.003", "vggnet lr=0.001"),
    ]  # fmt: skip
    runs = analysis.load_runs(["task3"], store)
    scores = runs.pivot_table(index="split", columns=["model", "lr"], values="test/accuracy")
    row = data.loc[("lenet5 lr=0.003", "lenet5 lr=0.001")]
    assert row["difference"] == pytest.approx((scores["lenet5", 3e-3] - scores["lenet5", 1e-3]).mean())
    said = " ".join(table.notes)
    assert data["n"].eq(4).all() and "pairs of values of lr (4)" in said and "the same for all models" not in said
    # the same numbers as of two models with these runs
    two = runs[(runs["model"] == "lenet5") & runs["lr"].isin([1e-3, 3e-3])]
    names = two["lr"].map({1e-3: "a", 3e-3: "b"})
    (other,) = compare(Evidence(two.assign(model=names), store), "test/accuracy", pairs=[("f", "b", "a")]).to_dict(
        "records"
    )
    for key in ("difference", "se", "low", "high", "p"):
        assert row[key] == pytest.approx(other[key], nan_ok=True)
    assert row["p_holm"] >= row["p"]


def test_fresh_weights_are_pretrained_on_nothing(empty_database: Path, tmp_path: Path) -> None:
    uri = new_store(empty_database, tmp_path / "store")
    for pretrained in ("", "file 0123456789ab"):
        log_model(uri, "lenet5", 0.7, tmp=tmp_path, pretrained=pretrained)
    (row,) = setting_table("task3", "pretrained", "test/accuracy", 0.01, tracking_uri=uri).data.to_dict("records")
    assert {row["model_a"], row["model_b"]} == {"lenet5 pretrained=nothing", "lenet5 pretrained=file 0123456789ab"}


def test_the_command_prints_a_table_and_refuses_in_a_sentence(store: str, run_here) -> None:
    arguments = ("-m", "analysis", "compare", "task3", "--tracking-uri", store, "--by")
    shown = run_here(*arguments, "lr", "--format", "json")
    (table,) = json.loads(shown.stdout)
    assert shown.returncode == 0 and [row["field"] for row in table["rows"]] == ["lr"] * 4
    unknown = run_here(*arguments, "learning_rate")
    assert unknown.returncode == 2 and "'learning_rate' is not one of protocol," in unknown.stderr
    none = run_here(*arguments, "augment")
    assert none.returncode == 1
    assert none.stderr.startswith("Error: no runs differ from any other in augment only (values of augment in the ")


def test_other_training_images_are_compared_where_the_scored_ones_are_the_same(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = analysis.load_runs(["task3"], store)
    runs = runs[(runs["model"] == "lenet5") & (runs["lr"] < 1e-2)]
    leak_free = runs["lr"] == 3e-3
    hashes = runs["split_hash"].where(~leak_free, runs["split_hash"] + "x")
    stored = runs.assign(lr=1e-3, leak_free=pd.array(leak_free, "boolean"), split_hash=hashes)
    monkeypatch.setattr("analysis.by_setting.load_runs", lambda tasks, uri: stored)
    table = setting_table("task3", "leak_free", None, 0.01, tracking_uri=store)
    (row,) = table.data.to_dict("records")
    assert (row["metric"], row["problem"]) == ("test/accuracy", "")  # one test part for all splits
    means = runs.groupby("lr")["test/accuracy"].mean()
    assert row["difference"] == pytest.approx(means[3e-3] - means[1e-3])
    assert "The splits do not hold the same images" in table.notes[0]


def test_tuned_runs_are_compared_with_what_tuning_started_from(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = analysis.load_runs(["task3"], store)
    runs = runs[runs["model"] == "lenet5"]
    was_tuned = runs["lr"] == 1e-2
    tuned = runs[was_tuned].assign(tune=8, space="lr=0.0001..0.01 from lr=0.003", halving=True)
    stored = pd.concat([runs[~was_tuned], tuned.astype(runs.dtypes)], ignore_index=True)
    monkeypatch.setattr("analysis.by_setting.load_runs", lambda tasks, uri: stored)
    table = setting_table("task3", "tune", "test/accuracy", 0.01, tracking_uri=store)
    (row,) = table.data.to_dict("records")
    assert (row["model_a"], row["model_b"]) == ("lenet5 tune=8", "lenet5 tune=none")
    means = runs.groupby("lr")["test/accuracy"].mean()
    assert row["difference"] == pytest.approx(means[1e-2] - means[3e-3])
    with pytest.raises(ComparisonError, match="in halving only"):
        setting_table("task3", "halving", None, 0.01, tracking_uri=store)


def test_values_that_six_digits_do_not_tell_apart_have_names_that_do(store: str, monkeypatch) -> None:
    runs = analysis.load_runs(["task3"], store)
    runs = runs[(runs["model"] == "lenet5") & (runs["lr"] < 1e-2)]
    stored = runs.assign(lr=runs["lr"].where(runs["lr"] < 3e-3, 0.001_000_000_1))
    monkeypatch.setattr("analysis.by_setting.load_runs", lambda tasks, uri: stored)
    (row,) = setting_table("task3", "lr", "test/accuracy", 0.01, tracking_uri=store).data.to_dict("records")
    assert {row["model_a"], row["model_b"]} == {"lenet5 lr=0.001", "lenet5 lr=0.0010000001"}
    assert abs(row["difference"]) > 0

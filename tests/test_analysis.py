"""Tables over comparison groups, and figures whose text needs other fonts."""

import io
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import analysis
from analysis.plots import _installed_fonts
from analysis.tables import what_is_wrong

BASE = {
    "status": "FINISHED", "task": "task3", "dataset": "FashionMNIST", "dataset_digest": "d", "protocol": "p",
    "n_splits": 2, "leak_free": False, "seed": 0, "lr": 1e-3, "weight_decay": 0.01, "batch_size": 8, "epochs": 2,
    "patience": 7, "augment": False, "precision": "fp32", "device": "cpu", "source_digest": "s", "split_hash": "h",
    "parameters": 10, "macs": 20, "best_epoch": 1, "epochs_run": 2, "train_seconds": 3.0,
}  # fmt: skip


def make_runs(*rows: dict[str, object]) -> pd.DataFrame:
    keys = [
        f"{part}/{score}"
        for part in ("best_val", "last_val", "test")
        for score in ("accuracy", "f1_micro", "f1_macro", "loss")
    ]
    times = pd.date_range("2026-01-01", periods=len(rows), freq="h")
    full = [BASE | dict.fromkeys(keys, np.nan) | {"split_hash": f"h{row['split']}"} | row for row in rows]
    return pd.DataFrame(full).assign(start_time=times, run_id=[str(i) for i in range(len(rows))])


def run(model: str, split: int, accuracy: float, **other: object) -> dict[str, object]:
    return {"model": model, "split": split, "test/accuracy": accuracy, **other}


def test_mean_and_sd_over_splits_best_first() -> None:
    runs = make_runs(run("a", 0, 0.5), run("a", 1, 0.7), run("b", 0, 0.8), run("b", 1, 0.9))
    table = analysis.comparison_table(runs)
    assert table.index.tolist() == ["b", "a"]
    assert table["mean"].tolist() == pytest.approx([0.85, 0.6])
    assert table["sd"].tolist() == pytest.approx([np.std([0.8, 0.9], ddof=1), np.std([0.5, 0.7], ddof=1)])
    assert table[["n", "n_expected", "parameters", "macs"]].to_numpy().tolist() == [[2, 2, 10, 20]] * 2
    assert what_is_wrong(runs) == []


def test_repeated_and_unfinished_runs_are_not_averaged_in_silence() -> None:
    runs = make_runs(
        run("a", 0, 0.1), run("a", 1, 0.7), run("b", 0, 0.8, status="FAILED"), run("b", 1, 0.9), run("a", 0, 0.5)
    )
    table = analysis.comparison_table(runs)
    assert table.loc["a", "mean"] == pytest.approx(0.6)
    assert table.loc["a", "n"] == 2 and table.loc["b", "n"] == 1
    assert np.isnan(table.loc["b", "sd"])
    assert what_is_wrong(runs) == ["b has 1 of 2 splits; missing: 0."]


@pytest.mark.parametrize(
    "key", ["dataset_digest", "protocol", "n_splits", "seed", "lr", "precision", "epochs", "augment"]
)
def test_groups_never_mix(key: str) -> None:
    other = {"n_splits": 3, "seed": 1, "lr": 1.0, "epochs": 9, "augment": True}.get(key, "other")
    runs = make_runs(run("a", 0, 0.1), run("a", 0, 0.9, **{key: other}), run("b", 0, 0.2))
    groups = analysis.comparison_groups(runs)
    assert [group["model"].tolist() for group in groups] == [["a", "b"], ["a"]]
    assert analysis.comparison_table(runs)["mean"].to_dict() == {"a": 0.1, "b": 0.2}


def test_the_number_of_a_gpu_is_no_group_of_its_own() -> None:
    runs = make_runs(run("a", 0, 0.1, device="cuda:0"), run("b", 0, 0.2, device="cuda:1"))
    assert len(analysis.comparison_groups(runs)) == 1


def test_what_a_reader_must_know_is_said() -> None:
    def notes(*rows: dict[str, object]) -> str:
        return " ".join(what_is_wrong(make_runs(*rows).assign(n_splits=1)))

    assert notes(run("a", 0, 0.5), run("b", 0, 0.6)) == ""
    assert "generated images" in notes(run("a", 0, 0.5, dataset="sample/X"))
    assert notes(run("a", 0, 0.5, dataset="my-sample")) == ""
    assert "split 0; they cannot be compared" in notes(run("a", 0, 0.5), run("b", 0, 0.5, split_hash="other"))
    # models have code of their own; what all share must be the same
    assert notes(run("a", 0, 0.5, source_digest="s-a"), run("b", 0, 0.5, source_digest="s-b")) == ""
    assert "version of the code" in notes(run("a", 0, 0.5, source_digest="s-a"), run("b", 0, 0.5, source_digest="t-b"))
    two = (run("a", 0, 0.5, source_digest="s-a"), run("a", 1, 0.5, source_digest="s-b"))
    assert "version of the code" in notes(*two)


def test_an_unfinished_group_does_not_hide_a_finished_one() -> None:
    runs = make_runs(run("a", 0, 0.5), run("a", 0, 0.1, lr=1.0, status="KILLED"))
    assert analysis.comparison_table(runs)["mean"].tolist() == [0.5]


def test_missing_values_are_not_dropped() -> None:
    table = analysis.comparison_table(make_runs(run("a", 0, 0.5), run("a", 1, np.nan)))
    assert table["mean"].isna().all()


def test_nothing_to_show_is_said() -> None:
    with pytest.raises(ValueError, match="no split"):
        analysis.comparison_table(make_runs(run("a", 0, 0.1, status="RUNNING")))
    with pytest.raises(ValueError, match="unknown metric 'test/acc'"):
        analysis.comparison_table(make_runs(run("a", 0, 0.1)), "test/acc")
    with pytest.raises(ValueError, match="has test/f1_macro"):
        analysis.comparison_table(make_runs(run("a", 0, 0.1)), "test/f1_macro")


def test_confusion_figure_is_drawn(tmp_path: Path) -> None:
    figure = analysis.confusion_figure(np.array([[5, 1], [0, 7]]), ["cat", "dog"], "title")
    figure.savefig(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 200
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["5", "1", "0", "7"]


def test_confusion_figure_takes_any_class_name_and_many_classes(tmp_path: Path) -> None:
    analysis.confusion_figure(np.eye(2, dtype=int), ["a$\\b$c", "$_$"], "$").savefig(tmp_path / "a.png")
    analysis.confusion_figure(np.eye(300, dtype=int), [f"class {i}" for i in range(300)], "many").savefig(
        tmp_path / "b.png"
    )
    assert max(Image.open(tmp_path / "b.png").size) <= 1200


def test_plain_text_needs_no_other_font() -> None:
    assert analysis.font_families(["cats", "dogs", "Ankle boot", "café"]) == ["DejaVu Sans"]


@pytest.mark.skipif(
    not any(family.startswith(("Nanum", "Noto Sans CJK", "Noto Sans KR")) for family, _ in _installed_fonts()),
    reason="no Korean font is installed",
)
def test_korean_class_names_are_drawn() -> None:
    assert len(analysis.font_families(["고양이"])) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that no font has
        drawn = []
        for names in (["고양이", "강아지"], ["강아지", "고양이"]):
            figure = analysis.confusion_figure(np.eye(2, dtype=int), names, "한글")
            figure.savefig(buffer := io.BytesIO())
            drawn.append(buffer.getvalue())
    assert drawn[0] != drawn[1]  # boxes would look alike

"""The settings of a training: ranges, and which of them divide runs into comparison groups."""

import dataclasses
import json
import math
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tracking import keys
from tracking.settings import (
    COMPARED,
    LARGEST_SEED,
    MEANINGS,
    SettingError,
    TrainingConfig,
    compared,
    not_compared,
    require_declarations,
)

FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}
AFTER_FIELDS = "    def __post_init__"  # in the source of TrainingConfig

ALLOWED = {
    "lr": (5e-324, 1e-3, 1e30),
    "weight_decay": (0, 0.01, 10.0),
    "batch_size": (2, 10**6),
    "epochs": (1, 10**6),
    "patience": (1, 10**6),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "split_seed": (0, LARGEST_SEED),
    "train_seed": (0, LARGEST_SEED),
}
REFUSED = {
    "lr": (0, 0.0, -1e-3, math.nan, math.inf, -math.inf),
    "weight_decay": (-5e-324, -1, math.nan, math.inf),
    "batch_size": (1, 0, -2, math.nan, math.inf),
    "epochs": (0, -1, math.inf),
    "patience": (0, -1, math.nan),
    "precision": ("fp8", "", "FP32"),
    "split_seed": (-1, LARGEST_SEED + 1),
    "train_seed": (-1, LARGEST_SEED + 1),
}
UNLIMITED = {"augment", "freeze", "cudnn_benchmark", "device", "pretrained"}  # flags, and names that others judge


def test_every_setting_says_whether_it_decides_comparability() -> None:
    assert {name: field.metadata.get("compared") for name, field in FIELDS.items()} == {
        **dict.fromkeys(("lr", "weight_decay", "batch_size", "epochs", "patience", "augment", "precision"), True),
        **{"device": False, "split_seed": True, "train_seed": True, "pretrained": True, "freeze": True},
        "cudnn_benchmark": True,
    }
    assert set(COMPARED) == FIELDS.keys() - {"device"}
    assert set(COMPARED) <= set(keys.GROUP_PARAMS) and "device" not in keys.GROUP_PARAMS
    assert MEANINGS.keys() == FIELDS.keys() <= keys.PARAMS.keys()
    assert all(len(meaning) > 10 for meaning in MEANINGS.values())


def test_a_field_that_does_not_say_is_refused_by_name() -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        lr: float = compared(0.1, "learning rate")
        note: str = not_compared("", "a remark")
        dropout: float = 0.0

    with pytest.raises(TypeError, match=r"^Settings\.dropout does not say whether it makes runs comparable; declare"):
        require_declarations(Settings)


@pytest.mark.parametrize("declaration", ["0.0", "dataclasses.field(default=0.0)"])
def test_the_module_with_such_a_field_cannot_be_imported(declaration: str, tmp_path: Path) -> None:
    copy = tmp_path / "settings.py"
    source = (ROOT / "tracking" / "settings.py").read_text(encoding="utf-8")
    copy.write_text(source, encoding="utf-8")
    assert runpy.run_path(str(copy))["COMPARED"] == COMPARED
    assert source.count(AFTER_FIELDS) == 1
    added = source.replace(AFTER_FIELDS, f"    dropout: float = {declaration}\n\n{AFTER_FIELDS}")
    copy.write_text(added, encoding="utf-8")
    with pytest.raises(TypeError, match=r"TrainingConfig\.dropout does not say"):
        runpy.run_path(str(copy))


def test_values_out_of_range_name_their_option() -> None:
    assert ALLOWED.keys() == REFUSED.keys() == FIELDS.keys() - UNLIMITED
    for name, values in ALLOWED.items():
        for value in values:
            assert getattr(TrainingConfig(**{name: value}), name) == value
    for name, values in REFUSED.items():
        option = f"--{name.replace('_', '-')}"
        for value in values:
            with pytest.raises(SettingError) as error:
                TrainingConfig(**{name: value})
            assert error.value.option == option and str(error.value) == f"{option}: {error.value.reason}"
            assert str(value) in str(error.value) or repr(value) in str(error.value)
            assert "\n" not in str(error.value)
            with pytest.raises(SettingError, match=f"^{option}: "):
                dataclasses.replace(TrainingConfig(), **{name: value})


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"lr": 0}, "--lr: 0 is not above 0"),
    ({"lr": math.inf}, "--lr: inf is not a finite number"),
    ({"batch_size": 1}, "--batch-size: 1 is not in the range x>=2"),
    ({"train_seed": 2**32}, "--train-seed: 4294967296 is not in the range 0<=x<=4294967295"),
    ({"precision": "fp8"}, "--precision: 'fp8' is not one of auto, fp32, bf16, fp16"),
])  # fmt: skip
def test_the_sentence_says_what_is_allowed(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingError) as error:
        TrainingConfig(**settings)
    assert str(error.value) == sentence


def test_a_setting_error_travels_between_processes() -> None:
    with pytest.raises(SettingError) as raised:
        TrainingConfig(batch_size=1)
    again = pickle.loads(pickle.dumps(raised.value))  # noqa: S301 - its own
    assert type(again) is SettingError and isinstance(again, ValueError)
    assert (again.option, again.reason, str(again)) == (raised.value.option, raised.value.reason, str(raised.value))


# Two trainings for each value of a setting that has been added, through the whole chain: SQLite, claim, groups.
TRAIN_AND_GROUP = """
import json, sys
import analysis, tracking
from tracking import keys, runs
uri, added = sys.argv[1:]
store = tracking.open_store(uri)
ids = {}
for value in (0.0, 0.5):
    config = vars(tracking.TrainingConfig(device="cpu", **{added: value}))
    params = {"model": "lenet5", "dataset": "d", "protocol": "p", "n_splits": 1, "leak_free": False, **config}
    tags = {"task": "task3", "dataset_digest": "0" * 64, "fingerprint": f"{added} {value}"}
    with tracking.parent_run(store, "task3", "lenet5", params, tags) as parent:
        own = tags | {"fingerprint": tags["fingerprint"] + " 0"}
        claimed = tracking.claim(parent, "split 0", params | {"split": 0, "n_train": 2, "n_val": 2}, own)
        with tracking.child_run(store, claimed) as run:
            run.log_metrics({"test/accuracy": value})
        ids[run.id] = value
loaded = analysis.load_runs(["task3"], uri)
groups = [sorted(map(ids.get, group["run_id"])) for group in analysis.comparison_groups(loaded)]
marks = [store.client.get_run(run_id).data.tags.get("superseded_by") for run_id in ids]
columns = loaded[added].tolist() if added in loaded else None
print(json.dumps([sorted(groups), [ids.get(mark) for mark in marks], columns, added in keys.GROUP_PARAMS]))
"""


@pytest.mark.parametrize(("declaration", "groups", "superseded_by"), [
    ("compared", [[0.0], [0.5]], [None, None]),
    ("not_compared", [[0.0, 0.5]], [0.5, None]),
])  # fmt: skip
def test_a_setting_that_is_added_divides_groups_as_it_is_declared(
    declaration: str, groups: list[list[float]], superseded_by: list[float | None], store_uri: str, tmp_path: Path
) -> None:
    for package in ("tracking", "analysis"):
        shutil.copytree(ROOT / package, tmp_path / "tree" / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "tree" / "tracking" / "settings.py"
    line = f'    dropout: float = {declaration}(0.0, "share of activations set to zero")\n\n'
    path.write_text(path.read_text(encoding="utf-8").replace(AFTER_FIELDS, line + AFTER_FIELDS), encoding="utf-8")
    command = [sys.executable, "-c", TRAIN_AND_GROUP, store_uri, "dropout"]
    result = subprocess.run(command, cwd=tmp_path / "tree", capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    expected = [groups, superseded_by, [0.0, 0.5], declaration == "compared"]
    assert json.loads(result.stdout) == expected

"""Digests of source: they follow each change that decides a result, to the models that it concerns, and no other."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import models
from experiments.provenance import definitions, fingerprint
from experiments.provenance.sources import TEXTS

Texts = dict[str, str]
Edit = Callable[[Texts], None]
TRAINING = "experiments/training"
NAMES = (*models.MODELS, *models.BASELINES)
OF_ALL = """
import json, sys
sys.path.insert(0, ".")
import models
from experiments.provenance import fingerprint
names = [name for name in (*models.MODELS, *models.BASELINES) if name != "mine"]
print(json.dumps({name: fingerprint.source_of(models.build(name, 3, 2, 64)).digest for name in names}))
"""


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Module]:
    return {name: models.build(name, 3, 2, 64) for name in NAMES}


@pytest.fixture(scope="module")
def before(built: dict[str, nn.Module]) -> dict[str, str]:
    """The digest of each model's source as it is."""
    return {name: fingerprint.source_of(model).digest for name, model in built.items()}


def forget() -> None:
    for cached in (definitions._file, definitions._module, definitions._text, definitions._uses, fingerprint._shared):
        cached.cache_clear()


def digests(edit: Edit, built: dict[str, nn.Module]) -> dict[str, str]:
    """The digests with edited source."""
    texts = dict(TEXTS)
    edit(texts)
    assert texts != TEXTS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(definitions, "TEXTS", texts)
        forget()
        try:
            return {name: fingerprint.source_of(model).digest for name, model in built.items()}
        finally:
            forget()


def changed(edit: Edit, built: dict[str, nn.Module], before: dict[str, str]) -> set[str]:
    """Names of the models whose digest an edit changes."""
    after = digests(edit, built)
    return {name for name in before if after[name] != before[name]}


def replaced(path: str, old: str, new: str) -> Edit:
    def edit(texts: Texts) -> None:
        assert old in texts[path], f"{path} has no {old!r} any more: name another place to edit"
        texts[path] = texts[path].replace(old, new, 1)

    return edit


def renamed(old: str, new: str) -> Edit:
    """Rename a file, and its module wherever it is imported."""

    def edit(texts: Texts) -> None:
        module, to = (path.removesuffix(".py").replace("/", ".") for path in (old, new))
        package, _, name = module.rpartition(".")
        from_package = re.compile(rf"^(from {re.escape(package)} import .*)\b{name}\b", re.MULTILINE)
        texts[new] = texts.pop(old)
        for path, text in texts.items():
            texts[path] = from_package.sub(rf"\1{to.rpartition('.')[2]} as {name}", text).replace(module, to)

    return edit


def moved_function(name: str, old: str, new: str) -> Edit:
    """Move a function to a new file, which its old one imports."""

    def edit(texts: Texts) -> None:
        tree = ast.parse(texts[old])
        lines = texts[old].splitlines(keepends=True)
        [node] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        head = "".join("".join(lines[each.lineno - 1 : each.end_lineno]) for each in imports)
        texts[new] = head + "\n\n" + "".join(lines[node.lineno - 1 : node.end_lineno])
        del lines[node.lineno - 1 : node.end_lineno]
        lines.insert(imports[-1].end_lineno, f"from {new.removesuffix('.py').replace('/', '.')} import {name}\n")
        texts[old] = "".join(lines)

    return edit


def added(path: str, text: str) -> Edit:
    def edit(texts: Texts) -> None:
        texts[path] = texts.get(path, "") + text

    return edit


NEW_MODEL = """
from torch import nn

from models.registry import register


@register
class Mine(nn.Sequential):
    def __init__(self, in_channels, num_classes, image_size):
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))
"""
FIT = f"{TRAINING}/fit.py"
NEUTRAL: dict[str, Edit] = {
    "a comment": replaced(FIT, "    while not state.is_done and", "    # again\n    while not state.is_done and"),
    "a docstring of a function": replaced(FIT, '"""Train a model on a split', '"""Fit a model on a split'),
    "a docstring of a class": replaced("models/lenet.py", '"""LeNet-5 (LeCun', '"""The first one (LeCun'),
    "a docstring of a module": replaced("models/layers.py", '"""', '"""Layers. '),
    "an annotation of an argument": replaced(FIT, "    state: TrainingState,", "    state: object,"),
    "an annotation of a result": replaced(FIT, "-> Iterator[EpochRecord]", "-> object"),
    "an annotation of a field": replaced(FIT, "    train_loss: float", "    train_loss: object"),
    "another annotation of a variable": replaced("models/vgg.py", "layers: list[nn.Module]", "layers: object"),
    "an annotation of a variable": replaced(FIT, "    config = state.config", "    config: object = state.config"),
    "no annotation of a variable": replaced("models/vgg.py", "layers: list[nn.Module] =", "layers ="),
    "a new model": added("models/mine.py", NEW_MODEL),
    "a new function beside a layer": added("models/layers.py", "\n\ndef unused():\n    return 1\n"),
    "an unrelated function": replaced(f"{TRAINING}/hardware.py", '"CPU"', '"a CPU"'),
    "an unrelated module": replaced("experiments/run/conclude.py", "return", "print()\n        return"),
    "a moved function": moved_function("plan_epoch", f"{TRAINING}/images.py", f"{TRAINING}/plans.py"),
}
RENAMED = (renamed("models/lenet.py", "models/first.py"), renamed(f"{TRAINING}/state.py", f"{TRAINING}/updates.py"))
ANNOTATED = ("another annotation of a variable", "an annotation of a variable", "no annotation of a variable")


@pytest.mark.parametrize("name", ANNOTATED)
def test_an_annotation_of_a_variable_changes_nothing(
    name: str, built: dict[str, nn.Module], before: dict[str, str]
) -> None:
    assert changed(NEUTRAL[name], built, before) == set()


def test_a_tree_with_other_names_comments_and_places_has_the_same_digests(
    built: dict[str, nn.Module], before: dict[str, str], tmp_path: Path
) -> None:
    """All neutral edits at once, but for those above, in a process that imports the edited tree."""
    edits = {name: edit for name, edit in NEUTRAL.items() if name not in ANNOTATED}
    texts = dict(TEXTS)
    for edit in (*edits.values(), *RENAMED):
        edit(texts)
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    result = subprocess.run([sys.executable, "-c", OF_ALL], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    if (found := json.loads(result.stdout)) != before:
        guilty = [name for name, edit in edits.items() if changed(edit, built, before)]
        assert found == before, guilty or "renaming a file"


OF_EFFICIENTNET = {"efficientnet_lite", "efficientnet_b0"}
WITH_BATCH_NORM = {"vggnet", "resnetcnn", "seresnet", "efficientnet_lite", "efficientnet_b0"}


@pytest.mark.parametrize(("path", "old", "new", "of"), [
    ("models/lenet.py", "nn.AvgPool2d(2)", "nn.MaxPool2d(2)", {"lenet5"}),
    ("models/lenet.py", "nn.Tanh(),", "nn.ReLU(),", {"lenet5"}),
    ("models/vgg.py", "min(2 * width, 128)", "min(2 * width, 64)", {"vggnet"}),
    ("models/efficientnet.py", "class MBConv(nn.Module):", "class MBConv(nn.Module):\n    own = 1", OF_EFFICIENTNET),
    ("models/baselines.py", "LINEAR_SIZE = 32", "LINEAR_SIZE = 16", {"linear"}),
    ("models/baselines.py", "torch.zeros(num_classes)", "torch.ones(num_classes)", {"majority"}),
    ("models/layers.py", "BATCH_NORM_MOMENTUM = 0.3", "BATCH_NORM_MOMENTUM = 0.1", WITH_BATCH_NORM),
    ("models/layers.py", "return x.mean((2, 3))\n", "return x.amax((2, 3))\n", WITH_BATCH_NORM),
    (f"{TRAINING}/baselines.py", "PENALTIES = (1e4, ", "PENALTIES = (1e5, ", set(models.BASELINES)),
    (f"{TRAINING}/baselines.py", "warm_start=True", "warm_start=False", set(models.BASELINES)),
])  # fmt: skip
def test_what_some_models_use_changes_theirs_alone(
    path: str, old: str, new: str, of: set[str], built: dict[str, nn.Module], before: dict[str, str]
) -> None:
    assert changed(replaced(path, old, new), built, before) == of


@pytest.mark.parametrize(("path", "old", "new"), [
    (FIT, "        state.schedule.step()\n", ""),
    (FIT, "        totals += state.gradients(x, y)\n", "        totals -= state.gradients(x, y)\n"),
    (f"{TRAINING}/state.py", "self.epoch >= self.config.epochs", "self.epoch > self.config.epochs"),
    (f"{TRAINING}/state.py", "generate_state(1)[0]", "generate_state(2)[1]"),
    (f"{TRAINING}/images.py", "reach = size // 8", "reach = size // 4"),
    (f"{TRAINING}/images.py", "clamp_min(0).sqrt()", "clamp_min(1).sqrt()"),
    (f"{TRAINING}/evaluation.py", '"bf16": torch.bfloat16', '"bf16": torch.float16'),
    (f"{TRAINING}/confusion.py", "true_positive + errors + errors", "true_positive + errors"),
    (f"{TRAINING}/hardware.py", '"DefaultCPUAllocator"', '"Allocator"'),
    (f"{TRAINING}/cuda_graphs.py", "torch.cuda.CUDAGraph()", "torch.cuda.CUDAGraph(True)"),
    ("models/execution/convolutions.py", "MAX_FOLDED = 4", "MAX_FOLDED = 3"),
    ("models/execution/convolutions.py", "return x.tanh_()", "return x.sigmoid_()"),
    ("models/kernels/normalisation.py", "rows = max(4, BLOCK // size // c)", "rows = max(8, BLOCK // size // c)"),
    ("models/kernels/depthwise.py", "border = (pad + stride - 1) // stride", "border = pad // stride + 1"),
    ("models/kernels/excitation.py", "inverse = splat(1 / pixels)", "inverse = splat(1.0 / pixels)"),
    ("models/kernels/stem.py", "step = stride * channels", "step = channels * stride"),
    ("models/kernels/vectors.py", "for _ in range(2):", "for _ in range(3):"),
    ("models/kernels/launch.py", "ALIGNMENT = 64", "ALIGNMENT = 128"),
])  # fmt: skip
def test_what_all_models_use_changes_all(
    path: str, old: str, new: str, built: dict[str, nn.Module], before: dict[str, str]
) -> None:
    assert changed(replaced(path, old, new), built, before) == set(NAMES)


def test_the_files_of_a_model_are_those_that_decide_its_result(built: dict[str, nn.Module]) -> None:
    files = fingerprint.source_of(built["lenet5"]).files
    assert {f"{TRAINING}/fit.py", f"{TRAINING}/state.py", "models/execution/training.py", "models/lenet.py"} <= files
    assert not {"models/vgg.py", f"{TRAINING}/baselines.py", "experiments/run/plan.py"} & files
    assert f"{TRAINING}/baselines.py" in fingerprint.source_of(built["linear"]).files


def test_two_definitions_of_one_name_are_not_taken_for_each_other(
    built: dict[str, nn.Module], before: dict[str, str]
) -> None:
    """A helper that is replaced by another file's of the same name is another helper."""

    def edit(texts: Texts) -> None:
        texts["models/other.py"] = "def _stages(rows, in_channels, drop):\n    return []\n"
        path = "models/efficientnet.py"
        texts[path] = texts[path].replace("def _stages(", "def _former_stages(", 1)
        texts[path] = texts[path].replace("from torch import", "from models.other import _stages\nfrom torch import", 1)

    assert changed(edit, built, before) == OF_EFFICIENTNET

"""Every model of the registry, B0 against torchvision's, models of users, and the rule for wide layers."""

import contextlib
import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import models
from models.execution.inference import Inference
from models.execution.training import Training
from models.layers import WIDEST, Float32Linear, LayerStack, compute_wide_layers_in_fp32
from models.registry import import_all
from tests.conftest import ROOT

INPUTS = [(1, 10, 28), (3, 2, 128), (3, 7, 28), (1, 3, 65)]  # channels, classes, pixels
TASK_INPUTS = INPUTS[:2]
OURS = ("lenet5", "vggnet", "resnetcnn", "seresnet", "efficientnet_lite", "efficientnet_b0")


@pytest.mark.parametrize("shape", TASK_INPUTS)
def test_a_model_of_a_user_fits_or_says_why_not(shape: tuple[int, int, int]) -> None:
    for name in models.MODELS.keys() - set(OURS):
        with contextlib.suppress(models.ModelError):
            card = models.describe(name, *shape)
            assert card.parameters > 0 and card.layers and card.description


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("name", OURS)
def test_forward_and_backward(name: str, shape: tuple[int, int, int]) -> None:
    channels, classes, size = shape
    torch.manual_seed(0)
    model = models.build(name, channels, classes, size)
    logits = model(torch.randn(3, channels, size, size))
    assert logits.shape == (3, classes)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", OURS)
def test_structure_is_a_module_list_of_all_parameters(name: str) -> None:
    model = models.build(name, 1, 10, 28)
    assert isinstance(model, LayerStack)
    assert isinstance(model.layers, torch.nn.ModuleList)
    assert {key.split(".")[0] for key in model.state_dict()} == {"layers"}


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("name", OURS)
def test_card_counts_what_torch_counts(name: str, shape: tuple[int, int, int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    channels, _, size = shape
    card, model = models.describe(name, *shape), models.build(name, *shape).eval()
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, channels, size, size))
    assert 2 * card.macs == counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in OURS if name != "efficientnet_b0"])
def test_cost_limits(name: str) -> None:
    assert models.describe(name, 1, 10, 28).macs <= 15e6
    assert models.describe(name, 3, 2, 128).macs <= 250e6


@pytest.mark.parametrize("shape", TASK_INPUTS)
@pytest.mark.parametrize("name", OURS)
def test_docstrings_state_the_true_costs(name: str, shape: tuple[int, int, int]) -> None:
    card = models.describe(name, *shape)
    assert f"{card.parameters:,}" in card.description
    assert f"{card.macs / 1e6:.{2 if card.macs < 1e6 else 1}f} M" in card.description


def test_exact_parameter_counts() -> None:
    assert models.describe("lenet5", 1, 10, 28).parameters == 61_706
    assert models.describe("efficientnet_b0", 3, 1000, 224).parameters == 5_288_548
    plain, with_se = (models.describe(name, 3, 2, 128).parameters for name in ("resnetcnn", "seresnet"))
    assert with_se - plain == sum(2 * c * c // 16 + c // 16 + c for c in (64, 128, 256))


def test_b0_is_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.efficientnet_b0(weights=None).eval()
    for module in theirs.modules():  # statistics that differ from the initial ones
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = models.build("efficientnet_b0", 3, 1000, 224).eval()
    values = list(theirs.state_dict().values())
    assert [value.shape for value in ours.state_dict().values()] == [value.shape for value in values]
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_notation() -> None:
    assert models.describe("lenet5", 1, 10, 28).layers == "C5x5(6) T S2 C5x5(16) T S2 FC120 T FC84 T FC10"
    assert "MB6 5x5(112) x3" in models.describe("efficientnet_b0", 3, 2, 128).layers
    assert "SE +x R" in models.describe("seresnet", 3, 2, 128).layers


def test_unknown_and_impossible() -> None:
    with pytest.raises(models.ModelError, match="there are lenet5"):
        models.build("lenet", 1, 10, 28)
    with pytest.raises(models.ModelError, match="too small"):
        models.build("lenet5", 1, 10, 8)


def test_description_draws_nothing_from_the_generator() -> None:
    models.describe.cache_clear()
    before = torch.get_rng_state()
    models.describe("vggnet", 3, 2, 64)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def registry() -> Iterator[dict[str, type[nn.Module]]]:
    """The registry, in which a test may register models: it is restored afterwards."""
    tables = (models.MODELS, models.BASELINES, models.UNUSABLE)
    before, modules = [dict(table) for table in tables], set(sys.modules)
    yield models.MODELS
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for name in set(sys.modules) - modules:
        if name.startswith("models."):
            del sys.modules[name]
    models.describe.cache_clear()


class Plain(nn.Module):  # no docstring, no `layers`, a forward of its own
    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(torch.relu(x + self.mix(x)).mean((2, 3)))


class Lazy(nn.Module):
    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, 4, 3, 2), nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Described(Plain):
    """Plain, and described.

    At length.
    """


class Weightless(nn.Module):
    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(in_channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.table


@pytest.mark.parametrize("shape", TASK_INPUTS)
@pytest.mark.parametrize("kind", [Plain, Lazy, Described, Weightless])
def test_any_module_is_built_described_and_executed(kind, shape: tuple[int, int, int], registry) -> None:
    channels, classes, size = shape
    assert models.register(kind) is kind
    name = kind.__name__.lower()
    torch.manual_seed(0)
    model = models.build(name, *shape)
    assert type(model) is kind and model.training
    card = models.describe(name, *shape)
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    x, y = torch.randn(8, channels, size, size), torch.arange(8) % classes
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        expected, network = copy.deepcopy(model), copy.deepcopy(model)
        logits = Training(network, dtype)(x)
        torch.testing.assert_close(logits.float(), expected(x), rtol=tolerance, atol=tolerance)
        nn.functional.cross_entropy(logits.float(), y).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters() if parameter is not None)
        with torch.inference_mode():
            predicted = Inference(network, dtype)(x).float()
            torch.testing.assert_close(predicted, expected.eval()(x), rtol=tolerance, atol=tolerance)


def test_cards_of_any_module(registry) -> None:
    for kind in (Plain, Described, Weightless):
        models.register(kind)
    plain, described, weightless = (models.describe(n, 3, 2, 128) for n in ("plain", "described", "weightless"))
    assert plain.layers == described.layers == "C3x3(8) BN R S2 C1x1(8) FC2"
    assert plain.macs == 128 * 128 * 27 * 8 + 64 * 64 * 8 * 8 + 16
    assert plain.description == "Plain of tests.test_models, which has no docstring."
    assert described.description == "Plain, and described.\n\nAt length."
    assert weightless.layers == "Weightless" and weightless.macs == 0 and weightless.parameters == 6


class Own(LayerStack):
    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes)])


class Theirs(nn.Sequential):
    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))


@pytest.mark.parametrize("kind", [Own, Theirs])
def test_no_description_is_that_of_torch_or_of_a_building_block(kind: type[nn.Module], registry) -> None:
    card = models.describe(models.register(kind).__name__.lower(), 1, 10, 28)
    assert card.description == f"{kind.__name__} of tests.test_models, which has no docstring."
    assert card.layers == "FC10"


HEAD = """
import torch
from torch import nn
from models import register


@register
class {name}(nn.Module):
    def __init__(self, in_channels, num_classes, image_size):
        super().__init__()
        {before}
        self.conv = nn.Conv2d({channels}, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return {returned}

"""


def source(name: str, channels: str = "in_channels", returned: str = "", before: str = "", after: str = "") -> str:
    returned = returned or "self.head(self.conv(x).mean((2, 3)))"
    return HEAD.format(name=name, channels=channels, returned=returned, before=before) + after


NOT_IMPORTED = {  # file: source, and the reason
    "function.py": ("from models import register\n\n@register\ndef function(in_channels):\n    return 3\n",
                    "TypeError: function is not a class that derives from nn.Module"),
    "missing_package.py": ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
    "raises.py": (source("HalfWay", after="raise RuntimeError('first line\\nsecond line')"),
                  "RuntimeError: first line second line"),
    "exits.py": ("import sys\nsys.exit('no GPU here')\n", "SystemExit: no GPU here"),
    "ends.py": ("raise SystemExit\n", "SystemExit"),
    "syntax.py": ("def broken(:\n", "SyntaxError: invalid syntax (syntax.py, line 1)"),
    "twin_b.py": (source("Twin"), "ValueError: models/twin_a.py already has a model called twin"),
    "taken.py": (source("LeNet5"), "ValueError: models/lenet.py already has a model called lenet5"),
}  # fmt: skip
NOT_BUILT = {  # file: source, the model, and the reason
    "constructor.py": (source("Constructor", before="raise KeyError('width')"), "KeyError: 'width'"),
    "channels.py": (source("Channels", channels="3"), "expected input[2, 1, 28, 28] to have 3 channels, but got 1"),
    "shape.py": (source("Shape", returned="self.conv(x)"),
                 "ValueError: its logits have shape (2, 4, 26, 26), not (2, 10)"),
    "pair.py": (source("Pair", returned="(self.head(self.conv(x).mean((2, 3))), x)"),
                "TypeError: it returns a tuple, not a tensor of logits"),
    "auxiliary.py": (source("Auxiliary", returned="[x] if self.training else self.head(self.conv(x).mean((2, 3)))"),
                     "TypeError: it returns a list, not a tensor of logits"),
    "squeezed.py": (source("Squeezed", returned="self.head(self.conv(x).mean((2, 3))).squeeze()"),
                    "ValueError: its logits have shape (10,), not (1, 10)"),
}  # fmt: skip
GOOD = {"twin_a.py": source("Twin"), "after.py": source("After")}


def write_files(folder: Path) -> None:
    for file, (text, _) in (NOT_IMPORTED | NOT_BUILT).items():
        (folder / file).write_text(text)
    for file, text in GOOD.items():
        (folder / file).write_text(text)


def test_files_that_fail_are_named_and_the_others_are_models(tmp_path: Path, registry, monkeypatch) -> None:
    write_files(tmp_path)
    names = set(registry)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    import_all("models", [str(tmp_path)])
    assert set(registry) - names == {"twin", "after", *(Path(file).stem for file in NOT_BUILT)}
    assert models.MODELS["twin"].__module__ == "models.twin_a"
    sentences = sorted(models.unusable_sentences())
    assert sentences == sorted(
        f"models/{file} cannot be imported ({reason}); its models are left out"
        for file, (_, reason) in NOT_IMPORTED.items()
    )
    with pytest.raises(
        models.ModelError, match="unknown model 'halfway'; there are lenet5, .*; models/raises.py cannot"
    ):
        models.build("halfway", 1, 10, 28)
    for file, (_, reason) in NOT_BUILT.items():
        name = Path(file).stem
        with pytest.raises(models.ModelError) as error:
            models.describe(name, 1, 10, 28)
        assert str(error.value).startswith(f"{name} cannot be built for 28x28 images of 1 channel and 10 classes (")
        assert reason in str(error.value) and "\n" not in str(error.value)
    assert models.describe("channels", 3, 10, 28).parameters == 3 * 36 + 4 + 50
    assert models.describe("after", 1, 10, 28).layers == "C3x3(4) FC10"


def test_table_names_every_model_and_what_fails(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    write_files(tmp_path / "models")
    environment = os.environ | {"COLUMNS": "120"}
    result = subprocess.run(
        [sys.executable, "-m", "models"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == len(NOT_IMPORTED) + len(NOT_BUILT) and all(line.startswith("! ") for line in lines)
    for file, (_, reason) in NOT_IMPORTED.items():
        assert sum(line.startswith(f"! models/{file} cannot be imported ({reason})") for line in lines) == 1
    for file, (_, reason) in NOT_BUILT.items():
        (line,) = (line for line in lines if line.startswith(f"! {Path(file).stem} cannot be built"))
        assert reason in line
    assert all(f" {name} " in result.stdout for name in (*models.MODELS, "twin", "after", "channels"))
    assert "61,706" in result.stdout and "C5x5(6) T S2" in result.stdout


def test_a_model_of_a_file_stays_if_a_file_that_imports_it_fails(tmp_path: Path, registry, monkeypatch) -> None:
    (tmp_path / "aa_fails.py").write_text("import models.zz_good\nraise OSError('later')\n")
    (tmp_path / "zz_good.py").write_text(source("Good"))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    import_all("models", [str(tmp_path)])
    assert models.unusable_sentences() == [
        "models/aa_fails.py cannot be imported (OSError: later); its models are left out"
    ]
    assert models.build("good", 1, 10, 28)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_user_may_interrupt_an_import(tmp_path: Path, registry, monkeypatch) -> None:
    (tmp_path / "slow.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        import_all("models", [str(tmp_path)])


class Wide(nn.Module):
    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(in_channels * image_size**2, 6)
        self.out = nn.Linear(6, WIDEST + 1)
        self.inward = nn.Linear(WIDEST + 1, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.inward(self.out(self.narrow(x.flatten(1))))


@pytest.mark.parametrize(("inputs", "outputs", "kind"), [
    (WIDEST, 3, nn.Linear), (3, WIDEST, nn.Linear), (WIDEST + 1, 3, Float32Linear), (3, WIDEST + 1, Float32Linear),
])  # fmt: skip
def test_size_alone_decides_which_layers_compute_in_fp32(inputs: int, outputs: int, kind: type[nn.Linear]) -> None:
    layer = nn.Linear(inputs, outputs)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    model = nn.Sequential(layer)
    compute_wide_layers_in_fp32(model)
    assert model[0] is layer and type(layer) is kind
    assert list(layer.state_dict()) == list(before) == ["weight", "bias"]
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    x = torch.randn(2, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outcome = layer(x)
    assert outcome.dtype == (torch.float32 if kind is Float32Linear else torch.bfloat16)
    if kind is Float32Linear:
        assert torch.equal(outcome, nn.functional.linear(x, layer.weight, layer.bias))
    assert layer(x).dtype == torch.float32 and layer.double()(x.double()).dtype == torch.float64


def test_wide_layers_of_a_model_train_infer_and_are_exported(registry) -> None:
    models.register(Wide)
    torch.manual_seed(0)
    model = models.build("wide", 1, 10, 28)
    assert [type(layer) for layer in model.children()] == [nn.Linear, Float32Linear, Float32Linear]
    untouched = Wide(1, 10, 28)
    assert list(model.state_dict()) == list(untouched.state_dict())
    untouched.load_state_dict(model.state_dict())
    kinds: list[torch.dtype] = []
    for layer in model.children():
        layer.register_forward_hook(lambda module, inputs, out: kinds.append(out.dtype))
    x = torch.randn(4, 1, 28, 28)
    logits = Training(model, torch.bfloat16)(x)
    assert kinds == [torch.bfloat16, torch.float32, torch.float32]
    logits.square().sum().backward()
    untouched(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), untouched.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.02 * theirs.grad.norm()
    with torch.inference_mode():
        torch.testing.assert_close(Inference(model, torch.bfloat16)(x), untouched(x), rtol=0.05, atol=0.05)
    model = copy.deepcopy(model)
    for layer in model.children():
        layer._forward_hooks.clear()
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("images")},)).module()
    torch.testing.assert_close(program(x[:3]), untouched(x[:3]))

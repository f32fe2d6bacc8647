"""Every model of the registry, at both input sizes, and B0 against torchvision's."""

import pytest
import torch
import torchvision

import models
from models.layers import LayerStack

INPUTS = [(1, 10, 28), (3, 2, 128), (3, 7, 28), (1, 3, 65)]  # channels, classes, pixels


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("name", models.MODELS)
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


@pytest.mark.parametrize("name", models.MODELS)
def test_structure_is_a_module_list_of_all_parameters(name: str) -> None:
    model = models.build(name, 1, 10, 28)
    assert isinstance(model, LayerStack)
    assert isinstance(model.layers, torch.nn.ModuleList)
    assert {key.split(".")[0] for key in model.state_dict()} == {"layers"}


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("name", models.MODELS)
def test_card_counts_what_torch_counts(name: str, shape: tuple[int, int, int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    channels, _, size = shape
    card, model = models.describe(name, *shape), models.build(name, *shape).eval()
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, channels, size, size))
    assert 2 * card.macs == counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in models.MODELS if name != "efficientnet_b0"])
def test_cost_limits(name: str) -> None:
    assert models.describe(name, 1, 10, 28).macs <= 15e6
    assert models.describe(name, 3, 2, 128).macs <= 250e6


@pytest.mark.parametrize("shape", [(1, 10, 28), (3, 2, 128)])
@pytest.mark.parametrize("name", models.MODELS)
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


def test_table_names_every_model(run_command) -> None:
    result = run_command("-m", "models")
    assert result.returncode == 0
    assert all(name in result.stdout for name in models.MODELS)
    assert "61,706" in result.stdout and "C5x5(6) T S2" in result.stdout


def test_unknown_and_impossible() -> None:
    with pytest.raises(ValueError, match="there are lenet5"):
        models.build("lenet", 1, 10, 28)
    with pytest.raises(ValueError, match="too small"):
        models.build("lenet5", 1, 10, 8)


def test_description_draws_nothing_from_the_generator() -> None:
    models.describe.cache_clear()
    before = torch.get_rng_state()
    models.describe("vggnet", 3, 2, 64)
    assert torch.equal(torch.get_rng_state(), before)

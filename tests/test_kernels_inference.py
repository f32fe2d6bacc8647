"""Kernels of evaluation compute what torch computes in float64."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import kernels
from models.execution.convolutions import CL, Geometry
from models.execution.inference import Inference
from models.layers import ConvNorm, LayerStack
from models.resnet import ResidualBlock

if (reason := kernels.why_not()) and "imported" not in reason:
    pytest.skip(f"no kernels: {reason}", allow_module_level=True)

from models.kernels import functions

ERROR = {torch.float32: 3e-6, torch.bfloat16: 4e-3}


def images(channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, channels, height, width).to(dtype).contiguous(memory_format=CL)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "height", "width"), [(1, 3, 1, 8, 11), (3, 7, 2, 17, 13), (3, 3, 1, 5, 4)]
)
def test_first_layer(channels: int, kernel: int, stride: int, height: int, width: int, dtype: torch.dtype) -> None:
    x, weight, bias = images(channels, height, width, dtype), torch.randn(48, channels, kernel, kernel), torch.randn(48)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2)
    exact = F.max_pool2d(exact.relu(), 2)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        geometry = Geometry(stride, kernel // 2)
        results.append(functions.stem(x, functions.stem_weight(weight), bias, kernel, geometry))
    torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert results[0].dtype == dtype
    assert (results[0].double() - exact).norm() < ERROR[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", ERROR)
def test_bias_sum_and_pool(dtype: torch.dtype) -> None:
    z, other, bias = images(32, 7, 6, dtype), images(32, 7, 6, dtype), torch.randn(32)
    exact = z.double() + bias.double().view(1, -1, 1, 1)
    pooled = F.max_pool2d(exact.relu(), 2)
    assert (functions.add_bias_and_pool(z, bias).double() - pooled).norm() < ERROR[dtype] * pooled.norm()
    total = (exact + other.double()).relu()
    assert (functions.add_bias(z, bias, other).double() - total).norm() < ERROR[dtype] * total.norm()


class Stack(LayerStack):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


STACKS = {
    "pools": lambda: [ConvNorm(3, 16, 3), nn.MaxPool2d(2), ConvNorm(16, 32, 3), nn.MaxPool2d(2)],
    "residual": lambda: [ConvNorm(3, 16, 7, 2), nn.MaxPool2d(2), ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2)],
    "excited": lambda: [ConvNorm(3, 16, 3), ResidualBlock(16, 16, 1, 4)],
    "narrow": lambda: [ConvNorm(3, 12, 3), nn.MaxPool2d(2)],
    "one pixel": lambda: [ConvNorm(3, 16, 3, 2), ConvNorm(16, 16, 3, 8), nn.Flatten()],
}


@pytest.mark.parametrize("layers", STACKS.values(), ids=STACKS)
def test_inference_is_that_of_the_layers(layers) -> None:
    torch.manual_seed(0)
    model, x = Stack(*layers()).to(memory_format=CL), images(3, 18, 15, torch.float32)
    model(x)
    exact = copy.deepcopy(model).double().eval()(x.double())
    with torch.inference_mode():
        network = Inference(model, torch.float32)
        assert network.with_kernels
        assert (network(x).double() - exact).norm() < 3e-6 * exact.norm()
        low = Inference(model, torch.bfloat16)
        assert (low(x).double() - exact).norm() < 0.02 * exact.norm()


def test_weights_that_are_not_numbers_are_noticed() -> None:
    model = Stack(ConvNorm(3, 16, 3), nn.MaxPool2d(2), ConvNorm(16, 16, 3), nn.MaxPool2d(2))
    with torch.no_grad(), torch.inference_mode():
        model.layers[0].conv.weight[3, 1, 1, 1] = torch.nan
        assert Inference(model, torch.float32)(images(3, 16, 16, torch.float32)).isnan().any()

"""Fast execution computes what the layers say: logits, gradients, running statistics; and trains as plain fp32 does."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import models
from models.efficientnet import StochasticDepth
from models.execution.convolutions import Geometry, convolution_gradients, convolve, pooled_weight
from models.execution.inference import Inference
from models.execution.training import Training
from models.layers import ConvNorm, LayerStack

INPUTS = [  # model, channels, classes, size
    ("lenet5", 1, 10, 28), ("lenet5", 3, 2, 45), ("lenet5", 3, 2, 128), ("vggnet", 1, 10, 28), ("vggnet", 3, 2, 70),
    ("resnetcnn", 1, 10, 28), ("resnetcnn", 3, 2, 64), ("seresnet", 1, 10, 28), ("efficientnet_lite", 3, 2, 64),
    ("efficientnet_b0", 3, 2, 64),
]  # fmt: skip


def build(name: str, channels: int, classes: int, size: int) -> LayerStack:
    """A model without chance, with running statistics of some batches, in channels_last memory."""
    torch.manual_seed(0)
    model = models.build(name, channels, classes, size).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.rate = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for _ in range(3):
            model(images(channels, size, 16))
    return model


def images(channels: int, size: int, n: int = 24) -> Tensor:
    return torch.randn(n, channels, size, size).contiguous(memory_format=torch.channels_last)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize(("name", "channels", "classes", "size"), INPUTS)
def test_training_in_fp32_is_that_of_the_layers(name: str, channels: int, classes: int, size: int) -> None:
    plain = build(name, channels, classes, size)
    fast = copy.deepcopy(plain)
    x, y = images(channels, size), torch.arange(24) % classes
    logits = [plain(x), Training(fast, torch.float32)(x)]
    for some in logits:
        cross_entropy(some, y).backward()
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
    ours, theirs = gradients(fast), gradients(plain)
    assert (ours - theirs).norm() < 0.01 * theirs.norm()  # ReLU passes or stops a gradient at the last bit
    for ours, theirs in zip(fast.buffers(), plain.buffers(), strict=True):  # also the number of batches
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "channels", "classes", "size"), INPUTS)
def test_training_in_bf16_is_as_near_to_fp32_as_autocast_is(name: str, channels: int, classes: int, size: int) -> None:
    plain = build(name, channels, classes, size)
    cast, fast = copy.deepcopy(plain), copy.deepcopy(plain)
    x, y = images(channels, size), torch.arange(24) % classes
    cross_entropy(plain(x), y).backward()
    with torch.autocast("cpu", torch.bfloat16):
        logits = cast(x)
    cross_entropy(logits.float(), y).backward()
    cross_entropy(Training(fast, torch.bfloat16)(x).float(), y).backward()
    exact = gradients(plain)
    error, usual = ((gradients(model) - exact).norm() / exact.norm() for model in (fast, cast))
    assert error < 1.3 * usual + 0.01


@pytest.mark.parametrize(("name", "channels", "classes", "size"), INPUTS)
def test_inference_is_that_of_the_layers(name: str, channels: int, classes: int, size: int) -> None:
    model = build(name, channels, classes, size).eval()
    x = images(channels, size)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(Inference(model, torch.float32)(x), expected, rtol=1e-4, atol=1e-5)
        network = Inference(model, torch.bfloat16)
        in_bf16 = network(x).float()
        assert torch.equal(network(x[:7]).float(), in_bf16[:7]) or (network(x[:7]) - in_bf16[:7]).abs().max() < 0.05
    assert (in_bf16 - expected).abs().max() < 0.03 * expected.abs().max() + 0.01


def test_four_neighbours_as_channels() -> None:
    conv = nn.Conv2d(3, 5, 5, padding=2)
    x = images(3, 21)
    four = convolve(x, pooled_weight(conv.weight), conv.bias.repeat(4), Geometry(2, 2)).unflatten(1, (4, 5))
    for position, values in enumerate(four.unbind(1)):
        down, right = divmod(position, 2)
        torch.testing.assert_close(values, conv(x)[:, :, down:20:2, right:20:2])


class Skip(nn.Sequential):
    """Inherits from what is known, and does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Promote(nn.Module):
    """Returns float32, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x.float()


def long_conv_norm() -> ConvNorm:
    layer = ConvNorm(8, 8, 3)
    layer.append(nn.Softplus())
    return layer


def hooked() -> nn.Module:
    layer = ConvNorm(8, 8, 3)
    layer.register_forward_hook(lambda module, inputs, out: out + 1)
    return layer


UNKNOWN = {
    "not for pooled weights": lambda: [nn.Conv2d(8, 8, (3, 5), padding=(1, 2)), nn.Tanh(), nn.AvgPool2d(2)],
    "groups": lambda: [nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Tanh(), nn.AvgPool2d(2)],
    "other pooling": lambda: [nn.Conv2d(8, 8, 4), nn.Tanh(), nn.AvgPool2d(2, ceil_mode=True)],
    "other maximum": lambda: [nn.Conv2d(8, 8, 4), nn.MaxPool2d(2, ceil_mode=True)],
    "subclass": lambda: [Skip(ConvNorm(8, 8, 3), ConvNorm(8, 8, 3, activation=None))],
    "activation": lambda: [ConvNorm(8, 8, 3, activation=nn.Hardswish)],
    "longer": lambda: [long_conv_norm()],
    "hook": lambda: [hooked()],
    "multiplier": lambda: [ConvNorm(8, 16, 3, groups=8), ConvNorm(16, 8, 3)],
    "multiplier, stride 2": lambda: [ConvNorm(8, 16, 3, stride=2, groups=8), ConvNorm(16, 8, 3)],
    "float32": lambda: [Promote(), ConvNorm(8, 8, 3), Promote(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.AvgPool2d(2)],
    "torch's own": lambda: [nn.GroupNorm(2, 8), nn.GELU(), nn.MaxPool2d(3)],
}


class Own(LayerStack):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, stride=2), *layers, nn.Flatten(), nn.LazyLinear(4)])


class OwnForward(Own):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [Own, OwnForward])
@pytest.mark.parametrize("layers", UNKNOWN.values(), ids=UNKNOWN)
def test_a_model_of_ones_own_is_executed_as_it_says(layers, kind: type[Own]) -> None:
    torch.manual_seed(0)
    model, x = kind(layers()), images(3, 33)
    model(x)
    plain = copy.deepcopy(model)
    logits = [plain(x), Training(model, torch.float32)(x)]
    for some in logits:
        cross_entropy(some, torch.arange(24) % 4).backward()
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-3, atol=1e-5)
    expected = model.eval()(x)
    with torch.inference_mode():
        torch.testing.assert_close(Inference(model, torch.float32)(x), expected, rtol=1e-4, atol=1e-5)
        assert (Inference(model, torch.bfloat16)(x).float() - expected).abs().max() < 0.1
    cross_entropy(Training(model.train(), torch.bfloat16)(x).float(), torch.arange(24) % 4).backward()


@pytest.mark.parametrize("name", ["lenet5", "vggnet", "resnetcnn", "seresnet", "efficientnet_lite", "efficientnet_b0"])
def test_trains_as_plain_fp32_does(name: str) -> None:
    """At every step of plain training, loss, gradient and running statistics agree.

    Each step starts from the weights of plain training. Two independent runs would diverge from differences in the
    last bits, which depend on the processor: AdamW makes full steps along gradients however small they are.
    """
    plain = build(name, 1, 3, 28)
    fast, low = copy.deepcopy(plain), copy.deepcopy(plain)  # fp32 and bf16
    ways = ((plain, plain), (fast, Training(fast, torch.float32)), (low, Training(low, torch.bfloat16)))
    torch.manual_seed(1)
    y = torch.arange(96) % 3
    x = images(1, 28, 96) + (y[:, None, None, None] - 1)  # brightness tells the class, through much noise
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-3, foreach=False)
    curve, errors = [], []
    for step in range(12):
        rows = torch.arange(96).roll(32 * step)[:32]
        losses = []
        for model in (fast, low):
            model.load_state_dict(plain.state_dict())
        for model, forward in ways[: 2 if step % 3 else 3]:  # bf16, slow on many processors, in every third step
            model.zero_grad()
            loss = cross_entropy(forward(x[rows]).float(), y[rows])
            loss.backward()
            losses.append(loss.item())
        assert abs(losses[1] - losses[0]) < 1e-4
        exact = gradients(plain)
        assert (gradients(fast) - exact).norm() < 0.01 * exact.norm()
        for ours, theirs in zip(fast.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        curve.append(losses[0])
        errors += [abs(loss - losses[0]) for loss in losses[2:]]
        optimizer.step()
    assert curve[-1] < 0.9 * curve[0]  # there is something to compare
    assert sum(errors) / len(errors) < 0.02


@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(3, 1, 9), (3, 2, 8), (3, 2, 9), (5, 1, 4), (5, 2, 8), (5, 2, 7)]
)
def test_gradients_of_depthwise_convolutions(kernel: int, stride: int, size: int) -> None:
    """In bf16 they are put together from other convolutions; their sums, in fp32, are those of exact products."""
    x = images(6, size, 5).bfloat16()
    weight = torch.randn(6, 1, kernel, kernel).bfloat16()
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    out = torch.nn.functional.conv2d(exact_x, exact_weight, None, stride, kernel // 2, groups=6)
    grad = torch.randn_like(out).bfloat16()
    out.backward(grad.double())
    geometry = Geometry(stride, kernel // 2, 6)
    grad_x, grad_weight, _ = convolution_gradients(grad, x, weight, geometry, need_x=True)
    torch.testing.assert_close(grad_x.double(), exact_x.grad, rtol=0.01, atol=0.01)
    torch.testing.assert_close(grad_weight.double(), exact_weight.grad, rtol=0.01, atol=0.05)

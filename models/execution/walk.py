"""The walk over the layers of a model, and which layers have a fast operation."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from models import kernels
from models.efficientnet import MBConv
from models.execution.convolutions import ACTIVATIONS, activation_of
from models.layers import ConvNorm, GlobalAveragePool, LayerStack, SqueezeExcitation
from models.resnet import ResidualBlock

UNFUSED = ("mps",)  # devices whose operations in channels_last cannot be trusted
KNOWN = {ConvNorm, SqueezeExcitation, ResidualBlock, MBConv, GlobalAveragePool}
KNOWN |= {nn.Sequential, nn.Conv2d, nn.Tanh, nn.MaxPool2d, nn.AvgPool2d}


def is_known(layer: nn.Module) -> bool:
    """Whether a layer has a fast operation: it is no subclass, has no hook, and if a ConvNorm, only standard parts."""
    if type(layer) not in KNOWN or has_hooks(layer):
        return False
    if not isinstance(layer, ConvNorm):
        return True
    conv, norm, *activation = layer
    usual = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats and norm.affine
    usual = usual and norm.momentum is not None
    known = not activation or (len(activation) == 1 and type(activation[0]) in ACTIVATIONS)
    plain = (
        isinstance(conv, nn.Conv2d) and conv.dilation == (1, 1) and conv.padding_mode == "zeros" and _is_square(conv)
    )
    return usual and known and plain and conv.bias is None and not any(map(has_hooks, layer))


def _is_square(conv: nn.Conv2d) -> bool:
    """Whether kernel, stride and padding are the same down and across, as `Geometry` takes them to be."""
    sides = (conv.kernel_size, conv.stride, conv.padding)
    return not isinstance(conv.padding, str) and all(len({*each}) == 1 for each in sides)


def has_hooks(layer: nn.Module) -> bool:
    """Whether something is called when the layer is."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)


def is_2x2(pool: nn.MaxPool2d | nn.AvgPool2d) -> bool:
    """Whether a layer is plain pooling over 2x2 pixels."""
    if pool.kernel_size not in (2, (2, 2)) or pool.stride not in (2, (2, 2)) or pool.padding not in (0, (0, 0)):
        return False
    if isinstance(pool, nn.MaxPool2d):
        return is_known(pool) and pool.dilation in (1, (1, 1)) and not pool.ceil_mode and not pool.return_indices
    return is_known(pool) and not pool.ceil_mode and pool.divisor_override is None


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether `pooled_weight` applies to a convolution."""
    settings = (conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    square = len({*conv.kernel_size}) == 1 and not isinstance(conv.padding, str) and len({*conv.padding}) == 1
    return is_known(conv) and settings == ((1, 1), (1, 1), 1, "zeros") and conv.bias is not None and square


class Execution(ABC):
    """Executes a model in channels_last memory, with convolutions and matrix products in `dtype`.

    On the devices in `UNFUSED` layers are called as they are, in the layout of the images.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        self.with_kernels = on_cpu and dtype in (torch.float32, torch.bfloat16) and not kernels.why_not()

    def __call__(self, x: Tensor) -> Tensor:
        """Map images, shape (N, channels, H, W), to logits, shape (N, classes)."""
        device = x.device.type  # layers without a fast operation
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            model = self.model
            if not isinstance(model, LayerStack) or type(model).forward is not LayerStack.forward:
                return model(x)  # type: ignore[no-any-return]
            if has_hooks(model) or device in UNFUSED:
                return model(x)  # type: ignore[no-any-return]
            return self.sequence(model.layers, x.to(self.dtype))

    def sequence(self, layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Apply layers in order, some of them fused."""
        rest = list(layers)
        while rest:
            match rest:
                case [nn.Conv2d() as conv, nn.Tanh() as tanh, nn.AvgPool2d() as pool, *others] if (
                    is_plain(conv) and is_known(tanh) and is_2x2(pool)
                ):
                    x, rest = self.conv_tanh_pool(conv, x), others
                case [ConvNorm() as layer, nn.MaxPool2d() as pool, *others] if (
                    is_known(layer) and activation_of(layer) == "relu" and is_2x2(pool)
                ):
                    x, rest = self.conv_norm_pool(layer, x), others
                case [ConvNorm() as layer, MBConv() as block, *others] if len(block.block) == 3:
                    x, rest = self.bottleneck(block, [layer, *block.block], x), others
                case [layer, *others]:
                    x, rest = self.layer(layer, x), others
        return x

    def layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply one layer."""
        if not is_known(layer):
            return layer(x)  # type: ignore[no-any-return]
        match layer:
            case ConvNorm():
                return self.conv_norm(layer, x)
            case SqueezeExcitation():
                return x * torch.sigmoid(self.excitation(layer, self.map_mean(x)))
            case ResidualBlock():
                return self.residual_block(layer, x)
            case MBConv():
                return self.bottleneck(layer, list(layer.block), x)
            case nn.Sequential():
                return self.sequence(layer, x)
            case GlobalAveragePool():
                return self.map_mean(x).flatten(1)
            case nn.MaxPool2d() if is_2x2(layer):
                return self.max_pool(x)
        return layer(x)  # type: ignore[no-any-return]

    def residual_block(self, block: ResidualBlock, x: Tensor) -> Tensor:
        """Add the shortcut in the pass of the last BatchNorm, unless squeeze-and-excitation follows it."""
        shortcut = x if isinstance(block.shortcut, nn.Identity) else self.layer(block.shortcut, x)
        *others, last = block.residual
        x = self.sequence(others, x)
        if isinstance(last, ConvNorm) and is_known(last) and len(last) == 2:
            return self.conv_norm(last, x, shortcut)
        return F.relu_(self.layer(last, x) + shortcut)

    def bottleneck(self, block: MBConv, layers: list[nn.Module], x: Tensor) -> Tensor:
        """Apply the layers of an inverted bottleneck, of which the first may stand before the block."""
        before, inside = layers[: -len(block.block)], layers[-len(block.block) :]
        x = self.sequence(before, x)
        out = self.sequence(inside, x)
        return block.drop(out) + x if block.residual else out

    def conv_norm_pool(self, layer: ConvNorm, x: Tensor) -> Tensor:
        """Convolution, BatchNorm, ReLU, and the maximum over 2x2 pixels."""
        return self.max_pool(self.conv_norm(layer, x))

    @abstractmethod
    def conv_norm(self, layer: ConvNorm, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolution, BatchNorm and activation; with `other`, its sum and ReLU instead of the activation."""

    @abstractmethod
    def conv_tanh_pool(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Convolution, tanh, and the mean over 2x2 pixels."""

    @abstractmethod
    def max_pool(self, x: Tensor) -> Tensor:
        """Maximum over 2x2 pixels."""

    @abstractmethod
    def map_mean(self, x: Tensor) -> Tensor:
        """Mean over the map: (N, C, 1, 1)."""

    def excitation(self, layer: SqueezeExcitation, squeezed: Tensor) -> Tensor:
        """The two fully connected layers of squeeze-and-excitation."""
        out: Tensor = layer.expand(layer.activation(layer.reduce(squeezed)))
        return out

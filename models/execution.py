"""Fast execution of a network: the same function as its `forward`, with other operations.

`Training` and `Inference` walk over the `layers` of a model. They replace the blocks of this package by faster
operations and call every other layer, so any model works. Parameters and buffers remain those of the model.

On a CPU passes over memory cost more time than arithmetic. So oneDNN fuses bias, activation and sum into the
convolution before them ("post-operations"), BatchNorm takes one pass for the statistics and one for the rest, and
convolutions with few channels treat four neighbouring pixels as channels. For some gradients in bf16 oneDNN has only a
reference implementation; these are composed of fast convolutions. benchmarks/README.md has the gains. The choice
depends only on the kind of layer, so the same model gives the same bits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from models import kernels
from models.efficientnet import MBConv, StochasticDepth
from models.layers import ConvNorm, GlobalAveragePool, LayerStack, SqueezeExcitation
from models.resnet import ResidualBlock

CL = torch.channels_last
UNFUSED = ("mps",)  # devices whose operations in channels_last cannot be trusted
ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "swish"}  # oneDNN's names
FUSED = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
FUSED_BF16 = FUSED and torch.ops.mkldnn._is_mkldnn_bf16_supported()
MAX_FOLDED = 4  # largest number of channels that `Folding` suits
PACK = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)
KNOWN = {ConvNorm, SqueezeExcitation, ResidualBlock, MBConv, GlobalAveragePool}
KNOWN |= {nn.Sequential, nn.Conv2d, nn.Tanh, nn.MaxPool2d, nn.AvgPool2d}


def is_known(layer: nn.Module) -> bool:
    """Whether a layer has a fast operation: it is no subclass, has no hook, and if a ConvNorm, only standard parts."""
    if type(layer) not in KNOWN or _has_hooks(layer):
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
    return usual and known and plain and conv.bias is None and not any(map(_has_hooks, layer))


def _is_square(conv: nn.Conv2d) -> bool:
    """Whether kernel, stride and padding are the same down and across, as `Geometry` takes them to be."""
    sides = (conv.kernel_size, conv.stride, conv.padding)
    return not isinstance(conv.padding, str) and all(len({*each}) == 1 for each in sides)


def _has_hooks(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)


def _is_2x2(pool: nn.MaxPool2d | nn.AvgPool2d) -> bool:
    """Whether a layer is plain pooling over 2x2 pixels."""
    if pool.kernel_size not in (2, (2, 2)) or pool.stride not in (2, (2, 2)) or pool.padding not in (0, (0, 0)):
        return False
    if isinstance(pool, nn.MaxPool2d):
        return is_known(pool) and pool.dilation in (1, (1, 1)) and not pool.ceil_mode and not pool.return_indices
    return is_known(pool) and not pool.ceil_mode and pool.divisor_override is None


class Geometry(NamedTuple):
    """Stride, padding on all sides, and groups of a convolution."""

    stride: int
    padding: int
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry":
        """Return the geometry of a layer."""
        assert not isinstance(conv.padding, str)
        return cls(conv.stride[0], conv.padding[0], conv.groups)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str = "none") -> Tensor:
    """Convolution, bias and activation, in one pass with oneDNN."""
    stride, padding, groups = geometry
    if _is_fused(x):
        operation = torch.ops.mkldnn._convolution_pointwise
        arguments = ([padding] * 2, [stride] * 2, [1, 1], groups)
        out: Tensor = operation(x, weight, bias, *arguments, activation, [], "")
        return out
    out = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding, 1, groups)
    return activate(out, activation)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, activation: str = "none") -> Tensor:
    """Compute activation(scale * x + shift) per channel in one pass, as a depthwise 1x1 convolution.

    The scale is rounded to the dtype of x, like weights.
    """
    if not _is_fused(x):
        return activate(torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1)).to(x.dtype), activation)
    return convolve(x, scale.view(-1, 1, 1, 1).to(x.dtype), shift, Geometry(1, 0, len(scale)), activation)


def _is_fused(x: Tensor) -> bool:
    if x.device.type != "cpu":
        return False
    return FUSED_BF16 if x.dtype == torch.bfloat16 else FUSED and x.dtype == torch.float32


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation in place, by its name in oneDNN."""
    match activation:
        case "relu":
            return F.relu_(x)
        case "swish":
            return F.silu(x, inplace=True)
        case "tanh":
            return x.tanh_()
    return x


def activation_of(layer: ConvNorm) -> str:
    """Return oneDNN's name of the activation."""
    return ACTIVATIONS[type(layer[2])] if len(layer) > 2 else "none"


def pooled_weight(weight: Tensor) -> Tensor:
    """Return weights of a stride-2 convolution whose channels are four neighbouring outputs at stride 1.

    6 channels do not fill a vector of 16; 24 do. Weights of shape (C, in, k, k) become (4 C, in, k + 1, k + 1), and
    average pooling over 2x2 pixels becomes a mean over four channels (`averaging_weight`).
    """
    return torch.cat([F.pad(weight, (right, 1 - right, down, 1 - down)) for down in (0, 1) for right in (0, 1)])


def averaging_weight(channels: int, like: Tensor) -> Tensor:
    """Return weights (C, 4 C, 1, 1) of the mean over the four neighbours of `pooled_weight`."""
    return (torch.eye(channels, dtype=like.dtype, device=like.device).repeat(1, 4) / 4)[:, :, None, None]


class Folding(NamedTuple):
    """A stride-2 convolution as a stride-1 convolution over 2x2 blocks of pixels, with the pixels as channels.

    1 or 3 input channels do not fill a vector and slow down the gradient of the weights; 4 or 12 are better.
    """

    kernel: int  # of the stride-2 convolution, in pixels
    padding: int  # likewise

    @classmethod
    def of(cls, x: Tensor, kernel: int, geometry: Geometry) -> "Folding | None":
        """Return the folding of a convolution, or None if it does not suit."""
        suits = geometry.stride == 2 and geometry.groups == 1 and x.shape[1] <= MAX_FOLDED and not x.requires_grad
        if not (suits and _is_fused(x)) or x.shape[2] % 2 or x.shape[3] % 2:
            return None
        return cls(kernel, geometry.padding)

    @property
    def front(self) -> int:
        """Blocks of padding above and to the left."""
        return (self.padding + 1) // 2

    @property
    def shift(self) -> int:
        """Zeros before each row and column of the kernel, to align it with the blocks."""
        return 2 * self.front - self.padding

    @property
    def blocks(self) -> int:
        """Side of the kernel in blocks."""
        return (self.kernel + self.shift + 1) // 2

    def images(self, x: Tensor) -> Tensor:
        """Fold images (N, C, H, W) to (N, 4 C, blocks down, blocks across)."""
        n, channels, *sides = x.shape
        down, across = ((side + 2 * self.padding - self.kernel) // 2 + self.blocks for side in sides)
        folded = x.new_zeros(n, down, across, 4 * channels)
        for place in range(4):
            source = x[:, :, place // 2 :: 2, place % 2 :: 2].permute(0, 2, 3, 1)
            source = source[:, : down - self.front, : across - self.front]
            target = folded[:, self.front :, self.front :, place * channels : (place + 1) * channels]
            target[:, : source.shape[1], : source.shape[2]] = source
        return folded.permute(0, 3, 1, 2)

    def weight(self, weight: Tensor) -> Tensor:
        """Fold weights (O, C, k, k) to (O, 4 C, blocks, blocks)."""
        behind = 2 * self.blocks - self.shift - self.kernel
        padded = F.pad(weight, (self.shift, behind, self.shift, behind))
        places = [padded[:, :, down::2, right::2] for down in (0, 1) for right in (0, 1)]
        return torch.cat(places, dim=1)


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
            if _has_hooks(model) or device in UNFUSED:
                return model(x)  # type: ignore[no-any-return]
            return self.sequence(model.layers, x.to(self.dtype))

    def sequence(self, layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Apply layers in order, some of them fused."""
        rest = list(layers)
        while rest:
            match rest:
                case [nn.Conv2d() as conv, nn.Tanh() as tanh, nn.AvgPool2d() as pool, *others] if (
                    _is_plain(conv) and is_known(tanh) and _is_2x2(pool)
                ):
                    x, rest = self.conv_tanh_pool(conv, x), others
                case [ConvNorm() as layer, nn.MaxPool2d() as pool, *others] if (
                    is_known(layer) and activation_of(layer) == "relu" and _is_2x2(pool)
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
            case nn.MaxPool2d() if _is_2x2(layer):
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


class Training(Execution):
    """A model in training mode on a CPU, in fewer passes than autograd takes.

    Batch and running statistics and gradients are those of `model(x)` under autocast, up to rounding. What stands
    between the convolutions is done by the kernels of models/kernels, where they can be had and fit the layers.
    """

    def _fits(self, layer: ConvNorm, sides: Sequence[int], multiple: int = 8) -> bool:
        """Whether the kernels can do a ConvNorm on maps of these sides: its channels, or those of two pixels, fill
        vectors.
        """
        channels = layer.conv.out_channels if is_known(layer) else 1
        even = math.prod(_sides_after(layer.conv, sides)) % 2 == 0
        fills = channels % multiple == 0 and (channels % 16 == 0 or even)
        return self.with_kernels and fills and layer.norm.training

    def conv_norm_pool(self, layer: ConvNorm, x: Tensor) -> Tensor:
        """See `Execution`."""
        if not self._fits(layer, x.shape[2:], 16):
            return super().conv_norm_pool(layer, x)
        from models.kernels import functions  # imports numba

        return functions.conv_norm_pool(layer, x.to(self.dtype))

    def residual_block(self, block: ResidualBlock, x: Tensor) -> Tensor:
        """See `Execution`. With kernels also squeeze-and-excitation is done in the pass of the sum."""
        match list(block.residual):
            case [ConvNorm() as first, ConvNorm() as last, SqueezeExcitation() as excite] if len(
                last
            ) == 2 and _is_plain_excitation(excite):
                other = x if isinstance(block.shortcut, nn.Identity) else self.layer(block.shortcut, x)
                x = self.layer(first, x)
                if self._fits(last, x.shape[2:]):
                    from models.kernels import functions  # imports numba

                    return functions.excited_residual(last, excite, x.to(self.dtype), other.to(self.dtype))
                return F.relu_(self.layer(excite, self.layer(last, x)) + other)
        return super().residual_block(block, x)

    def bottleneck(self, block: MBConv, layers: list[nn.Module], x: Tensor) -> Tensor:
        """See `Execution`."""
        match layers:
            case [ConvNorm() as first, ConvNorm() as deep, SqueezeExcitation() as excite, ConvNorm() as last] if (
                self._is_bottleneck(block, first, deep, last, x.shape[2:]) and _is_plain_excitation(excite)
            ):
                from models.kernels import functions  # imports numba

                return functions.inverted_bottleneck(
                    functions.Bottleneck(first, deep, excite, last, block), x.to(self.dtype)
                )
        return super().bottleneck(block, layers, x)

    def _is_bottleneck(
        self, block: MBConv, first: ConvNorm, deep: ConvNorm, last: ConvNorm, sides: Sequence[int]
    ) -> bool:
        """Whether the kernels can do an inverted bottleneck: each layer is as `MBConv` makes it, and fits."""
        if not (is_known(block) and type(block.drop) is StochasticDepth and self._fits(first, sides, 16)):
            return False
        between = _sides_after(first.conv, sides)
        if not self._fits(deep, between, 16) or not self._fits(last, _sides_after(deep.conv, between)):
            return False
        kernel, stride, channels = deep.conv.kernel_size[0], deep.conv.stride[0], deep.conv.out_channels
        depthwise = Geometry.of(deep.conv) == Geometry(stride, kernel // 2, channels)
        pointwise = last.conv.kernel_size == (1, 1) and Geometry.of(last.conv) == Geometry(1, 0)
        activations = [activation_of(layer) for layer in (first, deep, last)] == ["swish", "swish", "none"]
        plain = not _has_hooks(block.block) and not _has_hooks(block.drop)
        return depthwise and kernel in (3, 5) and stride in (1, 2) and pointwise and activations and plain

    def conv_norm(self, layer: ConvNorm, x: Tensor, other: Tensor | None = None) -> Tensor:
        """See `Execution`."""
        if not layer.norm.training:  # frozen
            out = layer(x)
            return out if other is None else F.relu_(out + other)
        if self._fits(layer, x.shape[2:]):
            from models.kernels import functions  # imports numba

            return functions.conv_norm(layer, x.to(self.dtype), None if other is None else other.to(self.dtype))
        conv, norm = layer.conv, layer.norm
        activation = activation_of(layer) if other is None else "relu"
        x, weight, geometry = _folded_2x2(x.to(self.dtype), conv.weight, Geometry.of(conv))
        return _ConvNorm.apply(x, weight, norm.weight, norm.bias, other, geometry, norm, activation)  # type: ignore[no-any-return]

    def conv_tanh_pool(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """See `Execution`."""
        geometry, x = Geometry.of(conv), x.to(self.dtype)
        if x.requires_grad:  # not the first layer: four neighbours double the time of the gradient of x
            out: Tensor = _MeanOfFour.apply(_ConvTanh.apply(x, conv.weight, _bias(conv), geometry))
            return out
        x, weight, geometry = _folded_2x2(x, pooled_weight(conv.weight), geometry._replace(stride=2))
        four = _ConvTanh.apply(x, weight, _bias(conv).repeat(4), geometry)
        return F.conv2d(four, averaging_weight(conv.out_channels, x))

    def max_pool(self, x: Tensor) -> Tensor:
        """See `Execution`."""
        return F.max_pool2d(x, 2)

    def map_mean(self, x: Tensor) -> Tensor:
        """See `Execution`."""
        out: Tensor = _MapMean.apply(x)
        return out


def _sides_after(conv: nn.Conv2d, sides: Sequence[int]) -> list[int]:
    """Height and width of a convolution's output."""
    stride, padding, _ = Geometry.of(conv)
    return [(side + 2 * padding - conv.kernel_size[0]) // stride + 1 for side in sides]


def _is_plain_excitation(layer: SqueezeExcitation) -> bool:
    """Whether squeeze-and-excitation is as its constructor makes it."""
    parts = (layer.reduce, layer.expand)
    plain = all(type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.bias is not None for conv in parts)
    return is_known(layer) and plain and not any(map(_has_hooks, [*parts, layer.activation]))


def _folded_2x2(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Geometry]:
    """Return images, weights and geometry of a convolution, folded if that suits."""
    folding = Folding.of(x, weight.shape[2], geometry)
    if folding is None:
        return x, weight, geometry
    return folding.images(x), folding.weight(weight), Geometry(1, 0)


class _ConvNorm(torch.autograd.Function):
    """Convolution, BatchNorm on batch statistics, optional sum, activation.

    Saves input and output of the convolution; the backward pass recomputes the output of BatchNorm.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, other: Tensor | None,
        geometry: Geometry, norm: nn.BatchNorm2d, activation: str,
    ) -> Tensor:  # fmt: skip
        low = weight.to(x.dtype, memory_format=CL)
        z = convolve(x, low, None, geometry)
        assert norm.momentum is not None and norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        mean, var = torch.batch_norm_update_stats(z, norm.running_mean, norm.running_var, norm.momentum)
        invstd = (var + norm.eps).rsqrt()
        scale = gamma * invstd
        shift = beta - mean * scale
        if other is None:
            y = scale_and_shift(z, scale, shift, activation)
        else:
            y = F.relu_(scale_and_shift(z, scale, shift).add_(other))
        ctx.save_for_backward(x, low, gamma, z, mean, invstd, scale, shift, y if activation == "relu" else None)
        ctx.geometry, ctx.eps, ctx.activation = geometry, norm.eps, activation
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, gamma, z, mean, invstd, scale, shift, y = ctx.saved_tensors
        grad = grad.contiguous(memory_format=CL)
        if ctx.activation == "relu":
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        elif ctx.activation == "swish":
            grad = torch.ops.aten.silu_backward(grad, scale_and_shift(z, scale, shift))
        grad_z, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
            grad, z, gamma, None, None, mean, invstd, True, ctx.eps, [True, True, True]
        )
        grad_x, grad_weight, _ = convolution_gradients(grad_z, x, low, ctx.geometry, ctx.needs_input_grad[0])
        grad_other = grad if ctx.needs_input_grad[4] else None
        return grad_x, grad_weight, grad_gamma, grad_beta, grad_other, None, None, None


class _ConvTanh(torch.autograd.Function):
    """Convolution and tanh, whose derivative follows from its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry) -> Tensor:
        low = weight.to(x.dtype, memory_format=CL)
        y = convolve(x, low, bias, geometry, "tanh")
        ctx.save_for_backward(x, low, y)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, y = ctx.saved_tensors
        grad = torch.ops.aten.tanh_backward(grad.contiguous(memory_format=CL), y)
        need_x = ctx.needs_input_grad[0]
        return *convolution_gradients(grad, x, low, ctx.geometry, need_x, bias=True), None


class _MeanOfFour(torch.autograd.Function):
    """Mean over 2x2 pixels, as a depthwise convolution and nearest neighbours: faster than average pooling."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return F.conv2d(x, torch.full((x.shape[1], 1, 2, 2), 0.25, dtype=x.dtype), stride=2, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        height, width = (side % 2 for side in ctx.shape[2:])
        spread = F.interpolate(grad.contiguous(memory_format=CL) / 4, scale_factor=2, mode="nearest")
        return F.pad(spread, (0, width, 0, height)) if height or width else spread


class _MapMean(torch.autograd.Function):
    """Mean over the map; a pooling window of the map's size is faster than `mean` in channels_last memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return F.avg_pool2d(x, x.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.div(ctx.shape[2] * ctx.shape[3]).expand(ctx.shape)


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, need_x: bool, bias: bool = False
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of a convolution's input, weights (float32) and bias (float32).

    For depthwise convolutions oneDNN's gradient of the input is slower than an equivalent convolution. In bf16 it has
    only its reference implementation at stride 2 (50 times slower), and for the weights of a 5x5 kernel (30 to 70
    times slower than 3x3). So the gradient of the input is a convolution with the flipped kernel, and that of 5x5
    weights is composed of four 3x3 corners.
    """
    depthwise = 1 < geometry.groups == len(weight) == x.shape[1]
    if depthwise and not bias and 2 * geometry.padding + 1 == weight.shape[2]:
        grad_x = _depthwise_input_gradient(grad, x.shape, weight, geometry) if need_x else None
        return grad_x, _depthwise_weight_gradient(grad, x, weight, geometry).float(), None
    grad_x, grad_weight, grad_bias = _aten_gradients(grad, x, weight, geometry, [need_x, True, bias])
    assert grad_weight is not None
    return grad_x, grad_weight.float(), None if grad_bias is None else grad_bias.float()


def _aten_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """Return torch's gradients of input, weights and bias that `mask` selects."""
    stride, padding, groups = geometry
    sizes = [len(weight)] if mask[2] else None
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        grad, x, weight, sizes, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, mask
    )


def _depthwise_input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, geometry: Geometry) -> Tensor:
    if (stride := geometry.stride) > 1:  # stride 1, with no gradient at the skipped outputs
        spread = torch.zeros_like(grad[:, :, :1, :1]).expand(shape).contiguous(memory_format=CL)
        spread[:, :, ::stride, ::stride] = grad
        grad = spread
    return convolve(grad, weight.flip(2, 3), None, geometry._replace(stride=1))


def _depthwise_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    kernel, stride = weight.shape[2], geometry.stride
    if kernel != 5 or stride > 2 or grad.dtype != torch.bfloat16:
        [_, whole, _] = _aten_gradients(grad, x, weight, geometry, [False, True, False])
        assert whole is not None
        return whole
    # a 3x3 kernel with padding 2 pairs output o with input o * stride + i - 2, i in 0..2: rows 0 to 2 of the 5x5
    # kernel, or rows 2 to 4 if the outputs move by two inputs; oneDNN is fast with padding 1
    result, corner, moved = torch.empty_like(weight), weight[:, :, :3, :3].contiguous(), 2 // stride
    sides = [(side + 4 - 3) // stride + 1 for side in x.shape[2:]]
    x = F.pad(x, (1, 1, 1, 1)).contiguous(memory_format=CL)
    for down in (0, 2):
        for right in (0, 2):
            before = [moved if offset else 0 for offset in (down, right)]
            after = [side - have - gap for side, have, gap in zip(sides, grad.shape[2:], before, strict=True)]
            padded = F.pad(grad, (before[1], after[1], before[0], after[0])).contiguous(memory_format=CL)
            [_, part, _] = _aten_gradients(padded, x, corner, geometry._replace(padding=1), [False, True, False])
            assert part is not None
            result[:, :, down : down + 3, right : right + 3] = part
    return result


class Inference(Execution):
    """A model in evaluation mode: BatchNorm folded into the convolutions, and a copy of the weights in `dtype`.

    Create a new one after the weights of the model change.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(model.eval(), dtype)
        self._weights: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # and biases, filled at first use

    def conv_norm(self, layer: ConvNorm, x: Tensor, other: Tensor | None = None) -> Tensor:
        """See `Execution`."""
        conv, activation = layer.conv, activation_of(layer)
        geometry, x = Geometry.of(conv), x.to(self.dtype)
        if layer not in self._weights:
            self._weights[layer] = self._prepared(*_folded(layer), geometry, x)
        weight, bias = self._weights[layer]
        if _is_dense(conv.kernel_size[0], geometry, x):
            rows = x.permute(0, 2, 3, 1).reshape(len(x), -1)
            out = F.linear(rows, weight, bias).view(len(x), 2, 2, -1).permute(0, 3, 1, 2)
            return activate(out, activation) if other is None else F.relu_(out.add_(other))
        if other is None:
            return convolve(x, weight, bias, geometry, activation)
        if self.with_kernels and conv.out_channels % 16 == 0:
            from models.kernels import functions  # imports numba

            return functions.add_bias(convolve(x, weight, None, geometry), bias, other.to(self.dtype))
        return F.relu_(convolve(x, weight, bias, geometry).add_(other))

    def conv_norm_pool(self, layer: ConvNorm, x: Tensor) -> Tensor:
        """See `Execution`. With kernels the output of the convolution is not activated before it is pooled."""
        geometry, x = Geometry.of(layer.conv), x.to(self.dtype)
        wide = layer.conv.out_channels % 16 == 0 and min(_sides_after(layer.conv, x.shape[2:])) > 1
        if not (self.with_kernels and wide) or _is_dense(layer.conv.kernel_size[0], geometry, x):
            return super().conv_norm_pool(layer, x)
        from models.kernels import functions  # imports numba

        if layer not in self._weights:
            weight, bias = _folded(layer)
            first = x.shape[1] <= MAX_FOLDED and geometry.groups == 1
            prepared = functions.stem_weight(weight) if first else self._prepared(weight, bias, geometry, x)[0]
            self._weights[layer] = prepared, bias
        weight, bias = self._weights[layer]
        if weight.dim() == 3:
            return functions.stem(x, weight, bias, layer.conv.kernel_size[0], geometry)
        return functions.add_bias_and_pool(convolve(x, weight, None, geometry), bias)

    def conv_tanh_pool(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """See `Execution`."""
        geometry, x = Geometry.of(conv)._replace(stride=2), x.to(self.dtype)
        if conv not in self._weights:
            weight, bias = pooled_weight(conv.weight), _bias(conv).repeat(4)
            self._weights[conv] = self._prepared(weight, bias, geometry, x)
        four = convolve(x, *self._weights[conv], geometry, "tanh")
        return F.conv2d(four, averaging_weight(conv.out_channels, x))

    def _prepared(self, weight: Tensor, bias: Tensor, geometry: Geometry, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convert weights once to the memory layout that suits x, rather than for each batch."""
        stride, padding, groups = geometry
        if _is_dense(weight.shape[2], geometry, x):
            return _dense(weight).to(self.dtype), bias.repeat(4).to(self.dtype)
        weight = weight.to(self.dtype, memory_format=CL)
        if PACK and _is_fused(x):
            weight = PACK(weight.to_mkldnn(), [padding] * 2, [stride] * 2, [1, 1], groups, list(x.shape))
        return weight, bias

    def max_pool(self, x: Tensor) -> Tensor:
        """See `Execution`. Rows first, then columns: both are long vectors in channels_last memory."""
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        rows = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
        return torch.maximum(rows[:, :, :, 0:width:2], rows[:, :, :, 1:width:2])

    def map_mean(self, x: Tensor) -> Tensor:
        """See `Execution`."""
        return F.avg_pool2d(x, x.shape[2:])


def close_calls(model: nn.Module) -> int:
    """Return n: one in n images, those with the smallest margins, needs fp32 for 99.9 % agreement with fp32.

    EfficientNets are deep, and most of their layers sum few products: of 5,000 garments bf16 alone decided 0.6 %
    differently, up to 0.16 % with one in 64 in fp32, 0.02 % with one in 32, none with one in 16. Other models need one
    in 64.
    """
    return 16 if any(isinstance(module, MBConv) for module in model.modules()) else 64


def _folded(layer: ConvNorm) -> tuple[Tensor, Tensor]:
    """Fold BatchNorm into the weights and biases of the convolution."""
    norm = layer.norm
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return layer.conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


def _is_dense(kernel: int, geometry: Geometry, x: Tensor) -> bool:
    """Whether a 3x3 convolution covers a whole 2x2 map at each pixel.

    Five of nine products are with padding: a fully connected layer needs 4/9 of the multiplications.
    """
    return x.shape[2:] == (2, 2) and kernel == 3 and geometry == Geometry(1, 1)


def _dense(weight: Tensor) -> Tensor:
    """Return weights of the fully connected layer: (C, in, 3, 3) to (4 C, 4 in), pixels before channels."""
    rows = [
        torch.cat([weight[:, :, 1 + qy - py, 1 + qx - px] for qy in (0, 1) for qx in (0, 1)], dim=1)
        for py in (0, 1)
        for px in (0, 1)
    ]
    return torch.cat(rows)


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether `pooled_weight` applies to a convolution."""
    settings = (conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    square = len({*conv.kernel_size}) == 1 and not isinstance(conv.padding, str) and len({*conv.padding}) == 1
    return is_known(conv) and settings == ((1, 1), (1, 1), 1, "zeros") and conv.bias is not None and square


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias

"""The execution of training: forward and backward in fewer passes than autograd takes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from models.efficientnet import MBConv, StochasticDepth
from models.execution.convolutions import (
    CL,
    Folding,
    Geometry,
    activation_of,
    averaging_weight,
    bias_of,
    convolution_gradients,
    convolve,
    pooled_weight,
    scale_and_shift,
    sides_after,
)
from models.execution.walk import Execution, has_hooks, is_known
from models.layers import ConvNorm, SqueezeExcitation
from models.resnet import ResidualBlock


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
        even = math.prod(sides_after(layer.conv, sides)) % 2 == 0
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
        between = sides_after(first.conv, sides)
        if not self._fits(deep, between, 16) or not self._fits(last, sides_after(deep.conv, between)):
            return False
        kernel, stride, channels = deep.conv.kernel_size[0], deep.conv.stride[0], deep.conv.out_channels
        depthwise = Geometry.of(deep.conv) == Geometry(stride, kernel // 2, channels)
        pointwise = last.conv.kernel_size == (1, 1) and Geometry.of(last.conv) == Geometry(1, 0)
        activations = [activation_of(layer) for layer in (first, deep, last)] == ["swish", "swish", "none"]
        plain = not has_hooks(block.block) and not has_hooks(block.drop)
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
            out: Tensor = _MeanOfFour.apply(_ConvTanh.apply(x, conv.weight, bias_of(conv), geometry))
            return out
        x, weight, geometry = _folded_2x2(x, pooled_weight(conv.weight), geometry._replace(stride=2))
        four = _ConvTanh.apply(x, weight, bias_of(conv).repeat(4), geometry)
        return F.conv2d(four, averaging_weight(conv.out_channels, x))

    def max_pool(self, x: Tensor) -> Tensor:
        """See `Execution`."""
        return F.max_pool2d(x, 2)

    def map_mean(self, x: Tensor) -> Tensor:
        """See `Execution`."""
        out: Tensor = _MapMean.apply(x)
        return out


def _is_plain_excitation(layer: SqueezeExcitation) -> bool:
    """Whether squeeze-and-excitation is as its constructor makes it."""
    parts = (layer.reduce, layer.expand)
    plain = all(type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.bias is not None for conv in parts)
    return is_known(layer) and plain and not any(map(has_hooks, [*parts, layer.activation]))


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

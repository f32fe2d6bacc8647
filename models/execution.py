"""How a network is executed: the same function as its `forward`, arranged for the processor.

A model's `layers` say what it computes; here stands how that is done fast. `Training` and `Inference` walk over these
layers with operations of their own for the blocks of this package, and call every other layer as it is, so a new model
works before anybody has thought of its speed. Parameters and buffers are the model's own.

On a CPU time goes into passes over memory more than into arithmetic. So: what follows a convolution is done in the same
pass where oneDNN can do it (its "post-operations": bias, activation, sum), BatchNorm is one pass for the statistics
and one for all the rest, and convolutions of few channels compute four neighbouring pixels as channels. Operations that
oneDNN has only a reference implementation for in bf16 are done in fp32. What each is worth stands in
benchmarks/README.md; the choice depends on the kind of layer and nothing else, so the same model gives the same bits.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from models.efficientnet import MBConv
from models.layers import ConvNorm, GlobalAveragePool, LayerStack, SqueezeExcitation
from models.resnet import ResidualBlock

CL = torch.channels_last
ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "swish", nn.Tanh: "tanh"}  # as oneDNN calls them
FUSED = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
PACK = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d, activation: str = "none", stride: int | None = None
) -> Tensor:
    """Convolution, bias and activation in one pass where oneDNN is there; padding and groups are those of `conv`."""
    strides = _strides(conv, stride)
    padding = _padding(conv)
    if _is_fused(x):
        operation = torch.ops.mkldnn._convolution_pointwise
        out: Tensor = operation(x, weight, bias, padding, strides, [1, 1], conv.groups, activation, [], "")
        return out
    out = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), strides, padding, 1, conv.groups)
    return activate(out, activation)


def _strides(conv: nn.Conv2d, other: int | None) -> list[int]:
    return list(conv.stride) if other is None else [other, other]


def _padding(conv: nn.Conv2d) -> list[int]:
    assert not isinstance(conv.padding, str)
    return list(conv.padding)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, activation: str = "none") -> Tensor:
    """activation(scale * x + shift), one factor and summand a channel: a depthwise 1x1 convolution, so one pass.

    The factors are rounded to the type of x, as weights are.
    """
    if not _is_fused(x):
        return activate(torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1)).to(x.dtype), activation)
    weight, ones = scale.view(-1, 1, 1, 1).to(x.dtype), [1, 1]
    operation = torch.ops.mkldnn._convolution_pointwise
    out: Tensor = operation(x, weight, shift, [0, 0], ones, ones, len(scale), activation, [], "")
    return out


def _is_fused(x: Tensor) -> bool:
    return FUSED and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


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
    """What follows the BatchNorm, as oneDNN calls it."""
    return ACTIVATIONS[type(layer[2])] if len(layer) > 2 else "none"


def pooled_weight(weight: Tensor) -> Tensor:
    """Weights of the convolution with stride 2 that computes four neighbours of one with stride 1 as channels.

    A convolution of 6 channels fills no vector of 16, one of 24 does. Weights of shape (C, in, k, k) become
    (4 C, in, k + 1, k + 1), and average pooling over 2x2 pixels becomes a mean over four channels (`averaging_weight`).
    """
    return torch.cat([F.pad(weight, (right, 1 - right, down, 1 - down)) for down in (0, 1) for right in (0, 1)])


def averaging_weight(channels: int, like: Tensor) -> Tensor:
    """1x1 convolution that takes the mean over the four neighbours of `pooled_weight`: (C, 4 C, 1, 1)."""
    return (torch.eye(channels, dtype=like.dtype, device=like.device).repeat(1, 4) / 4)[:, :, None, None]


class Execution:
    """Walks over the layers of a model.

    Parameters
    ----------
    model : LayerStack
        In channels_last memory.
    dtype : torch.dtype
        Of convolutions and matrix products.
    """

    def __init__(self, model: LayerStack, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Map images, shape (N, channels, H, W), to logits, shape (N, classes)."""
        device = x.device.type  # layers without an operation here cast for themselves
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            return self.sequence(self.model.layers, x.to(self.dtype))

    def sequence(self, layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Apply layers one after the other; some are done together."""
        rest = list(layers)
        while rest:
            match rest:
                case [nn.Conv2d() as conv, nn.Tanh(), nn.AvgPool2d(kernel_size=2, stride=2, padding=0), *rest] if (
                    _is_plain(conv)
                ):
                    x = self.conv_tanh_pool(conv, x)
                case [layer, *rest]:
                    x = self.layer(layer, x)
        return x

    def layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply one layer."""
        match layer:
            case ConvNorm():
                return self.conv_norm(layer, x)
            case SqueezeExcitation():
                return x * torch.sigmoid(self.excitation(layer, self.map_mean(x)))
            case ResidualBlock():
                return self.residual_block(layer, x)
            case MBConv():
                out = self.sequence(layer.block, x)
                return layer.drop(out) + x if layer.residual else out
            case nn.Sequential():
                return self.sequence(layer, x)
            case GlobalAveragePool():
                return self.map_mean(x).flatten(1)
            case nn.MaxPool2d(kernel_size=2, stride=2, padding=0):
                return self.max_pool(x)
        return layer(x)  # type: ignore[no-any-return]

    def residual_block(self, block: ResidualBlock, x: Tensor) -> Tensor:
        """Add the shortcut in the pass of the last BatchNorm, unless squeeze-and-excitation stands between."""
        shortcut = x if isinstance(block.shortcut, nn.Identity) else self.layer(block.shortcut, x)
        *others, last = block.residual
        x = self.sequence(others, x)
        if isinstance(last, ConvNorm):
            return self.conv_norm(last, x, shortcut)
        return F.relu_(self.layer(last, x) + shortcut)

    # what the two kinds of execution do differently

    def conv_norm(self, layer: ConvNorm, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolution, BatchNorm, and the activation; or, with `other`, the sum with it and ReLU."""
        raise NotImplementedError

    def conv_tanh_pool(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Convolution, tanh, and the mean over 2x2 pixels."""
        raise NotImplementedError

    def max_pool(self, x: Tensor) -> Tensor:
        """Maximum over 2x2 pixels."""
        raise NotImplementedError

    def map_mean(self, x: Tensor) -> Tensor:
        """Mean over the map: (N, C, 1, 1)."""
        raise NotImplementedError

    def excitation(self, layer: SqueezeExcitation, squeezed: Tensor) -> Tensor:
        """The two fully connected layers of squeeze-and-excitation."""
        out: Tensor = layer.expand(layer.activation(layer.reduce(squeezed)))
        return out


class Training(Execution):
    """A model in training mode on a CPU: what autograd would do in a pass for each operation, done in fewer.

    Batch and running statistics and gradients are those of `model(x)` under autocast, but for rounding.
    """

    def conv_norm(self, layer: ConvNorm, x: Tensor, other: Tensor | None = None) -> Tensor:
        """See `Execution`."""
        conv, norm = layer.conv, layer.norm
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        activation = activation_of(layer) if other is None else "relu"
        inputs = (x, conv.weight, norm.weight, norm.bias, other)
        out: Tensor = _ConvNorm.apply(*inputs, conv, norm, activation)
        return out

    def conv_tanh_pool(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """See `Execution`."""
        if x.requires_grad:  # not the first layer: the gradient of x takes twice as long through four neighbours
            out: Tensor = _MeanOfFour.apply(_ConvTanh.apply(x, conv.weight, _bias(conv), conv, 1))
            return out
        four = _ConvTanh.apply(x, pooled_weight(conv.weight), _bias(conv).repeat(4), conv, 2)
        return F.conv2d(four, averaging_weight(conv.out_channels, x))

    def max_pool(self, x: Tensor) -> Tensor:
        """See `Execution`."""
        return F.max_pool2d(x, 2)

    def map_mean(self, x: Tensor) -> Tensor:
        """See `Execution`."""
        out: Tensor = _MapMean.apply(x)
        return out


class _ConvNorm(torch.autograd.Function):
    """Convolution, BatchNorm on batch statistics, optional sum, activation.

    Kept for the way back are the convolution's input and output; what BatchNorm made of it is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, other: Tensor | None,
        conv: nn.Conv2d, norm: nn.BatchNorm2d, activation: str,
    ) -> Tensor:  # fmt: skip
        low = weight.to(x.dtype)
        z = convolve(x, low, None, conv)
        assert norm.momentum is not None
        mean, var = torch.batch_norm_update_stats(z, norm.running_mean, norm.running_var, norm.momentum)
        invstd = (var + norm.eps).rsqrt()
        scale = gamma * invstd
        shift = beta - mean * scale
        if other is None:
            y = scale_and_shift(z, scale, shift, activation)
        else:
            y = F.relu_(scale_and_shift(z, scale, shift).add_(other))
        ctx.save_for_backward(x, low, gamma, z, mean, invstd, scale, shift, y if activation == "relu" else None)
        ctx.conv, ctx.eps, ctx.activation = conv, norm.eps, activation
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
        grad_x, grad_weight, _ = _convolution_backward(grad_z, x, low, ctx.conv, ctx.needs_input_grad[0])
        grad_other = grad if ctx.needs_input_grad[4] else None
        return grad_x, grad_weight, grad_gamma, grad_beta, grad_other, None, None, None


class _ConvTanh(torch.autograd.Function):
    """Convolution and tanh, whose derivative follows from its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, conv: nn.Conv2d, stride: int) -> Tensor:
        low = weight.to(x.dtype, memory_format=CL)
        y = convolve(x, low, bias, conv, "tanh", stride)
        ctx.save_for_backward(x, low, y)
        ctx.conv, ctx.stride = conv, stride
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, y = ctx.saved_tensors
        grad = torch.ops.aten.tanh_backward(grad.contiguous(memory_format=CL), y)
        need_x = ctx.needs_input_grad[0]
        return *_convolution_backward(grad, x, low, ctx.conv, need_x, ctx.stride, bias=True), None, None


class _MeanOfFour(torch.autograd.Function):
    """Mean over 2x2 pixels; a depthwise convolution and nearest neighbours are what average pooling should cost."""

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
    """Mean over the map; pooling with a window as large as the map is faster than `mean` in channels_last memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return F.avg_pool2d(x, x.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.div(ctx.shape[2] * ctx.shape[3]).expand(ctx.shape)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: nn.Conv2d,
    need_x: bool,
    stride: int | None = None,
    bias: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of a convolution's input, weights (float32) and bias (float32).

    In bf16 oneDNN has but its reference implementation for depthwise convolutions: of the input where the stride is 2
    (95 times slower than in fp32), of the weights where the kernel is 5x5 (3 times slower). Those are done in fp32.
    """
    strides = _strides(conv, stride)

    def gradients(dtype: torch.dtype, mask: list[bool]) -> tuple[Tensor | None, ...]:
        operands = [tensor.to(dtype) for tensor in (grad, x, weight)]
        sizes = [len(weight)] if bias else None
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            *operands, sizes, strides, _padding(conv), [1, 1], False, [0, 0], conv.groups, mask
        )

    if conv.groups == 1 or x.dtype == torch.float32:
        grad_x, grad_weight, grad_bias = gradients(x.dtype, [need_x, True, bias])
    else:
        grad_x = gradients(torch.float32 if strides[0] > 1 else x.dtype, [need_x, False, False])[0]
        of_weight = torch.float32 if weight.shape[2] > 3 else x.dtype
        _, grad_weight, grad_bias = gradients(of_weight, [False, True, bias])
    assert grad_weight is not None
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        grad_weight.float(),
        None if grad_bias is None else grad_bias.float(),
    )


class Inference(Execution):
    """A model in evaluation mode: BatchNorm folded into the convolutions, weights in `dtype`, as they are now.

    Made anew whenever the model's weights have changed.
    """

    def __init__(self, model: LayerStack, dtype: torch.dtype) -> None:
        super().__init__(model.eval(), dtype)
        self._weights: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # and biases, of layers as they are used

    def conv_norm(self, layer: ConvNorm, x: Tensor, other: Tensor | None = None) -> Tensor:
        """See `Execution`."""
        conv = layer.conv
        if layer not in self._weights:
            self._weights[layer] = self._prepared(conv, *_folded(layer), x)
        weight, bias = self._weights[layer]
        activation = activation_of(layer)
        if _is_dense(conv, x):
            rows = x.permute(0, 2, 3, 1).reshape(len(x), -1)
            out = F.linear(rows, weight, bias).view(len(x), 2, 2, -1).permute(0, 3, 1, 2)
            return activate(out, activation) if other is None else F.relu_(out.add_(other))
        if other is None:
            return convolve(x, weight, bias, conv, activation)
        return F.relu_(convolve(x, weight, bias, conv).add_(other))

    def conv_tanh_pool(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """See `Execution`."""
        if conv not in self._weights:
            weight, bias = pooled_weight(conv.weight), _bias(conv).repeat(4)
            self._weights[conv] = self._prepared(conv, weight, bias, x, stride=2)
        four = convolve(x, *self._weights[conv], conv, "tanh", stride=2)
        return F.conv2d(four, averaging_weight(conv.out_channels, x))

    def _prepared(
        self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, x: Tensor, stride: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights in the order in memory that is best for such an x: put into it once, and not for each batch."""
        if _is_dense(conv, x):
            return _dense(weight).to(self.dtype), bias.repeat(4).to(self.dtype)
        weight = weight.to(self.dtype, memory_format=CL)
        if PACK and _is_fused(x):
            strides = _strides(conv, stride)
            weight = PACK(weight.to_mkldnn(), _padding(conv), strides, [1, 1], conv.groups, list(x.shape))
        return weight, bias

    def max_pool(self, x: Tensor) -> Tensor:
        """See `Execution`. Of rows first, then of columns: both are long vectors in channels_last memory."""
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        rows = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
        return torch.maximum(rows[:, :, :, 0:width:2], rows[:, :, :, 1:width:2])

    def map_mean(self, x: Tensor) -> Tensor:
        """See `Execution`."""
        return F.avg_pool2d(x, x.shape[2:])


def _folded(layer: ConvNorm) -> tuple[Tensor, Tensor]:
    """Weights and biases of the one convolution that a convolution and its BatchNorm are in evaluation."""
    norm = layer.norm
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return layer.conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


def _is_dense(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a 3x3 convolution sees all of the map at each of its 2x2 pixels.

    Five of its nine products are with padding then: as a fully connected layer it has 4/9 of the multiplications.
    """
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return x.shape[2:] == (2, 2) and shape == ((3, 3), (1, 1), (1, 1), 1)


def _dense(weight: Tensor) -> Tensor:
    """The fully connected layer of `_is_dense`: (C, in, 3, 3) to (4 C, 4 in), pixels before channels."""
    rows = [
        torch.cat([weight[:, :, 1 + qy - py, 1 + qx - px] for qy in (0, 1) for qx in (0, 1)], dim=1)
        for py in (0, 1)
        for px in (0, 1)
    ]
    return torch.cat(rows)


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether `pooled_weight` can be made of it."""
    settings = (conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    return settings == ((1, 1), (1, 1), 1, "zeros") and conv.bias is not None and not isinstance(conv.padding, str)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias

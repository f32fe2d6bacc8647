"""Convolutions in few passes over memory, and their gradients; forms of a convolution that suit the processor."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from models.layers import ConvNorm

CL = torch.channels_last
ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "swish"}  # oneDNN's names
FUSED = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
FUSED_BF16 = FUSED and torch.ops.mkldnn._is_mkldnn_bf16_supported()
MAX_FOLDED = 4  # largest number of channels that `Folding` suits


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
    if is_fused(x):
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
    if not is_fused(x):
        return activate(torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1)).to(x.dtype), activation)
    return convolve(x, scale.view(-1, 1, 1, 1).to(x.dtype), shift, Geometry(1, 0, len(scale)), activation)


def is_fused(x: Tensor) -> bool:
    """Whether oneDNN computes what follows a convolution of x in its pass."""
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


def sides_after(conv: nn.Conv2d, sides: Sequence[int]) -> list[int]:
    """Height and width of a convolution's output."""
    stride, padding, _ = Geometry.of(conv)
    return [(side + 2 * padding - conv.kernel_size[0]) // stride + 1 for side in sides]


def bias_of(conv: nn.Conv2d) -> Tensor:
    """Return the bias of a layer that has one."""
    assert conv.bias is not None
    return conv.bias


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
        if not (suits and is_fused(x)) or x.shape[2] % 2 or x.shape[3] % 2:
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

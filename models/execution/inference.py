"""The execution of evaluation: weights prepared once, BatchNorm folded into them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from models.efficientnet import MBConv
from models.execution.convolutions import (
    CL,
    MAX_FOLDED,
    Geometry,
    activate,
    activation_of,
    averaging_weight,
    bias_of,
    convolve,
    is_fused,
    pooled_weight,
    sides_after,
)
from models.execution.walk import Execution
from models.layers import ConvNorm

PACK = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)


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
        wide = layer.conv.out_channels % 16 == 0 and min(sides_after(layer.conv, x.shape[2:])) > 1
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
            weight, bias = pooled_weight(conv.weight), bias_of(conv).repeat(4)
            self._weights[conv] = self._prepared(weight, bias, geometry, x)
        four = convolve(x, *self._weights[conv], geometry, "tanh")
        return F.conv2d(four, averaging_weight(conv.out_channels, x))

    def _prepared(self, weight: Tensor, bias: Tensor, geometry: Geometry, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convert weights once to the memory layout that suits x, rather than for each batch."""
        stride, padding, groups = geometry
        if _is_dense(weight.shape[2], geometry, x):
            return _dense(weight).to(self.dtype), bias.repeat(4).to(self.dtype)
        weight = weight.to(self.dtype, memory_format=CL)
        if PACK and is_fused(x):
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

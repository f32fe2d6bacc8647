"""Building blocks of several families."""

import torch
from torch import Tensor, nn

WIDEST = 16_384  # inputs or outputs of a fully connected layer in bf16; LeNet-5 at 128 px has 14,400
BATCH_NORM_MOMENTUM = 0.3  # torch's 0.1 is for long epochs; see ConvNorm


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm and, unless `activation` is None, an activation.

    The convolution has no bias, since BatchNorm subtracts it. Padding preserves the size (divided by the stride,
    rounded up).

    Running statistics move by `BATCH_NORM_MOMENTUM` per step. The tasks have 3 to 30 steps per epoch: with torch's 0.1
    the statistics lagged behind the weights in the first epochs of task 1, and early stopping could end VGGNet in
    epoch 8 at chance.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels, momentum=BATCH_NORM_MOMENTUM),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution."""
        return self[0]  # type: ignore[return-value]

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The BatchNorm."""
        return self[1]  # type: ignore[return-value]


class SqueezeExcitation(nn.Module):
    """GAP -> FC -> activation -> FC -> sigmoid -> scale (Hu et al. 2017, arXiv:1709.01507).

    A summary of the whole image (squeeze) scales each channel (excitation). The two fully connected layers are 1x1
    convolutions, which are equivalent on a 1x1 map, with `squeezed` hidden units:
    2 * channels * squeezed + squeezed + channels parameters.
    """

    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.activation = activation(inplace=True)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel of x, shape (N, C, H, W), by a factor from 0 to 1."""
        squeezed = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        return x * torch.sigmoid(self.expand(self.activation(self.reduce(squeezed))))


class GlobalAveragePool(nn.Module):
    """Mean over the map: (N, C, H, W) to (N, C) for any image size."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of each channel."""
        return x.mean((2, 3))


class Float32Linear(nn.Linear):
    """A fully connected layer that computes in fp32 even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_features) to (N, out_features), float32."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float())
        return super().forward(x)


def compute_wide_layers_in_fp32(model: nn.Module) -> None:
    """Make fully connected layers with more than `WIDEST` inputs or outputs compute in fp32.

    In bf16 very wide layers crash the process in torch 2.15's CPU library on processors with AMX. The rule depends on
    the size alone, well below the widths that crash, so that a model is the same on every machine.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and max(layer.in_features, layer.out_features) > WIDEST:
            layer.__class__ = Float32Linear  # same parameters under the same names


class LayerStack(nn.Module):
    """A network that applies `self.layers` in order."""

    layers: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        """Map images, shape (N, channels, H, W), to logits, shape (N, classes)."""
        for layer in self.layers:
            x = layer(x)
        return x

"""EfficientNet: a light variant and B0."""

import torch
from torch import Tensor, nn

from models.layers import ConvNorm, GlobalAveragePool, LayerStack, SqueezeExcitation
from models.registry import register


class StochasticDepth(nn.Module):
    """Drop a residual for an image with probability `rate` in training (Huang et al. 2016, arXiv:1603.09382).

    The other residuals are scaled up to preserve the mean. If all images of a batch were dropped, all are kept, so
    that every weight has a gradient at every step.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x, shape (N, C, H, W), with some images zero."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.rate
        keep |= ~keep.any()
        return x * keep / (1 - self.rate)


class MBConv(nn.Module):
    """Inverted bottleneck: C1x1 (expand) -> depthwise C -> SE -> C1x1 (project), plus the input if shapes allow.

    From MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) with SE. The depthwise convolution does the spatial
    work with one filter per channel, so it can afford many channels; the narrow ends carry the state.

    `kernel` and `stride` are those of the depthwise convolution. `expansion` is the inner width as a multiple of
    in_channels; 1 omits the first convolution. `drop` is the rate of `StochasticDepth`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int, drop: float
    ) -> None:
        super().__init__()
        self.notation = f"MB{expansion} {kernel}x{kernel}" + (f"/{stride}" if stride > 1 else "") + f"({out_channels})"
        inner = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers.append(ConvNorm(in_channels, inner, 1, activation=nn.SiLU))
        layers += [
            ConvNorm(inner, inner, kernel, stride, groups=inner, activation=nn.SiLU),
            SqueezeExcitation(inner, max(1, in_channels // 4), nn.SiLU),
            ConvNorm(inner, out_channels, 1, activation=None),
        ]
        self.block = nn.Sequential(*layers)
        self.residual = in_channels == out_channels and stride == 1
        self.drop = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out: Tensor = self.block(x)
        return self.drop(out) + x if self.residual else out


def _stages(rows: list[tuple[int, int, int, int, int]], in_channels: int, drop: float) -> list[nn.Module]:
    """Turn rows of (expansion, kernel, stride, channels, repeats) into blocks; `drop` grows with depth."""
    total = sum(repeats for *_, repeats in rows)
    blocks: list[nn.Module] = []
    for expansion, kernel, stride, channels, repeats in rows:
        for i in range(repeats):
            rate = drop * len(blocks) / total
            blocks.append(MBConv(in_channels, channels, kernel, stride if i == 0 else 1, expansion, rate))
            in_channels = channels
    return blocks


@register("efficientnet_lite")
class EfficientNetLite(LayerStack):
    """A light EfficientNet: half of B0's depth, 3x3 only, no dropout (after Tan and Le 2019, arXiv:1905.11946).

    It shows the benefit of the inverted bottleneck with SE at a fraction of B0's cost. It omits the 5x5 depthwise
    convolutions and the 1x1 convolution to 1280 channels, which dominate B0's time on small machines.

    ======================  ================  ================
    stage                   28 x 28           128 x 128
    ======================  ================  ================
    C3x3/2 BN SiLU (32)     32 x 14 x 14      32 x 64 x 64
    MB1 3x3 (16)            16 x 14 x 14      16 x 64 x 64
    MB4 3x3/2 (24) x2       24 x 7 x 7        24 x 32 x 32
    MB4 3x3/2 (40) x2       40 x 4 x 4        40 x 16 x 16
    MB4 3x3/2 (80) x2       80 x 2 x 2        80 x 8 x 8
    MB4 3x3/2 (128)         128 x 1 x 1       128 x 4 x 4
    GAP, FC                 128 -> classes    128 -> classes
    parameters              218,910           218,454
    multiply-accumulates    1.8 M             34.4 M
    ======================  ================  ================

    The columns are for 1 channel and 10 classes, and for 3 channels and 2 classes. Widths: B0's of the same
    stages up to 80, then 128; expansion 4 instead of 6, since the maps inside the blocks take most of the time.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        rows = [  # expansion, kernel, stride, channels, repeats
            (1, 3, 1, 16, 1),
            (4, 3, 2, 24, 2),
            (4, 3, 2, 40, 2),
            (4, 3, 2, 80, 2),
            (4, 3, 2, 128, 1),
        ]
        self.layers = nn.ModuleList([
            ConvNorm(in_channels, 32, 3, stride=2, activation=nn.SiLU),  # C3x3/2 BN SiLU
            *_stages(rows, 32, drop=0.0),                                # 8 MB with SE
            GlobalAveragePool(),                                         # GAP
            nn.Linear(128, num_classes),                                 # FC
        ])  # fmt: skip


@register("efficientnet_b0")
class EfficientNetB0(LayerStack):
    """EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946, table 1).

    The network that an automatic search found at about 400 M multiply-accumulates for 224 px images, and the base
    of a family that grows depth, width and resolution together. With dropout 0.2 and stochastic depth 0.2, as
    torchvision builds it, and with `state_dict()` in torchvision's order, so that its weights fit. Two things suit
    small data sets: BatchNorm moves faster (`ConvNorm`), and the classifier keeps torch's initial range, 0.03; the
    usual 1 / sqrt(classes) is that for 1000 classes and would be 0.7 for two.

    ======================  ================  ================
    stage                   28 x 28           128 x 128
    ======================  ================  ================
    C3x3/2 BN SiLU (32)     32 x 14 x 14      32 x 64 x 64
    MB1 3x3 (16)            16 x 14 x 14      16 x 64 x 64
    MB6 3x3/2 (24) x2       24 x 7 x 7        24 x 32 x 32
    MB6 5x5/2 (40) x2       40 x 4 x 4        40 x 16 x 16
    MB6 3x3/2 (80) x3       80 x 2 x 2        80 x 8 x 8
    MB6 5x5 (112) x3        112 x 2 x 2       112 x 8 x 8
    MB6 5x5/2 (192) x4      192 x 1 x 1       192 x 4 x 4
    MB6 3x3 (320)           320 x 1 x 1       320 x 4 x 4
    C1x1 BN SiLU (1280)     1280 x 1 x 1      1280 x 4 x 4
    GAP, FC                 1280 -> classes   1280 -> classes
    parameters              4,019,782         4,010,110
    multiply-accumulates    7.9 M             126.0 M
    ======================  ================  ================

    The columns are for 1 channel and 10 classes, and for 3 channels and 2 classes. Widths are the paper's:
    5,288,548 parameters for 3 channels and 1000 classes.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        rows = [  # expansion, kernel, stride, channels, repeats
            (1, 3, 1, 16, 1),
            (6, 3, 2, 24, 2),
            (6, 5, 2, 40, 2),
            (6, 3, 2, 80, 3),
            (6, 5, 1, 112, 3),
            (6, 5, 2, 192, 4),
            (6, 3, 1, 320, 1),
        ]
        self.layers = nn.ModuleList([
            ConvNorm(in_channels, 32, 3, stride=2, activation=nn.SiLU),  # C3x3/2 BN SiLU
            *_stages(rows, 32, drop=0.2),                                # 16 MB with SE
            ConvNorm(320, 1280, 1, activation=nn.SiLU),                  # C1x1 BN SiLU
            GlobalAveragePool(),                                         # GAP
            nn.Dropout(0.2, inplace=True),
            nn.Linear(1280, num_classes),                                # FC
        ])  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

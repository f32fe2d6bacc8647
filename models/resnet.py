"""Residual networks: without and with squeeze-and-excitation."""

from torch import Tensor, nn

from models.layers import ConvNorm, GlobalAveragePool, LayerStack, SqueezeExcitation
from models.registry import register


class ResidualBlock(nn.Module):
    """H(x) = F(x) + x, where F is C3x3 BN R C3x3 BN (and SE), then R.

    If F changes the shape, the shortcut is a 1x1 convolution with BatchNorm (the paper's option B). The stride is that
    of the first convolution. With a `reduction`, F ends in SE with out_channels / reduction hidden units.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, reduction: int | None = None) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ConvNorm(in_channels, out_channels, 3, stride),
            ConvNorm(out_channels, out_channels, 3, activation=None),
        )
        if reduction is not None:
            self.residual.append(SqueezeExcitation(out_channels, out_channels // reduction))
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(in_channels, out_channels, 1, stride, activation=None)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return out


@register
class ResNetCNN(LayerStack):
    """A small residual network (He, Zhang, Ren and Sun 2015, arXiv:1512.03385).

    With the shortcut a block learns a residual rather than the whole mapping, and gradients bypass it unchanged,
    which makes deep networks trainable. Global average pooling leaves one number per channel, so the classifier is
    small and the same for every image size.

    ======================  ==============  ===============
    stage                   28 x 28         128 x 128
    ======================  ==============  ===============
    C7x7/2 BN R (64)        64 x 14 x 14    64 x 64 x 64
    S2 (max pool)           64 x 7 x 7      64 x 32 x 32
    residual block          64 x 7 x 7      64 x 32 x 32
    residual block /2       128 x 4 x 4     128 x 16 x 16
    residual block /2       256 x 2 x 2     256 x 8 x 8
    GAP, FC                 256 -> classes  256 -> classes
    parameters              1,229,002       1,233,218
    multiply-accumulates    11.6 M          231.5 M
    ======================  ==============  ===============

    The columns are for 1 channel and 10 classes, and for 3 channels and 2 classes. Widths: the paper's own first
    three stages (64, 128, 256) with one block each, which meet the limits of 15 M and 250 M with the paper's
    stride-2 stem at both sizes.
    """

    reduction: int | None = None

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([
            ConvNorm(in_channels, 64, 7, stride=2),         # C7x7/2 BN R  colour and edges, at half the size
            nn.MaxPool2d(2),                                # S2
            ResidualBlock(64, 64, 1, self.reduction),       # C3x3 BN R C3x3 BN + x, R
            ResidualBlock(64, 128, 2, self.reduction),      # the same at half the size and twice the width
            ResidualBlock(128, 256, 2, self.reduction),
            GlobalAveragePool(),                            # GAP
            nn.Linear(256, num_classes),                    # FC
        ])  # fmt: skip


@register
class SEResNet(ResNetCNN):
    """ResNetCNN with squeeze-and-excitation in each residual block (Hu, Shen and Sun 2017, arXiv:1709.01507).

    A convolution weighs its channels alike for every image. The SE block scales them by a summary of the whole image,
    for under a hundredth of the multiply-accumulates.

    ======================  ==============  ===============
    stage                   28 x 28         128 x 128
    ======================  ==============  ===============
    parameters              1,240,230       1,244,446
    multiply-accumulates    11.6 M          231.5 M
    ======================  ==============  ===============

    Stages and widths are ResNetCNN's, so that the two differ in SE alone; the reduction r = 16 is the paper's. It adds
    2C^2/r + C/r + C parameters per block of C channels.
    """

    reduction = 16

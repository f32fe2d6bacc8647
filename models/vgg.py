"""VGG-style network."""

from torch import nn

from models.layers import ConvNorm, GlobalAveragePool, LayerStack
from models.registry import register


@register
class VGGNet(LayerStack):
    """VGG with BatchNorm (Simonyan and Zisserman 2014, arXiv:1409.1556; Ioffe and Szegedy 2015, arXiv:1502.03167).

    Only 3x3 convolutions: two of them see as far as one 5x5, with fewer weights and one more nonlinearity. Each block
    of convolutions ends in a max pool that halves the map, while the channels double. The depth follows the paper's
    configuration A (1, 1, 2, 2, 2 convolutions per block) until the map is 3 or 4 pixels wide.

    ======================  ======================  ======================
    stage                   28 x 28                 128 x 128
    ======================  ======================  ======================
    block 1                 C3x3 (32)   S2  14x14   C3x3 (16)   S2  64x64
    block 2                 C3x3 (64)   S2  7x7     C3x3 (32)   S2  32x32
    block 3                 2 C3x3 (128) S2 3x3     2 C3x3 (64) S2  16x16
    block 4                                         2 C3x3 (128) S2 8x8
    block 5                                         2 C3x3 (128) S2 4x4
    GAP, FC                 128 -> classes          128 -> classes
    parameters              241,898                 578,066
    multiply-accumulates    14.7 M                  158.1 M
    ======================  ======================  ======================

    The columns are for 1 channel and 10 classes, and for 3 channels and 2 classes. Widths: the first block gets
    32 channels on small images and 16 on large ones (from 64 px), whose maps are 21 times as large; each block doubles
    them up to 128. This is the widest within 15 M multiply-accumulates at 28 px, and well within 250 M at 128 px. One
    fully connected layer after a global average pool replaces the paper's three, which suit a million images: with
    the 334 training images of task 1 a hidden layer of 128 did no better and sometimes stayed at chance (validation
    50 to 68 % against 68 to 75 % over the first splits).
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width, side = (32 if image_size < 64 else 16), image_size
        for convolutions in (1, 1, 2, 2, 2):
            if side < 6:  # half of it would be less than 3 pixels
                break
            for _ in range(convolutions):
                layers.append(ConvNorm(in_channels, width, 3))  # C3x3 BN R  see a little further
                in_channels = width
            layers.append(nn.MaxPool2d(2))  # S2         keep the strongest answer
            width, side = min(2 * width, 128), side // 2
        self.layers = nn.ModuleList([
            *layers,
            GlobalAveragePool(),                                    # GAP
            nn.Linear(in_channels, num_classes),                    # FC
        ])  # fmt: skip

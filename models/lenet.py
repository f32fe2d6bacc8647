"""LeNet-5."""

from torch import nn

from models.layers import LayerStack
from models.registry import register


@register
class LeNet5(LayerStack):
    """LeNet-5 (LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document recognition").

    The first convolutional network in wide use: two rounds of local features and subsampling, then three fully
    connected layers. Newer ideas (ReLU, BatchNorm, depth, shortcuts) are compared with it, so it keeps tanh, average
    pooling, and 6 and 16 channels. As usual, the partial connections between the two convolutions and the radial
    output units of the original are omitted.

    ======================  ================  ==================
    stage                   28 x 28           128 x 128
    ======================  ================  ==================
    C5x5 (6) T              6 x 28 x 28       6 x 128 x 128
    S2                      6 x 14 x 14       6 x 64 x 64
    C5x5 (16) T             16 x 10 x 10      16 x 60 x 60
    S2                      16 x 5 x 5        16 x 30 x 30
    FC 120, FC 84, classes  400 -> 120 -> 84  14,400 -> 120 -> 84
    parameters              61,706            1,741,326
    multiply-accumulates    0.42 M            17.8 M
    ======================  ================  ==================

    The columns are for 1 channel and 10 classes, and for 3 channels and 2 classes.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        side = (image_size // 2 - 4) // 2  # of the last map: each pooling halves, the second convolution takes 4
        self.layers = nn.ModuleList([
            nn.Conv2d(in_channels, 6, 5, padding=2),  # C5x5  local strokes; padding 2 makes 28 px the paper's 32
            nn.Tanh(),                                # T
            nn.AvgPool2d(2),                          # S2    halves the map: small shifts matter less
            nn.Conv2d(6, 16, 5),                      # C5x5  combinations of strokes
            nn.Tanh(),                                # T
            nn.AvgPool2d(2),                          # S2
            nn.Flatten(),
            nn.Linear(16 * side * side, 120),         # FC    the whole image at once
            nn.Tanh(),                                # T
            nn.Linear(120, 84),                       # FC
            nn.Tanh(),                                # T
            nn.Linear(84, num_classes),               # FC    one logit per class
        ])  # fmt: skip

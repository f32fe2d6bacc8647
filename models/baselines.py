"""Baselines: scores that a network has to beat. experiments/training/baselines.py fits them."""

import torch
from torch import Tensor, nn

from models.layers import LayerStack
from models.registry import BASELINES, register

LINEAR_SIZE = 32  # pixels; larger images are averaged over blocks to about this size


class ClassFrequencies(nn.Module):
    """The same logits for every image: the logarithms of the classes' shares of the training part."""

    notation = "class frequencies"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to (N, num_classes)."""
        return self.logits.expand(len(x), -1)


@register("majority", BASELINES)
class Majority(LayerStack):
    """The most frequent class, whatever the image shows.

    The accuracy without looking: 50 % with two classes of equal size, 54 % if one has 54 % of the images. A score
    that is not clearly above it shows no skill.

    Its "probabilities" are the classes' shares of the training part, so its loss is their entropy.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ClassFrequencies(num_classes)])


@register("linear", BASELINES)
class Linear(LayerStack):
    """Multinomial logistic regression on the pixels (Cox 1958, "The regression analysis of binary sequences").

    One weight for each pixel and class, and no knowledge of shapes: its score is possible without any convolution.
    With few training images it can beat a network, which a table without it would hide: it reaches about 81 % from
    1,400 images of Fashion-MNIST.

    Images larger than 32 pixels are averaged over square blocks first (128 pixels become 32): neighbouring pixels of a
    photograph add little, and few images suffice only for few weights. The validation part chooses the strength of
    the L2 penalty, as it chooses a network's epoch.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        block = max(1, image_size // LINEAR_SIZE)
        side = image_size // block
        self.layers = nn.ModuleList([
            *([nn.AvgPool2d(block)] if block > 1 else []),         # S   only for large images
            nn.Flatten(),
            nn.Linear(in_channels * side * side, num_classes),     # FC  a weight for each pixel and class
        ])  # fmt: skip

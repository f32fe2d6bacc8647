"""Baselines: what a network has to beat before its score says anything. Fitted in experiments/baselines.py."""

import torch
from torch import Tensor, nn

from models.layers import LayerStack
from models.registry import BASELINES, register

LINEAR_SIZE = 32  # pixels; larger images are averaged over blocks down to about this size


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

    What accuracy can be had without looking: 50 % with two classes of equal size, 54 % where one has 54 % of the
    images. A score that is not clearly above it is no skill.

    Its "probabilities" are the classes' shares of the training part, so its loss is their entropy.
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ClassFrequencies(num_classes)])


@register("linear", BASELINES)
class Linear(LayerStack):
    """Multinomial logistic regression on the pixels (Cox 1958, "The regression analysis of binary sequences").

    One weight for each pixel and class, and nothing learned about shapes: what is right here was right without any
    convolution. With few training images it can beat a network, and a table without it would hide that: 1,400
    images of Fashion-MNIST give it about 81 %.

    Images larger than 32 pixels are averaged over square blocks first (128 pixels become 32): neighbouring pixels
    of a photograph tell it nothing new, and every weight less is one less to learn from few images. The strength of
    its L2 penalty is what the validation part chooses, as it chooses a network's epoch.
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

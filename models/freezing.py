"""Training the head alone: all other layers keep their weights."""

from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn


def head_of(network: nn.Module) -> Sequence[str]:
    """Name the layers that map features to classes: what timm says, or the last convolution or fully connected layer.

    Names are those of `named_modules`; empty if there is no such layer.
    """
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    said = getattr(network, "get_classifier", lambda: None)()
    heads = said if isinstance(said, tuple | list | nn.ModuleList) else [said]
    inside = {id(layer) for head in heads if isinstance(head, nn.Module) for layer in head.modules()}
    return [name for name, layer in layers if id(layer) in inside] or [name for name, _ in layers[-1:]]


class HeadOnly(nn.Module):
    """A network of which the head alone learns.

    Everything else has no gradient and stays in evaluation mode: BatchNorm keeps its running statistics, and nothing is
    dropped out.

    Parameters
    ----------
    network : nn.Module
    num_classes : int
        Outputs of the head.

    Raises
    ------
    ValueError
        The head is not to be found.
    """

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.network = network.eval()
        self._heads = tuple(head_of(network))
        for name in self._heads:
            if len(next(network.get_submodule(name).parameters())) != num_classes:
                raise ValueError(f"its last layer, {name}, has other outputs than one for each class; it has no head")
        if not self._heads:
            raise ValueError("it has no fully connected layer or convolution; it has no head")
        network.requires_grad_(False)
        self.train()
        for name in self._heads:
            network.get_submodule(name).requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits as the network does."""
        logits: Tensor = self.network(x)
        return logits

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the head; all other layers stay in evaluation mode."""
        super().train(False)
        self.training = mode
        for name in self._heads:
            self.network.get_submodule(name).train(mode)
        return self

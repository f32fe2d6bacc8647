"""The image classifiers: one file per family, blocks they share, and one dict from name to class.

A model is added by a class in a file of its own, with `self.layers`, and an entry in `MODELS`.
"""

from dataclasses import dataclass
from functools import cache
from inspect import getdoc

import torch
from torch import nn

from models.baselines import ClassFrequencies, Linear, Majority
from models.efficientnet import EfficientNetB0, EfficientNetLite, MBConv
from models.layers import ConvNorm, GlobalAveragePool, LayerStack, SqueezeExcitation
from models.lenet import LeNet5
from models.resnet import ResidualBlock, ResNetCNN, SEResNet
from models.vgg import VGGNet

__all__ = ["BASELINES", "MODELS", "ModelCard", "build", "describe"]

MODELS: dict[str, type[LayerStack]] = {
    "lenet5": LeNet5,
    "vggnet": VGGNet,
    "resnetcnn": ResNetCNN,
    "seresnet": SEResNet,
    "efficientnet_lite": EfficientNetLite,
    "efficientnet_b0": EfficientNetB0,
}
BASELINES: dict[str, type[LayerStack]] = {"majority": Majority, "linear": Linear}  # beside every choice of models
MIN_IMAGE_SIZE = 12  # pixels; below it LeNet-5's second convolution finds no room


@dataclass(frozen=True)
class ModelCard:
    """What a model is and costs for one kind of input.

    Attributes
    ----------
    name : str
        Key of `MODELS` or `BASELINES`.
    parameters : int
        Trainable parameters.
    macs : int
        Multiply-accumulates of convolutions and fully connected layers in one forward pass of one image.
    layers : str
        The structure in the usual abbreviations, channels in brackets.
    description : str
        The class's docstring.
    outputs : int
        Values that those layers put out for one image: what the memory and the time of training grow with.
    """

    name: str
    parameters: int
    macs: int
    layers: str
    description: str
    outputs: int


def build(name: str, in_channels: int, num_classes: int, image_size: int) -> LayerStack:
    """Build a model with fresh weights from torch's generator.

    Parameters
    ----------
    name : str
        Key of `MODELS` or `BASELINES`.
    in_channels, num_classes : int
        1 for gray, 3 for RGB; logits at the end.
    image_size : int
        Height and width in pixels, from 12.

    Returns
    -------
    LayerStack
        In training mode, on the CPU.

    Raises
    ------
    ValueError
        An unknown name, or images that are too small.
    """
    if name not in MODELS | BASELINES:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"images of {image_size} pixels are too small; models take {MIN_IMAGE_SIZE} and more")
    return (MODELS | BASELINES)[name](in_channels, num_classes, image_size)


@cache
def describe(name: str, in_channels: int, num_classes: int, image_size: int) -> ModelCard:
    """Count parameters and multiply-accumulates, and write the structure down.

    Parameters are those of `build`. The model sees one image: that takes some hundredths of a second, where torch's
    meta device, which computes nothing, first loads a second and a half of Python.

    Returns
    -------
    ModelCard
    """
    macs = outputs = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs, outputs
        outputs += output.numel()
        # each output value is a sum over one row of the weight: (out, in / groups, kernel, kernel) or (out, in)
        macs += output.numel() * module.weight[0].numel()  # type: ignore[index]

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        model = build(name, in_channels, num_classes, image_size).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        model(torch.zeros(1, in_channels, image_size, image_size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelCard(name, parameters, macs, notation(model), getdoc(type(model)) or "", outputs)


def notation(model: LayerStack) -> str:
    """Write the layers of a model as `C5x5(6) T S2 ...`; equal neighbours are counted (`MB6 3x3(80) x3`)."""
    words: list[str] = []
    counts: list[int] = []
    for word in filter(None, map(_abbreviate, model.layers)):
        if words and words[-1] == word:
            counts[-1] += 1
        else:
            words.append(word)
            counts.append(1)
    return " ".join(f"{word} x{n}" if n > 1 else word for word, n in zip(words, counts, strict=True))


def _abbreviate(layer: nn.Module) -> str:
    match layer:
        case nn.Conv2d():
            stride = f"/{layer.stride[0]}" if layer.stride[0] > 1 else ""
            return f"C{layer.kernel_size[0]}x{layer.kernel_size[1]}{stride}({layer.out_channels})"
        case nn.Linear():
            return f"FC{layer.out_features}"
        case nn.AvgPool2d() | nn.MaxPool2d():
            return f"S{layer.kernel_size}"
        case MBConv():
            return layer.notation
        case ResidualBlock():
            return f"[{' '.join(map(_abbreviate, layer.residual))} +x R]"
        case ConvNorm():
            return " ".join(map(_abbreviate, layer))
    known = {nn.BatchNorm2d: "BN", nn.ReLU: "R", nn.Tanh: "T", nn.SiLU: "SiLU", nn.Dropout: "dropout", nn.Flatten: "",
             GlobalAveragePool: "GAP", SqueezeExcitation: "SE", ClassFrequencies: "class frequencies"}  # fmt: skip
    return known.get(type(layer), type(layer).__name__)

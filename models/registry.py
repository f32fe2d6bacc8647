"""The models by name, building them, and what each is and costs for one kind of input."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from typing import TypeVar, overload

import torch
from torch import nn

from models.layers import ConvNorm, GlobalAveragePool, SqueezeExcitation, compute_wide_layers_in_fp32

Model = TypeVar("Model", bound=type[nn.Module])
MODELS: dict[str, type[nn.Module]] = {}
BASELINES: dict[str, type[nn.Module]] = {}  # beside every choice of models
UNUSABLE: dict[str, str] = {}  # files of this package that cannot be imported, each with the reason
MIN_IMAGE_SIZE = 12  # pixels; below it LeNet-5's second convolution finds no room


class ModelError(ValueError):
    """A model cannot be used for a task; the message is one sentence for the user."""


@overload
def register(name: Model) -> Model: ...
@overload
def register(name: str, among: dict[str, type[nn.Module]] = MODELS) -> Callable[[Model], Model]: ...
def register(name: Model | str, among: dict[str, type[nn.Module]] = MODELS) -> Model | Callable[[Model], Model]:
    """Enter a class as a model: `@register`, under its own name in lower case, or `@register("name")`.

    Any `nn.Module` will do whose constructor takes `in_channels`, `num_classes` and `image_size`, and whose `forward`
    maps images, shape (N, in_channels, image_size, image_size), to logits, shape (N, num_classes).

    Raises
    ------
    ValueError
        Another class has the name.
    """
    if not isinstance(name, str):
        return register(name.__name__.lower())(name)

    def enter(cls: Model) -> Model:
        if name in MODELS | BASELINES:
            there = (MODELS | BASELINES)[name]
            raise ValueError(f"{there.__module__.replace('.', '/')}.py has a model called {name} already")
        among[name] = cls
        return cls

    return enter


def import_all(package: str, path: list[str]) -> None:
    """Import every file of this package, so that its models are registered; one that fails is noted in `UNUSABLE`."""
    for module in pkgutil.iter_modules(path):
        if module.name.startswith("_"):
            continue
        try:
            importlib.import_module(f"{package}.{module.name}")
        except Exception as error:  # noqa: BLE001 - a missing package, or whatever a user's file raises
            reason = " ".join(str(error).split())[:200]
            UNUSABLE[f"{package}/{module.name}.py"] = f"{type(error).__name__}: {reason}"


def unusable_sentences() -> list[str]:
    """Say of each file of this package that cannot be imported why."""
    return [f"{file} cannot be imported ({reason}); its models are left out" for file, reason in UNUSABLE.items()]


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


def build(name: str, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
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
    nn.Module
        In training mode, on the CPU. Fully connected layers that are very wide compute in fp32 (`Float32Linear`).

    Raises
    ------
    ModelError
        An unknown name, images that are too small, or a constructor that raises.
    """
    if name not in MODELS | BASELINES:
        raise ModelError("; ".join([f"unknown model {name!r}; there are {', '.join(MODELS)}", *unusable_sentences()]))
    if image_size < MIN_IMAGE_SIZE:
        raise ModelError(f"images of {image_size} pixels are too small; models take {MIN_IMAGE_SIZE} and more")
    try:
        model = (MODELS | BASELINES)[name](in_channels, num_classes, image_size)
    except Exception as error:
        raise ModelError(_refusal(name, (in_channels, num_classes, image_size), error)) from error
    compute_wide_layers_in_fp32(model)
    return model


def _refusal(name: str, arguments: tuple[int, int, int], error: Exception) -> str:
    channels, classes, size = arguments
    reason = " ".join(str(error).split())[:200]
    return (
        f"{name} cannot be built for {size}x{size} images of {channels} channel{'s' * (channels != 1)} and {classes} "
        f"classes ({type(error).__name__}: {reason})"
    )


@cache
def describe(name: str, in_channels: int, num_classes: int, image_size: int) -> ModelCard:
    """Count parameters and multiply-accumulates, and write the structure down.

    Parameters are those of `build`. The model sees one image: that takes some hundredths of a second, where torch's
    meta device, which computes nothing, first loads a second and a half of Python.

    Returns
    -------
    ModelCard

    Raises
    ------
    ModelError
        The model cannot be built, or does not map such images to logits.
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
        try:
            logits = model(torch.zeros(1, in_channels, image_size, image_size))
            if logits.shape != (1, num_classes):
                raise ValueError(f"its logits have shape {tuple(logits.shape)}, not {(1, num_classes)}")
        except Exception as error:
            raise ModelError(_refusal(name, (in_channels, num_classes, image_size), error)) from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelCard(name, parameters, macs, notation(model), _docstring(type(model)), outputs)


def _docstring(kind: type[nn.Module]) -> str:
    """Docstring of a class, or of the first of its bases that has one; that of torch's own classes says nothing."""
    own = (base for base in kind.__mro__ if base.__doc__ and not base.__module__.startswith("torch."))
    return next((cleandoc(base.__doc__ or "") for base in own if base is not object), "")


def notation(model: nn.Module) -> str:
    """Write the layers of a model as `C5x5(6) T S2 ...`; equal neighbours are counted (`MB6 3x3(80) x3`).

    These are its `layers` where it has them, as the models of this package do, and else its children.
    """
    words: list[str] = []
    counts: list[int] = []
    layers = getattr(model, "layers", None)
    for word in filter(None, map(_abbreviate, layers if isinstance(layers, nn.ModuleList) else model.children())):
        if words and words[-1] == word:
            counts[-1] += 1
        else:
            words.append(word)
            counts.append(1)
    return " ".join(f"{word} x{n}" if n > 1 else word for word, n in zip(words, counts, strict=True))


def _abbreviate(layer: nn.Module) -> str:
    """Return the abbreviation of a layer."""
    match layer:
        case nn.Conv2d():
            stride = f"/{layer.stride[0]}" if layer.stride[0] > 1 else ""
            return f"C{layer.kernel_size[0]}x{layer.kernel_size[1]}{stride}({layer.out_channels})"
        case nn.Linear():
            return f"FC{layer.out_features}"
        case nn.AvgPool2d() | nn.MaxPool2d():
            return f"S{layer.kernel_size}"
        case nn.Module(notation=str(notation)):  # a block that knows its own
            return notation
        case nn.Module(residual=nn.Sequential() as residual):
            return f"[{' '.join(map(_abbreviate, residual))} +x R]"
        case ConvNorm():
            return " ".join(map(_abbreviate, layer))
    known = {nn.BatchNorm2d: "BN", nn.ReLU: "R", nn.Tanh: "T", nn.SiLU: "SiLU", nn.Dropout: "dropout", nn.Flatten: "",
             GlobalAveragePool: "GAP", SqueezeExcitation: "SE"}  # fmt: skip
    return known.get(type(layer), type(layer).__name__)

"""The registry of models: building them by name, and their structure and cost for one kind of input."""

import contextlib
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import cleandoc
from typing import TypeVar, overload

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from models import library
from models.freezing import HeadOnly
from models.layers import ConvNorm, GlobalAveragePool, LayerStack, SqueezeExcitation, compute_wide_layers_in_fp32

Model = TypeVar("Model", bound=type[nn.Module])
MODELS: dict[str, type[nn.Module]] = {}
BASELINES: dict[str, type[nn.Module]] = {}  # run beside every choice of models
UNUSABLE: dict[str, str] = {}  # files of this package that fail to import, and the reasons
MIN_IMAGE_SIZE = 12  # pixels; smaller images leave no room for LeNet-5's second convolution


class ModelError(ValueError):
    """A model cannot be used for a task; the message is one sentence for the user."""


@overload
def register(name: Model) -> Model: ...
@overload
def register(name: str, among: dict[str, type[nn.Module]] = MODELS) -> Callable[[Model], Model]: ...
def register(name: Model | str, among: dict[str, type[nn.Module]] = MODELS) -> Model | Callable[[Model], Model]:
    """Register a class as a model: `@register` under its lower-case name, or `@register("name")`.

    Any `nn.Module` works if its constructor takes `in_channels`, `num_classes` and `image_size`, and its `forward`
    maps images, shape (N, in_channels, image_size, image_size), to logits, shape (N, num_classes).

    Raises
    ------
    ValueError
        The name is taken.
    TypeError
        It is not a class derived from nn.Module, so that nothing could say which source it depends on.
    """
    if not isinstance(name, str):
        return register(name.__name__.lower())(name)

    def enter(cls: Model) -> Model:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"{name} is not a class that derives from nn.Module")
        if name in MODELS | BASELINES:
            other = (MODELS | BASELINES)[name].__module__.replace(".", "/")
            raise ValueError(f"{other}.py already has a model called {name}")
        among[name] = cls
        return cls

    return enter


def import_all(package: str, path: list[str], first: Sequence[str] = ()) -> None:
    """Import every file of this package to register its models; record the files that fail in `UNUSABLE`."""
    found = [module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")]
    for module in dict.fromkeys([*first, *found]):
        before = MODELS | BASELINES
        try:
            importlib.import_module(f"{package}.{module}")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a missing package, or any error of a user's file
            UNUSABLE[f"{package}/{module}.py"] = _reason(error)
            for name, cls in (MODELS | BASELINES).items() - before.items():
                if cls.__module__ not in sys.modules or not cls.__module__.startswith(f"{package}."):
                    MODELS.pop(name, None)  # registered before the error; models of files that it imported stay
                    BASELINES.pop(name, None)


def unusable_sentences() -> list[str]:
    """Return one sentence for each file of this package that fails to import."""
    return [f"{file} cannot be imported ({reason}); its models are left out" for file, reason in UNUSABLE.items()]


@dataclass(frozen=True)
class ModelCard:
    """Structure and cost of a model for one kind of input."""

    name: str  # key of `MODELS` or `BASELINES`, or library:architecture
    parameters: int  # all of them, also where only the head is trained
    macs: int  # multiply-accumulates of convolutions and fully connected layers in one forward pass of one image
    layers: str  # structure in the usual abbreviations, channels in brackets
    description: str  # docstring of the class, or what the library says
    outputs: int  # output values of those layers for one image; memory and training time grow with them


def why_unknown(name: str) -> str:
    """Say why there is no model of this name; empty if there is one, or its file cannot be imported."""
    if library.is_library_model(name):
        return library.why_unknown(name)
    if name in MODELS or f"models/{name}.py" in UNUSABLE:
        return ""
    near = difflib.get_close_matches(name, MODELS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = f"{name!r} is not one of {', '.join(MODELS)}, {library.PREFIXES}{hint}"
    return "; ".join([known, *unusable_sentences()])


def build(name: str, in_channels: int, num_classes: int, image_size: int, freeze: bool = False) -> nn.Module:
    """Build a model with fresh weights from torch's generator.

    Parameters
    ----------
    name : str
        A key of `MODELS` or `BASELINES`, or a library's architecture, such as `torchvision:resnet18`.
    in_channels : int
        1 for gray, 3 for RGB.
    image_size : int
        Height and width in pixels, at least 12.
    freeze : bool
        Whether only the head is to learn (`models.freezing.HeadOnly`).

    Returns
    -------
    nn.Module
        In training mode, on the CPU. Very wide fully connected layers compute in fp32 (`Float32Linear`).

    Raises
    ------
    ModelError
        The name is unknown, the images are too small, or the constructor raises.
    """
    if library.is_library_model(name):
        if unknown := library.why_unknown(name):
            raise ModelError(unknown)
    elif name not in MODELS | BASELINES:
        known = f"unknown model {name!r}; there are {', '.join(MODELS)}, {library.PREFIXES}"
        raise ModelError("; ".join([known, *unusable_sentences()]))
    if image_size < MIN_IMAGE_SIZE:
        raise ModelError(f"images of {image_size} pixels are too small; models take at least {MIN_IMAGE_SIZE}")
    with _refusal(name, in_channels, num_classes, image_size):
        arguments = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
        make = partial(library.build, name) if library.is_library_model(name) else (MODELS | BASELINES)[name]
        model = make(**arguments)
        if not isinstance(model, nn.Module):
            raise TypeError(f"it is a {type(model).__name__}, not an nn.Module")
        if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
            with torch.no_grad():  # lazy layers take their shapes from a first batch
                model.eval()(torch.zeros(1, in_channels, image_size, image_size))
            model.train()
        compute_wide_layers_in_fp32(model)
        return HeadOnly(model, num_classes) if freeze else model


@contextlib.contextmanager
def _refusal(name: str, channels: int, classes: int, size: int) -> Iterator[None]:
    """Turn any error of a model into a `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{name} cannot be built for {size}x{size} images of {channels} channel{'s' * (channels != 1)} and "
            f"{classes} classes ({_reason(error)})"
        ) from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")


@cache
def describe(name: str, in_channels: int, num_classes: int, image_size: int, freeze: bool = False) -> ModelCard:
    """Count parameters and multiply-accumulates, and abbreviate the structure.

    The parameters are those of `build`. One image passes through the model: a few hundredths of a second, whereas
    torch's meta device, which computes nothing, first imports 1.5 s of Python. A model with a `forward` of its own
    also learns from two images, since it may differ in training.

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

    def check(images: int) -> torch.Tensor:
        logits = model(torch.zeros(images, in_channels, image_size, image_size))
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"it returns a {type(logits).__name__}, not a tensor of logits")
        if logits.shape != (images, num_classes):
            raise ValueError(f"its logits have shape {tuple(logits.shape)}, not {(images, num_classes)}")
        return logits

    with torch.random.fork_rng(devices=[]):
        model = build(name, in_channels, num_classes, image_size, freeze)
        with _refusal(name, in_channels, num_classes, image_size):
            if type(model).forward is not LayerStack.forward:
                check(images=2).sum().backward()  # type: ignore[no-untyped-call]
            model.eval()
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.register_forward_hook(count)
            if library.is_library_model(name):
                macs = _all_products(lambda: check(images=1))
            else:
                with torch.inference_mode():
                    check(images=1)
    network = model.network if isinstance(model, HeadOnly) else model
    about = library.description(name, network) if library.is_library_model(name) else _docstring(type(network))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelCard(name, parameters, macs, notation(network), about, outputs)


def _all_products(forward: Callable[[], object]) -> int:
    """Count the multiply-accumulates of a forward pass, those of attention too, which are in no layer."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # late: half a second

    torch.backends.mha.set_fastpath_enabled(False)  # a short cut through attention that nobody counts
    try:
        # as plain matrix products, since torch 2.11 does not count a CPU's own attention
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return int(counter.get_total_flops()) // 2


def _docstring(kind: type[nn.Module]) -> str:
    """Return the docstring of a class or of its nearest base, other than torch's and `LayerStack`."""
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not LayerStack]
    for base in bases:
        if base.__doc__ and base.__module__.split(".")[0] != "torch":
            return cleandoc(base.__doc__)
    return f"{kind.__name__} of {kind.__module__}, which has no docstring."


def notation(model: nn.Module) -> str:
    """Abbreviate the layers of a model as `C5x5(6) T S2 ...`; equal neighbours are counted (`MB6 3x3(80) x3`)."""
    words: list[str] = []
    counts: list[int] = []
    for word in filter(None, map(_abbreviate, _flatten(model.children()))):
        if words and words[-1] == word:
            counts[-1] += 1
        else:
            words.append(word)
            counts.append(1)
    layers = " ".join(f"{word} x{n}" if n > 1 else word for word, n in zip(words, counts, strict=True))
    return layers or type(model).__name__


def _flatten(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if type(layer) in (nn.Sequential, nn.ModuleList):
            yield from _flatten(layer.children())
        else:
            yield layer


def _abbreviate(layer: nn.Module) -> str:
    match layer:
        case nn.Conv2d():
            stride = f"/{layer.stride[0]}" if layer.stride[0] > 1 else ""
            return f"C{layer.kernel_size[0]}x{layer.kernel_size[1]}{stride}({layer.out_channels})"
        case nn.Linear():
            return f"FC{layer.out_features}"
        case nn.AvgPool2d() | nn.MaxPool2d():
            return f"S{layer.kernel_size}"
        case nn.Module(notation=str(notation)):  # a block with its own abbreviation
            return notation
        case nn.Module(residual=nn.Sequential() as residual):
            return f"[{' '.join(map(_abbreviate, residual))} +x R]"
        case ConvNorm():
            return " ".join(map(_abbreviate, layer))
    known = {nn.BatchNorm2d: "BN", nn.ReLU: "R", nn.Tanh: "T", nn.SiLU: "SiLU", nn.Dropout: "dropout", nn.Flatten: "",
             GlobalAveragePool: "GAP", SqueezeExcitation: "SE"}  # fmt: skip
    return known.get(type(layer), type(layer).__name__)

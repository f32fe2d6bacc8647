"""Architectures of torchvision and timm, by the names `torchvision:resnet18` and `timm:convnext_atto`.

The library builds them. Channels, classes and image size are passed on where it takes them; the rest is found out by
passing a batch through the model (`models.describe`). The libraries are imported when one of their models is asked for.
"""

import difflib
import importlib
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from inspect import cleandoc
from typing import Any

import torch
from torch import nn

LIBRARIES = ("torchvision", "timm")
PREFIXES = " and ".join(f"{library}:NAME" for library in LIBRARIES)


def is_library_model(name: str) -> bool:
    """Whether a name is that of a library's model: `library:architecture`."""
    return name.partition(":")[0] in LIBRARIES


def why_unknown(name: str) -> str:
    """Say why a library has no model of this name, with the nearest names; empty if it has one."""
    library, _, architecture = name.partition(":")
    try:
        known = _architectures(library)
    except ImportError:
        return f"{name} needs {library}, which is not installed: pip install {library}"
    if library == "timm" and (plain := architecture.partition(".")[0]) in known:  # timm: architecture.weights
        known = _with_weights(plain)
    if architecture in known:
        return ""
    near = difflib.get_close_matches(architecture, known, 3)
    hint = f"; did you mean {' or '.join(f'{library}:{each}' for each in near)}?" if near else ""
    return f"{library} {metadata.version(library)} has no image classifier {architecture!r}{hint}"


@cache
def _architectures(library: str) -> frozenset[str]:
    module = importlib.import_module(f"{library}.models")
    if library == "torchvision":  # without detectors, segmentation and videos
        return frozenset(module.list_models(module=module))
    return frozenset(module.list_models())


@cache
def _with_weights(architecture: str) -> frozenset[str]:
    from timm.models import list_models

    return frozenset({architecture, *list_models(f"{architecture}.*", include_tags=True)})


def build(name: str, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Build a library's model with fresh weights.

    Its attribute `origin` names library, version and architecture, which stand for its source.

    Raises
    ------
    ValueError
        The architecture cannot be fitted to such images. Others raise whatever the library raises.
    """
    library, _, architecture = name.partition(":")
    make = _build_timm if library == "timm" else _build_torchvision
    model = make(architecture, in_channels, num_classes, image_size)
    model.origin = f"{library} {metadata.version(library)}: {architecture}"  # type: ignore[assignment]
    return model


def _build_torchvision(architecture: str, in_channels: int, num_classes: int, image_size: int) -> nn.Module:
    from torchvision.models import get_model

    sizes: Sequence[dict[str, Any]] = ({"image_size": image_size}, {"input_size": (image_size, image_size)}, {})
    model = _first_accepted(lambda size: get_model(architecture, num_classes=num_classes, **size), sizes)
    return fit_first_convolution(model, in_channels)


def _build_timm(
    architecture: str, in_channels: int, num_classes: int, image_size: int, pretrained: bool = False
) -> nn.Module:
    import timm

    fixed: dict[str, Any] = {"in_chans": in_channels, "num_classes": num_classes, "pretrained": pretrained}
    sizes: Sequence[dict[str, Any]] = ({"img_size": image_size}, {})
    model = _first_accepted(lambda size: timm.create_model(architecture, **fixed, **size), sizes)
    # of an image that they do not divide, the model would not see the rest
    patches = getattr(getattr(model, "patch_embed", None), "proj", None)
    if isinstance(patches, nn.Conv2d) and patches.stride == patches.kernel_size and image_size % patches.stride[0]:
        raise ValueError(f"its patches of {patches.stride[0]} pixels do not divide the image")
    return model


def _first_accepted(make: Callable[[dict[str, Any]], nn.Module], sizes: Sequence[dict[str, Any]]) -> nn.Module:
    """Call a constructor with the first of some arguments that it knows; few take the image size, under three names."""
    *named, nothing = sizes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the library will change one day: its version is stored
        for size in named:
            try:
                return make(size)
            except TypeError as error:
                if f"unexpected keyword argument '{next(iter(size))}'" not in str(error):
                    raise
        return make(nothing)


def fit_first_convolution(model: nn.Module, in_channels: int) -> nn.Module:
    """Let a model of RGB images take gray ones: it answers as to an image with three equal channels.

    The weights of the first convolution are summed over its input channels.
    """
    if in_channels == 3:
        return model
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            break
    else:
        raise ValueError("it has no convolution, whose input could be other than RGB")
    if in_channels != 1 or layer.in_channels != 3 or layer.groups != 1:
        raise ValueError(f"its first convolution takes {layer.in_channels} channels, and cannot take {in_channels}")
    layer.in_channels = 1
    layer.weight = nn.Parameter(sum_of_channels(layer.weight.detach()))
    return model


def sum_of_channels(weight: torch.Tensor) -> torch.Tensor:
    """Sum the weights of a convolution, shape (out, in, height, width), over its input channels; keep the dimension."""
    return weight.sum(1, keepdim=True)


def description(name: str, model: nn.Module) -> str:
    """Describe a library's model by the first paragraph of its documentation, or of its class."""
    library, _, architecture = name.partition(":")
    if library == "timm":
        from timm.models import model_entrypoint

        documented = model_entrypoint(architecture.partition(".")[0]).__doc__
    else:
        from torchvision.models import get_model_builder

        documented = get_model_builder(architecture).__doc__
    text = cleandoc(documented or type(model).__doc__ or "").partition("\n\n")[0].partition(".. ")[0]
    text = re.sub(r"`([^`<]+?)\s*<([^>`]+)>`_*", r"\1 (\2)", " ".join(text.split()))  # a link of reStructuredText
    return f"`{architecture}` of {library} {metadata.version(library)}.\n\n{text}".strip()

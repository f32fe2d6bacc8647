"""Grad-CAM [1]_ overlays: which places of a photograph a network looks at.

.. [1] R. R. Selvaraju et al. Grad-CAM: Visual explanations from deep networks via gradient-based localization, 2017.
"""

import copy
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx, nn
from torch.nn import functional

from experiments.champion.predict import BATCH, Predictor

SIDE = 224  # pixels; smaller pictures are enlarged
GAP = 8  # pixels between picture and overlay
OPACITY = 0.6  # of the warmest place
SUFFIX = ".gradcam.png"  # never that of a photo beside it


class FeatureMap(nn.Module):
    """Identity that detaches its input and starts a new gradient graph: frozen weights before it do not matter."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy, which operations in place do not reach."""
        return x.detach().clone().requires_grad_()


def with_feature_map(program: nn.Module) -> fx.GraphModule | None:
    """Return a copy of a champion's program that ends with the logits and whose last feature map is a layer.

    The layer is called `feature_map`. Its output has shape (N, channels, height, width), after all that is done to it
    before it is pooled or flattened.

    Returns
    -------
    torch.fx.GraphModule or None
        None if the program has no such map, as transformers and MLP-Mixers, which work on tokens of shape (N, tokens,
        channels).
    """
    if not isinstance(program, fx.GraphModule):
        return None
    explained = copy.deepcopy(program)
    graph = explained.graph
    shapes = {node: tuple(node.meta["val"].shape) for node in graph.nodes
              if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)}  # fmt: skip
    maps = [node for node, shape in shapes.items() if len(shape) == 4 and min(shape[2:]) > 1]
    tokens = [node for node, shape in shapes.items() if len(shape) == 3 and shape[1] > 1]
    convolved = any("conv2d" in str(node.target) for node in shapes)
    ends = [node for node in shapes if node.target is torch.ops.aten.softmax.int]
    if not maps or tokens or not convolved or not ends:
        return None
    explained.add_submodule("feature_map", FeatureMap())
    with graph.inserting_after(maps[-1]):
        layer = graph.call_module("feature_map", (maps[-1],))
    maps[-1].replace_all_uses_with(layer, delete_user_cb=lambda user: user is not layer)
    ends[-1].replace_all_uses_with(ends[-1].args[0])  # a probability near 1 has no gradient
    graph.eliminate_dead_code()
    explained.recompile()
    return explained


def heat(explained: fx.GraphModule, images: np.ndarray) -> np.ndarray:
    """Compute Grad-CAM of the most probable classes.

    Parameters
    ----------
    explained : fx.GraphModule
        From `with_feature_map`.
    images : numpy.ndarray of uint8, shape (N, size, size, channels)

    Returns
    -------
    numpy.ndarray of float32, shape (N, size, size)
        Each from 0 to 1, which is the place that speaks most for the class; all 0 if none does.
    """
    # late: it brings Matplotlib; of captum, since maps of grad-cam change with a ReLU in place
    # (findings/gradcam_inplace_relu.sh)
    from captum.attr import LayerGradCam

    pixels = torch.from_numpy(images)
    with torch.no_grad():
        labels = explained(pixels).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that whole numbers have no gradient, which nobody needs
        maps = LayerGradCam(explained, explained.feature_map).attribute(pixels, labels, relu_attributions=True)
    maps = functional.interpolate(maps.detach(), images.shape[1:3], mode="bilinear")[:, 0]
    found: np.ndarray = (maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)).numpy()
    return found


def overlay(image: np.ndarray, warmth: np.ndarray) -> Image.Image:
    """Draw a picture as the model sees it, and again with its heat: uint8, (size, size, channels); (size, size)."""
    import matplotlib as mpl

    side = max(SIDE, len(image))
    seen = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).convert("RGB")
    seen = seen.resize((side, side), Image.Resampling.NEAREST)
    smooth = np.asarray(Image.fromarray(warmth).resize((side, side), Image.Resampling.BILINEAR))
    colours = Image.fromarray((255 * mpl.colormaps["inferno"](smooth)[..., :3]).astype(np.uint8))
    opacity = Image.fromarray((255 * OPACITY * smooth.clip(0, 1)).astype(np.uint8))
    sheet = Image.new("RGB", (2 * side + GAP, side), "white")
    sheet.paste(seen, (0, 0))
    sheet.paste(Image.composite(colours, seen, opacity), (side + GAP, 0))
    return sheet


def write_overlays(predictor: Predictor, explained: fx.GraphModule, photos: Sequence[Path], folder: Path) -> int:
    """Write an overlay of each readable photo, and return how many.

    Files are named as the photos; a name that is taken gets a number, from `-2`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: set[str] = set()
    for first in range(0, len(photos), BATCH):
        decoded = predictor.decode(photos[first : first + BATCH])
        readable = [(path, image) for path, image in decoded if isinstance(image, np.ndarray)]
        if not readable:
            continue
        warmth = heat(explained, np.stack([image for _, image in readable]))
        for (path, image), own in zip(readable, warmth, strict=True):
            names = (path.stem if number == 1 else f"{path.stem}-{number}" for number in itertools.count(1))
            name = next(name for name in names if name.casefold() not in written)
            written.add(name.casefold())
            overlay(image, own).save(folder / f"{name}{SUFFIX}")
    return len(written)

"""A small generated data set for each published one, with the same shapes, classes and folders.

It replaces real data without a network. The classes overlap (pose, colour, light, clutter and noise vary), so that
models differ, but its scores say nothing about the real tasks.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from datasets.images import DatasetError, building

Colour = tuple[int, ...]  # red, green, blue

FASHION_MNIST = "FashionMNIST"
GARMENTS = (8_000, 2_000)  # images in the training and the test part
PHOTOS = (150, 40)  # images of each class in the training and the test part

# Outlines in a 28x28 box, as polygons; a bag's handle and a sandal's straps are lines.
_TORSO = [(9, 4), (19, 4), (19, 25), (9, 25)]
_SHORT_SLEEVES = [(9, 4), (3, 9), (5, 13), (9, 10), (19, 10), (23, 13), (25, 9), (19, 4)]
_LONG_SLEEVES = [(9, 4), (4, 8), (3, 24), (6, 24), (9, 11), (19, 11), (22, 24), (25, 24), (24, 8), (19, 4)]
_OUTLINES = {
    "T-shirt/top": [_TORSO, _SHORT_SLEEVES],
    "Trouser": [[(9, 3), (19, 3), (20, 26), (15, 26), (14, 9), (13, 26), (8, 26)]],
    "Pullover": [_TORSO, _LONG_SLEEVES],
    "Dress": [[(11, 2), (17, 2), (17, 11), (21, 26), (7, 26), (11, 11)]],
    "Coat": [[(8, 3), (20, 3), (21, 26), (7, 26)], _LONG_SLEEVES],
    "Sandal": [[(2, 20), (26, 17), (26, 21), (2, 23)]],
    "Shirt": [[(9, 3), (19, 3), (20, 25), (8, 25)], _SHORT_SLEEVES],
    "Sneaker": [[(2, 15), (9, 13), (14, 10), (19, 11), (26, 17), (26, 21), (2, 21)]],
    "Bag": [[(4, 11), (24, 11), (25, 24), (3, 24)]],
    "Ankle boot": [[(3, 7), (12, 6), (14, 13), (25, 16), (26, 22), (3, 22)]],
}


def draw(name: str, folder: Path) -> Path:
    """Draw the sample of a published data set below `folder`, unless it exists; return the folder that holds it.

    The folder's name changes with this file, so that an older sample is never used.

    Raises
    ------
    DatasetError
        The data set has no sample.
    """
    if name not in (*_PHOTOS, FASHION_MNIST):
        raise DatasetError(f"there is no generated sample of {name}; omit --sample, and name a folder in --data-dir")
    target = folder / f"{name}-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"
    if not target.is_dir():
        with building(target) as partial:
            if not target.is_dir() and name == FASHION_MNIST:
                _draw_garments(partial / name)
            elif not target.is_dir():
                _draw_photos(partial / name, _PHOTOS[name])
    return target


def _draw_garments(folder: Path) -> None:
    raw = folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(28)
    for part, count in zip(("train", "t10k"), GARMENTS, strict=True):
        labels = rng.permutation(np.arange(count) % len(_OUTLINES)).astype(np.uint8)
        images = np.stack([_garment(rng, list(_OUTLINES)[label]) for label in labels])
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def _garment(rng: np.random.Generator, kind: str) -> np.ndarray:
    scale = 4  # drawn large and shrunk, which smooths the edges
    image = Image.new("L", (28 * scale, 28 * scale))
    pen = ImageDraw.Draw(image)
    angle, stretch_x, stretch_y = rng.normal(0, 0.14), rng.uniform(0.72, 1.12), rng.uniform(0.75, 1.1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * [stretch_x, stretch_y]
    shift = rng.normal(0, 1.2, 2)
    mirror = rng.random() < 0.5

    def place(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        centred = np.asarray(points, dtype=float) + rng.normal(0, 0.7, (len(points), 2)) - 14
        if mirror:
            centred[:, 0] *= -1
        return [tuple(point) for point in ((centred @ turn.T + shift + 14) * scale).tolist()]

    shade = int(rng.uniform(70, 235))
    for outline in _OUTLINES[kind]:
        pen.polygon(place(outline), fill=shade)
    detail = max(0, shade - int(rng.uniform(25, 90)))
    if kind in ("Coat", "Shirt"):
        pen.line(place([(14, 4), (14, 25)]), fill=detail, width=scale)
    elif kind == "Bag":
        pen.line(place([(9, 11), (10, 5), (18, 5), (19, 11)]), fill=shade, width=scale)
    elif kind == "Sandal":
        for x in (7, 13, 19):
            pen.line(place([(x, 20), (x + 3, 12), (x + 5, 19)]), fill=shade, width=scale)
    elif kind == "Sneaker":
        pen.line(place([(3, 20), (25, 20)]), fill=detail, width=scale)
    if rng.random() < 0.3:  # a print, whatever the kind
        x, y = rng.uniform(10, 18, 2)
        pen.ellipse([(x - 2) * scale, (y - 2) * scale, (x + 2) * scale, (y + 2) * scale], fill=int(rng.uniform(0, 255)))
    pixels = np.asarray(image.resize((28, 28), Image.Resampling.BOX), dtype=float)
    return (pixels + rng.normal(0, rng.uniform(4, 26), pixels.shape)).clip(0, 255).astype(np.uint8)


def _draw_photos(folder: Path, classes: dict[str, str]) -> None:
    rng = np.random.default_rng(128)
    for part, count in zip(("train", "test"), PHOTOS, strict=True):
        for label, kind in classes.items():
            (folder / part / label).mkdir(parents=True)
            for number in range(count):
                _photo(rng, kind).save(folder / part / label / f"{label}_{number:03d}.jpg", quality=88)


def _photo(rng: np.random.Generator, kind: str) -> Image.Image:
    width, height = (int(side) for side in rng.integers(120, 200, 2))
    image = Image.new("RGB", (width, height), _colour(rng, 40, 230))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 9))):  # clutter behind the head or cake
        (x, y), (w, h) = rng.uniform(-20, 160, 2), rng.uniform(5, 90, 2)
        pen.ellipse([x, y, x + w, y + h], fill=_colour(rng, 20, 240))
    size = rng.uniform(0.24, 0.42) * min(width, height)
    centre = np.array([width, height]) / 2 + rng.normal(0, 0.09, 2) * [width, height]
    angle = rng.normal(0, 0.3)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * size
    fur = _colour(rng, 60, 220) if kind in ("cat", "dog") else tuple(int(c + rng.normal(0, 22)) for c in (190, 140, 85))
    dark = tuple(int(c * rng.uniform(0.15, 0.5)) for c in fur)
    _PARTS[kind](_Figure(rng, pen, centre, turn, fur, dark))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.8))), dtype=float)
    lit = blurred * rng.uniform(0.55, 1.2)
    noisy = lit + rng.normal(0, rng.uniform(3, 22), lit.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _colour(rng: np.random.Generator, low: int, high: int) -> Colour:
    return tuple(int(channel) for channel in rng.integers(low, high, 3))


@dataclass(frozen=True)
class _Figure:
    """One head or cake: a disc of radius 1 around 0 in its own coordinates, y downwards."""

    rng: np.random.Generator
    pen: ImageDraw.ImageDraw
    centre: np.ndarray
    turn: np.ndarray
    fur: Colour
    dark: Colour

    def polygon(self, points: Sequence[tuple[float, float]] | np.ndarray, fill: Colour) -> None:
        placed = np.asarray(points, dtype=float) @ self.turn.T + self.centre
        self.pen.polygon([tuple(point) for point in placed.tolist()], fill)

    def disc(self, x: float, y: float, radius: float, fill: Colour, squash: float = 1.0) -> None:
        turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        self.polygon(np.column_stack([x + radius * np.cos(turns), y + radius * squash * np.sin(turns)]), fill)

    def face(self, muzzle: float) -> None:
        uniform = self.rng.uniform
        self.disc(0, 0, 1, self.fur, uniform(0.85, 1.1))
        for side in (-1, 1):
            self.disc(side * uniform(0.3, 0.42), -0.2, uniform(0.1, 0.17), self.dark)
        self.disc(0, 0.35, muzzle, tuple(min(255, channel + 25) for channel in self.fur), 0.75)
        self.disc(0, 0.25, uniform(0.09, 0.15), self.dark)


def _cat(figure: _Figure) -> None:
    uniform = figure.rng.uniform
    for side in (-1, 1):
        tip = (side * uniform(0.7, 0.95), -uniform(1.2, 1.5))
        figure.polygon([(side * 0.9, -0.3), tip, (side * 0.2, -0.85)], figure.fur)
    figure.face(uniform(0.25, 0.4))


def _dog(figure: _Figure) -> None:
    figure.face(figure.rng.uniform(0.3, 0.5))
    for side in (-1, 1):
        droop = figure.rng.uniform(0.2, 0.9)
        ear = [(side * 0.55, -0.9), (side * 1.15, -0.7), (side * 1.3, droop), (side * 0.95, droop - 0.1)]
        figure.polygon(ear, figure.dark)


def _chihuahua(figure: _Figure) -> None:
    uniform = figure.rng.uniform
    for side in (-1, 1):
        tip = (side * uniform(1.1, 1.6), -uniform(0.7, 1.2))
        figure.polygon([(side * 0.95, 0.0), tip, (side * 0.3, -0.85)], figure.fur)
    figure.face(uniform(0.2, 0.4))


def _muffin(figure: _Figure) -> None:
    uniform = figure.rng.uniform
    figure.polygon([(-0.9, 0.1), (0.9, 0.1), (0.65, 1.25), (-0.65, 1.25)], _colour(figure.rng, 60, 240))
    for x in np.linspace(-0.7, 0.7, 6):  # pleats of the paper cup
        pleat = [(x, 0.1), (x + 0.08, 0.1), (0.75 * x + 0.06, 1.25), (0.75 * x, 1.25)]
        figure.polygon(pleat, figure.dark)
    figure.disc(0, -0.1, 1, figure.fur, uniform(0.7, 0.9))
    for _ in range(int(figure.rng.integers(2, 7))):  # berries, which may resemble two eyes and a nose
        x, y = uniform(-0.6, 0.6), uniform(-0.6, 0.4)
        figure.disc(x, y, uniform(0.08, 0.17), figure.dark)


_PARTS = {"cat": _cat, "dog": _dog, "chihuahua": _chihuahua, "muffin": _muffin}
_PHOTOS = {  # name: class and its kind of figure
    "cats-and-dogs-image-classification": {"cats": "cat", "dogs": "dog"},
    "muffin-vs-chihuahua-image-classification": {"chihuahua": "chihuahua", "muffin": "muffin"},
}

"""A data set on the device: normalisation, batches gathered by index, and augmentation."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datasets import ImageData
from experiments.training import hardware
from tracking.settings import DEVICE_MEMORY


@dataclass(frozen=True)
class DeviceImages:
    """A data set on a device, as training and evaluation use it."""

    pixels: Tensor  # uint8, shape (N, height, width, channels); in the host's memory if not resident
    labels: Tensor  # int64, shape (N,)
    moments: Tensor  # int64, shape (2, N, channels): sum and sum of squares of each image's pixels; on `exact_device`
    num_classes: int
    resident: bool  # whether the device has room for the pixels and for a normalised copy

    @classmethod
    def load(cls, data: ImageData, device: str, memory: float = DEVICE_MEMORY) -> "DeviceImages":
        """Copy a data set to the device, once for all models and splits, unless it takes more than `memory` of it.

        Pixels and their normalised copy (float32 at most) count; 1 is all the memory that the device has.
        """
        resident = 5 * data.images.nbytes <= memory * hardware.memory_of(device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # a cluster's object store
            pixels = torch.from_numpy(data.images)
        on_gpu = torch.device(device).type == "cuda"
        if resident:
            pixels = pixels.to(device)
        elif on_gpu:
            pixels = pixels.pin_memory()
        moments = []
        for chunk in torch.split(pixels, 256):  # few at a time: int64 is 8 times as large
            x = chunk.to(device).long()
            moments.append(torch.stack([x.sum((1, 2)), x.square().sum((1, 2))]))
        labels = torch.tensor(data.labels, device=device)
        every = torch.cat(moments, dim=1).to(hardware.exact_device(labels.device))
        return cls(pixels, labels, every, len(data.classes), resident)

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.labels.device

    def normalisation(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the images at `indices`, in units of 0 to 255."""
        rows = torch.from_numpy(indices).to(self.moments.device)
        total, squares = self.moments[:, rows].sum(1).double()
        count = len(indices) * self.pixels.shape[1] * self.pixels.shape[2]
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        std = torch.where(std < 1e-6, 1.0, std)  # all pixels alike: nothing to scale
        return mean.float().to(self.device), std.float().to(self.device)


class Part:
    """The images of one part of a split, normalised.

    Parameters
    ----------
    data : DeviceImages
    indices : numpy.ndarray of int64, shape (n,)
        Which images of the data set.
    mean, std : Tensor of float32, shape (channels,)
        Of the training part (`DeviceImages.normalisation`).
    dtype : torch.dtype
        Of the normalised images.
    keep : bool, optional
        Normalise all images now, which pays if every epoch needs them. Those of a data set that is not resident are
        normalised batch by batch all the same.
    """

    def __init__(
        self, data: DeviceImages, indices: np.ndarray, mean: Tensor, std: Tensor, dtype: torch.dtype, keep: bool = False
    ) -> None:
        self.data = data
        self.dtype = dtype
        self.layout = hardware.layout_of(data.device)
        self.size = data.pixels.shape[1]
        self._arange = torch.arange(self.size, device=data.device)
        self._copies: torch.cuda.Stream | None = None  # beside the one that computes
        if data.device.type == "cuda" and not data.resident:
            self._copies = torch.cuda.Stream(data.device)  # type: ignore[no-untyped-call]
        self.rows = torch.empty(len(indices), dtype=torch.int64, device=data.pixels.device)
        self.labels = torch.empty(len(indices), dtype=torch.int64, device=data.device)
        self._scale, self._shift = torch.empty(2, len(mean), device=data.device)
        self._kept: Tensor | None = None
        if keep and data.resident:
            self._kept = torch.empty(len(indices), *data.pixels.shape[1:], dtype=dtype, device=data.device)
        self.fill(indices, mean, std)

    def fill(self, indices: np.ndarray, mean: Tensor, std: Tensor) -> None:
        """Hold other images, as many as before, in the same place; parameters are those of the class."""
        self.rows.copy_(torch.from_numpy(indices))
        self.labels.copy_(self.data.labels[self.rows.to(self.data.device)])
        self._scale.copy_(1 / std)
        self._shift.copy_(-mean / std)
        if self._kept is not None:
            for kept, rows in zip(torch.split(self._kept, 256), torch.split(self.rows, 256), strict=True):
                kept.copy_(self._normalise(self.data.pixels[rows], self.dtype))

    def __len__(self) -> int:
        return len(self.labels)

    def _normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.addcmul(self._shift, pixels.float(), self._scale).to(dtype)

    def batches(self, plan: Sequence[Tensor], augment: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (n, C, H, W), in the device's layout, and labels (n,) of each batch of a plan (see `plan_epoch`).

        If the data set is not resident, a batch is copied to the GPU while it still works on the one before: the caller
        only queues work, and copies have a queue of their own.
        """
        for batch in plan:
            yield self._images(batch, augment), self.labels[batch[:, 0].to(self.data.device)]

    def slices(self, size: int) -> Iterator[Tensor]:
        """All images in order, at most `size` at a time; without a copy if they are kept."""
        plan = torch.arange(len(self), device=self.rows.device).view(-1, 1)
        if self._kept is not None:
            yield from (self._channels_first(chunk) for chunk in torch.split(self._kept, size))
        else:
            yield from (images for images, _ in self.batches(torch.split(plan, size)))

    def exact(self, positions: Tensor) -> Tensor:
        """The images at `positions` in float32."""
        pixels = self.data.pixels[self.rows[positions.to(self.rows.device)]].to(self.data.device)
        return self._channels_first(self._normalise(pixels, torch.float32))

    def _channels_first(self, images: Tensor) -> Tensor:
        """Images (n, H, W, C) as (n, C, H, W), without a copy where the layout is channels_last."""
        images = images.permute(0, 3, 1, 2)
        # not contiguous(), which leaves images of one channel as they are, and operations take them for channels_last
        return images if self.layout == torch.channels_last else images.clone(memory_format=self.layout)

    def _fetch(self, positions: Tensor) -> Tensor:
        """Pixels of a batch, which may still be on their way to the device."""
        pixels = self.data.pixels[self.rows[positions.to(self.rows.device)]]
        if self._copies is None:
            return pixels
        with torch.cuda.stream(self._copies):
            return pixels.pin_memory().to(self.data.device, non_blocking=True)

    def _images(self, batch: Tensor, augment: bool) -> Tensor:
        source, rows = self._kept, batch[:, 0]
        if source is None:
            fetched = self._fetch(rows)
            if self._copies is not None:
                torch.cuda.current_stream(self.data.device).wait_stream(self._copies)
                fetched.record_stream(torch.cuda.current_stream(self.data.device))
            source, rows = self._normalise(fetched, self.dtype), torch.arange(len(batch), device=self.data.device)
            if not augment:
                return self._channels_first(source)
        if not augment:
            return self._channels_first(source[rows])
        return self._channels_first(self._augmented(source, rows, batch[:, 1:].to(self.data.device)))

    def _augmented(self, source: Tensor, rows: Tensor, moves: Tensor) -> Tensor:
        """Shift and flip images at `rows` of (N, H, W, C).

        `moves` has shape (n, 3): downwards, to the right (pixels), and 1 to flip. A shifted crop of an image padded
        by reflection is a gather with reflected coordinates, so nothing is padded.
        """
        down, right, flip = moves[:, :, None].unbind(1)  # (n, 1) each
        y = self._reflect(self._arange + down)
        x = self._reflect(self._arange + right)
        x = torch.where(flip == 1, self.size - 1 - x, x)
        return source[rows[:, None, None], y[:, :, None], x[:, None, :]]

    def _reflect(self, coordinates: Tensor) -> Tensor:
        coordinates = coordinates.abs()
        return self.size - 1 - (self.size - 1 - coordinates).abs()


def plan_epoch(n: int, size: int, augment: bool, generator: torch.Generator) -> Tensor:
    """Draw the order of an epoch and each image's augmentation.

    Returns
    -------
    Tensor of int64, shape (n, 4)
        Position of the image in the training part, shift down, shift right (up to an eighth of `size`), and whether to
        flip.
    """
    plan = torch.zeros(n, 4, dtype=torch.int64)
    plan[:, 0] = torch.randperm(n, generator=generator)
    if augment:
        reach = size // 8
        plan[:, 1:3] = torch.randint(-reach, reach + 1, (n, 2), generator=generator)
        plan[:, 3] = torch.randint(0, 2, (n,), generator=generator)
    return plan


def split_batches(plan: Tensor, batch_size: int) -> list[Tensor]:
    """Cut a plan into as few batches as `batch_size` allows, of equal size to within one image.

    A small last batch would move BatchNorm's running statistics, which evaluation uses, as far as a full one does,
    and BatchNorm cannot train on a single image at all: three images are one batch even if the batch size is two.
    """
    count = min(math.ceil(len(plan) / batch_size), max(1, len(plan) // 2))
    return list(torch.tensor_split(plan, count))

"""Images that are normalised as pretrained weights expect, rather than by the moments of the training part."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

from experiments.training.images import DeviceImages
from models.weights import parse_normalisation


@dataclass(frozen=True)
class NormalisedImages(DeviceImages):
    """A data set on the device with one normalisation for all splits."""

    mean: Tensor  # float32, shape (channels,), in units of 0 to 255, like the next
    std: Tensor

    @classmethod
    def of(cls, images: DeviceImages, normalisation: str) -> Self:
        """The same images on the same device, with a normalisation as `parse_normalisation` takes it."""
        mean, std = (moment.to(images.device) for moment in parse_normalisation(normalisation))
        fields = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
        return cls(**fields, mean=mean, std=std)

    def normalisation(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, whatever the images."""
        return self.mean, self.std

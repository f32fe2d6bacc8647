"""The image classifiers: one file per family, blocks they share, and a registry from name to class.

A model is one file in this folder with a class that is entered by `@register`. Files are found by themselves.
"""

from models import lenet, vgg, resnet, efficientnet  # noqa: I001, F401 - in the order in which they are listed
from models.registry import BASELINES, MODELS, ModelCard, ModelError, build, describe, import_all, register
from models.registry import unusable_sentences

__all__ = ["BASELINES", "MODELS", "ModelCard", "ModelError", "build", "describe", "register", "unusable_sentences"]

import_all(__name__, __path__)

"""The image classifiers: one file per family, blocks they share, and a registry from name to class.

A model is one file in this folder with a class that `@register` enters. Files are found automatically.
"""

from models import lenet, vgg, resnet, efficientnet  # noqa: I001, F401 - the order of every list of models
from models.registry import BASELINES, MODELS, UNUSABLE, ModelCard, ModelError, build, describe, import_all, register
from models.registry import unusable_sentences

__all__ = ["BASELINES", "MODELS", "UNUSABLE", "ModelCard", "ModelError", "build", "describe", "register"]
__all__ += ["unusable_sentences"]

import_all(__name__, __path__)

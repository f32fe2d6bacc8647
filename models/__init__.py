"""The image classifiers: one file per family, blocks they share, and a registry from name to class.

A model is one file in this folder with a class that `@register` enters. Files are found automatically.
"""

from models.registry import (
    BASELINES,
    MODELS,
    UNUSABLE,
    ModelCard,
    ModelError,
    build,
    describe,
    import_all,
    register,
    unusable_sentences,
    why_unknown,
)

__all__ = ["BASELINES", "MODELS", "UNUSABLE", "ModelCard", "ModelError", "build", "describe", "register"]
__all__ += ["unusable_sentences", "why_unknown"]

# the order of every list of models; files of users follow
import_all(__name__, __path__, first=("lenet", "vgg", "resnet", "efficientnet"))

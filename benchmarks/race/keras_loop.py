"""Keras 3 on torch: the network in Keras's own layers with the same initial weights, `compile` and `fit`.

Gray images are arrays in memory, normalised beforehand, as in Keras's examples; photos come from torch's DataLoader,
which `fit` takes. Images are channels_first: in channels_last Keras copies every convolution's input on this backend.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"  # read when keras is imported

from pathlib import Path
from typing import Any

import keras
import mlflow
import numpy as np
import torch
from keras import layers
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from benchmarks.race.common import Prepared, Record, cosine, main, mlflow_run
from benchmarks.race.works import LR, WEIGHT_DECAY, Entry
from models.layers import GlobalAveragePool
from models.resnet import ResidualBlock

keras.config.set_image_data_format("channels_first")
SCORES = ("accuracy", "f1_macro", "f1_micro", "loss")


def weighted(layer: keras.Layer, x: Any, *weights: torch.Tensor | None) -> Any:
    """Apply a layer, then give it weights."""
    y = layer(x)
    layer.set_weights([weight.detach().numpy() for weight in weights if weight is not None])
    return y


def convolution(module: nn.Conv2d, x: Any) -> Any:
    """A convolution; with a stride Keras's "same" would pad on other sides than torch."""
    kernel, stride, padding = module.kernel_size[0], module.stride[0], module.padding[0]
    same = "same" if padding and stride == 1 else "valid"
    if padding and stride > 1:
        x = layers.ZeroPadding2D(padding)(x)
    layer = layers.Conv2D(module.out_channels, kernel, stride, same, use_bias=module.bias is not None)
    return weighted(layer, x, module.weight.permute(2, 3, 1, 0), module.bias)


def batch_norm(module: nn.BatchNorm2d, x: Any) -> Any:
    """BatchNorm; torch's momentum is the share of the new value."""
    assert module.momentum is not None
    layer = layers.BatchNormalization(axis=1, momentum=1 - module.momentum, epsilon=module.eps)
    return weighted(layer, x, module.weight, module.bias, module.running_mean, module.running_var)


def apply(module: nn.Module, x: Any) -> Any:
    """Apply the Keras layers that correspond to one of ours."""
    match module:
        case nn.ModuleList() | nn.Sequential():
            for child in module:
                x = apply(child, x)
            return x
        case ResidualBlock():
            total = layers.Add()([apply(module.residual, x), apply(module.shortcut, x)])
            return apply(module.activation, total)
        case nn.Conv2d():
            return convolution(module, x)
        case nn.BatchNorm2d():
            return batch_norm(module, x)
        case nn.Linear():
            return weighted(layers.Dense(module.out_features), x, module.weight.T, module.bias)
        case nn.Identity():
            return x
    simple = {
        nn.ReLU: layers.ReLU,
        nn.Tanh: lambda: layers.Activation("tanh"),
        nn.MaxPool2d: lambda: layers.MaxPooling2D(2),
        nn.AvgPool2d: lambda: layers.AveragePooling2D(2),
        nn.Flatten: lambda: layers.Reshape((-1,)),  # Keras's Flatten changes the order of channels_first
        GlobalAveragePool: layers.GlobalAveragePooling2D,
    }
    return simple[type(module)]()(x)


def keras_model(network: Any, in_channels: int, image_size: int) -> keras.Model:
    """Return the Keras model with the structure and the weights of one of ours."""
    inputs = keras.Input((in_channels, image_size, image_size))
    return keras.Model(inputs, apply(network.layers, inputs))


class Track(keras.callbacks.Callback):
    """Time each epoch and log it."""

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start the clock."""
        self.record.start_epoch()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log the epoch."""
        metrics = {f"val/{name}": float(logs[f"val_{name}"]) for name in SCORES}
        self.record.improves(epoch + 1, metrics)
        mlflow.log_metrics({"train/loss": float(logs["loss"]), **metrics}, step=epoch + 1)
        self.record.end_epoch()


def one_hot(label: Any, classes: int) -> Any:
    """Labels as Keras's F1Score wants them."""
    return keras.utils.to_categorical(label, classes)


def inputs(entry: Entry, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Arguments of `fit` and `evaluate` for each part: arrays of gray images, loaders of photos."""
    classes = prepared.model_arguments["num_classes"]
    if prepared.files is not None:
        parts = prepared.parts(lambda label: one_hot(label, classes))
        return {
            part: {
                "x": DataLoader(
                    images,
                    entry.batch_size,
                    shuffle=part == "train",
                    num_workers=entry.num_workers,
                    persistent_workers=True,
                )
            }
            for part, images in parts.items()
        }
    whole = prepared.images()
    assert isinstance(whole, ConcatDataset)
    pixels, labels = (np.concatenate([getattr(part, name) for part in whole.datasets]) for name in ("data", "targets"))
    x = (pixels[:, None].astype("float32") - np.float32(prepared.mean[0])) / np.float32(prepared.std[0])
    y = one_hot(labels, classes)
    rows = prepared.indices
    return {part: {"x": x[rows[part]], "y": y[rows[part]], "batch_size": entry.batch_size} for part in rows}


def loop(entry: Entry, prepared: Prepared) -> Record:
    """Compile and fit, then score the best epoch."""
    arguments = prepared.model_arguments
    model = keras_model(prepared.network(entry.model), arguments["in_channels"], arguments["image_size"])
    model.compile(
        keras.optimizers.AdamW(LR, weight_decay=WEIGHT_DECAY, epsilon=1e-8),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.CategoricalAccuracy("accuracy"),
            keras.metrics.F1Score("macro", name="f1_macro"),
            keras.metrics.F1Score("micro", name="f1_micro"),
        ],
    )
    path = Path(entry.folder) / "best.weights.h5"
    track = Track()
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch, _: cosine(entry, epoch + 1)),
        keras.callbacks.ModelCheckpoint(str(path), "val_loss", save_best_only=True, save_weights_only=True),
        track,
    ]
    data = inputs(entry, prepared)
    validation = data["val"]
    with mlflow_run(entry):
        model.fit(
            **data["train"],
            epochs=entry.epochs,
            validation_data=(validation["x"], validation["y"]) if "y" in validation else validation["x"],
            callbacks=callbacks,
            verbose=0,
        )
        if "test" in data:
            model.load_weights(path)
            test = model.evaluate(**data["test"], return_dict=True, verbose=0)
            mlflow.log_metrics({f"test/{name}": float(test[name]) for name in SCORES})
            track.record.test_accuracy = float(test["accuracy"])
        mlflow.log_artifact(str(path))
    return track.record


if __name__ == "__main__":
    main(loop)

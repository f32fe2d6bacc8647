"""The fastai Learner as its documentation recommends: DataBlock for photos, its metrics and SaveModelCallback.

Its mixed precision is for CUDA alone (`autocast("cuda")`), so it computes in fp32. Its defaults would leave out the
last batch and weight decay of biases; both are set as in the other loops.
"""

from functools import partial
from pathlib import Path

import mlflow
from fastai.callback.tracker import SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.learner import Callback, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import OptimWrapper
from fastai.vision.augment import Resize, ResizeMethod
from fastai.vision.data import ImageBlock, Normalize
from torch.optim import AdamW

from benchmarks.race.common import Prepared, Record, cosine, main, mlflow_run
from benchmarks.race.works import LR, WEIGHT_DECAY, Entry

SCORES = ("loss", "accuracy", "f1_macro", "f1_micro")  # in the order of the Learner's metrics


def data_loaders(entry: Entry, prepared: Prepared) -> DataLoaders:
    """Training and validation part."""
    if prepared.files is None:
        parts = prepared.parts()
        return DataLoaders.from_dsets(
            parts["train"], parts["val"], bs=entry.batch_size, drop_last=False, num_workers=entry.num_workers
        )
    mean, std = ([value / 255 for value in values] for values in (prepared.mean, prepared.std))
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=lambda item: item[0],
        get_y=lambda item: item[1],
        splitter=IndexSplitter(prepared.indices["val"].tolist()),
        item_tfms=Resize(prepared.model_arguments["image_size"], method=ResizeMethod.Squish),
        batch_tfms=Normalize.from_stats(mean, std, cuda=False),
    )
    return block.dataloaders(
        prepared.files, bs=entry.batch_size, val_bs=entry.batch_size, drop_last=False, num_workers=entry.num_workers
    )


class Schedule(Callback):
    """The cosine schedule, a step an epoch."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def before_epoch(self) -> None:
        """Set the learning rate."""
        self.opt.set_hyper("lr", cosine(self.entry, self.epoch + 1))


class Track(Callback):
    """Time each epoch, and log the values of the Recorder, which is called first."""

    order = 70

    def __init__(self) -> None:
        self.record = Record()

    def before_epoch(self) -> None:
        """Start the clock."""
        self.record.start_epoch()

    def after_epoch(self) -> None:
        """Log the epoch."""
        train_loss, *values = self.recorder.values[-1]
        metrics = {f"val/{name}": value for name, value in zip(SCORES, values, strict=True)}
        self.record.improves(self.epoch + 1, metrics)
        mlflow.log_metrics({"train/loss": train_loss, **metrics}, step=self.epoch + 1)
        self.record.end_epoch()


def loop(entry: Entry, prepared: Prepared) -> Record:
    """Fit, and score the best epoch, which SaveModelCallback loads at the end."""
    track = Track()
    callbacks = [Schedule(entry), SaveModelCallback(fname="best"), track]
    learn = Learner(
        data_loaders(entry, prepared),
        prepared.network(entry.model),
        CrossEntropyLossFlat(),
        partial(OptimWrapper, opt=AdamW),
        metrics=[accuracy, F1Score(average="macro"), F1Score(average="micro")],
        wd=WEIGHT_DECAY,
        wd_bn_bias=True,
        cbs=callbacks,
        path=entry.folder,
    )
    with mlflow_run(entry), learn.no_bar(), learn.no_logging():
        learn.fit(entry.epochs, LR)
        if (test := prepared.parts().get("test")) is not None:
            loader = learn.dls.valid.new(test)
            with learn.removed_cbs(callbacks):  # to them `validate` is an epoch, too
                values = learn.validate(dl=loader)
            metrics = {f"test/{name}": value for name, value in zip(SCORES, values, strict=True)}
            mlflow.log_metrics(metrics)
            track.record.test_accuracy = metrics["test/accuracy"]
        mlflow.log_artifact(str(Path(entry.folder) / "models" / "best.pth"))
    return track.record


if __name__ == "__main__":
    main(loop)

"""PyTorch Lightning as its documentation recommends: MLFlowLogger, torchmetrics, ModelCheckpoint, bf16-mixed."""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from benchmarks.race.common import EXPERIMENT, Prepared, Record, artifact_location, main, params
from benchmarks.race.works import LR, WEIGHT_DECAY, Entry


class Classifier(lightning.LightningModule):
    """A network with its loss, optimizer and metrics."""

    def __init__(self, network: nn.Module, classes: int, epochs: int) -> None:
        super().__init__()
        self.network = network
        self.epochs = epochs
        metrics = MetricCollection({
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "f1_macro": MulticlassF1Score(classes, average="macro"),
            "f1_micro": MulticlassF1Score(classes, average="micro"),
        })  # fmt: skip
        self.val_metrics, self.test_metrics = (metrics.clone(prefix=f"{part}/") for part in ("val", "test"))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss = cross_entropy(self.network(x), y)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def _evaluate(self, part: str, metrics: MetricCollection, batch: list[Tensor]) -> None:
        x, y = batch
        logits = self.network(x)
        metrics.update(logits, y)
        self.log(f"{part}/loss", cross_entropy(logits, y), on_epoch=True)
        self.log_dict(metrics, on_epoch=True)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Score a batch."""
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: list[Tensor], _: int) -> None:
        """Score a batch."""
        self._evaluate("test", self.test_metrics, batch)

    def configure_optimizers(self) -> Any:
        """AdamW and the cosine schedule, a step an epoch."""
        optimizer = AdamW(self.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, self.epochs)}


class Measure(Callback):
    """Time the epochs from start to start, so that each has its logging; keep the scores of the best."""

    def __init__(self) -> None:
        self.record = Record()

    def on_train_epoch_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        """End the epoch before, if there was one."""
        if trainer.current_epoch > 0:
            self.record.end_epoch()
        self.record.start_epoch()

    def on_train_epoch_end(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        """Note the scores."""
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        self.record.improves(trainer.current_epoch + 1, metrics)

    def on_train_end(self, *_: Any) -> None:
        """End the last epoch."""
        self.record.end_epoch()


def precision() -> Any:
    """bf16-mixed if the processor multiplies bf16."""
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


def loop(entry: Entry, prepared: Prepared) -> Record:
    """Let the Trainer train, and test the best checkpoint."""
    loaders = {
        part: DataLoader(
            images, entry.batch_size, shuffle=part == "train", num_workers=entry.num_workers, persistent_workers=True
        )
        for part, images in prepared.parts().items()
    }
    classes = prepared.model_arguments["num_classes"]
    model = Classifier(prepared.network(entry.model), classes, entry.epochs)
    logger = MLFlowLogger(
        EXPERIMENT,
        tracking_uri=entry.tracking_uri,
        log_model=True,
        artifact_location=artifact_location(entry),
    )
    logger.log_hyperparams(params(entry))
    measure = Measure()
    checkpoint = ModelCheckpoint(entry.folder, monitor="val/loss", save_weights_only=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=entry.epochs,
        precision=precision(),
        logger=logger,
        callbacks=[checkpoint, measure],
        enable_progress_bar=False,
    )
    trainer.fit(model, loaders["train"], loaders["val"])
    if "test" in loaders:
        [test] = trainer.test(model, loaders["test"], ckpt_path="best")
        measure.record.test_accuracy = test["test/accuracy"]
    return measure.record


if __name__ == "__main__":
    main(loop)

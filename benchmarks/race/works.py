"""Works and contestants. Nothing here imports torch: the peak memory of a child includes its parent's."""

import dataclasses
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LR, WEIGHT_DECAY = 1e-3, 0.01  # of AdamW, the defaults of `TrainingConfig`


@dataclass(frozen=True)
class Work:
    """One training to be done.

    Attributes
    ----------
    name : str
        Key of `WORKS`.
    task : str
        Whose data set and protocol are used; split 0 of it.
    model : str
        Key of `models.MODELS`.
    batch_size : int
    photos : int or None
        Training photos that are taken of the data set, half of each class; None takes all of Fashion-MNIST.
    goal : float or None
        How many times as fast as the plain loop an epoch is meant to be.
    """

    name: str
    task: str
    model: str
    batch_size: int
    photos: int | None
    goal: float | None


@dataclass(frozen=True)
class Contestant:
    """A program that does the work.

    Attributes
    ----------
    name : str
        Key of `CONTESTANTS`.
    module : str or None
        Run with `python -m`; None is the task's own script.
    package : str or None
        Needed for it, besides our own requirements.
    num_workers : int
        Processes that load data.
    lacks : tuple of str
        Models that it has no version of.
    devices : tuple of str
        Devices on which it is raced.
    """

    name: str
    module: str | None
    package: str | None = None
    num_workers: int = 2
    lacks: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)

    @property
    def is_installed(self) -> bool:
        """Whether it can be raced here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


WORKS = {
    work.name: work
    for work in (
        Work("garments-lenet5", "task3", "lenet5", 256, None, 10),
        Work("garments-vggnet", "task3", "vggnet", 256, None, None),
        Work("garments-resnetcnn", "task3", "resnetcnn", 256, None, 6),
        Work("photos-lenet5", "task2", "lenet5", 128, 640, 12),
        Work("photos-resnetcnn", "task2", "resnetcnn", 128, 640, 9),
        Work("photos-efficientnet_b0", "task2", "efficientnet_b0", 64, 320, 4),
    )
}
OURS = "ours"
PLAIN = ("plain-0", "plain-2", "plain-8")
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("plain-0", "benchmarks.race.plain", num_workers=0),
        Contestant("plain-2", "benchmarks.race.plain"),
        Contestant("plain-8", "benchmarks.race.plain", num_workers=8, devices=("cuda",)),
        Contestant("lightning", "benchmarks.race.lightning_loop", "lightning"),
        Contestant("fastai", "benchmarks.race.fastai_loop", "fastai"),
        Contestant("keras", "benchmarks.race.keras_loop", "keras", lacks=("efficientnet_b0",)),
        Contestant(OURS, None, devices=("cpu", "cuda")),
    )
}


@dataclass(frozen=True)
class Entry:
    """One run of one contestant: all that its process is told.

    Attributes
    ----------
    contestant, model : str
    prepared : str
        Folder that `preparation` filled.
    folder : str
        Of this run's store, weights and result.
    batch_size, epochs, num_workers : int
    seed : int
        Of the order of batches, and of dropout.
    device : str
        cpu or cuda.
    """

    contestant: str
    model: str
    prepared: str
    folder: str
    batch_size: int
    epochs: int
    num_workers: int
    seed: int
    device: str = "cpu"

    @property
    def tracking_uri(self) -> str:
        """The MLflow store of this run alone."""
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def result(self) -> Path:
        """File with the measurements of a peer's process."""
        return Path(self.folder) / "result.json"

    def write(self) -> Path:
        """Write the entry into its folder, for its process to read."""
        path = Path(self.folder) / "entry.json"
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str) -> "Entry":
        """Read an entry that `write` has written."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

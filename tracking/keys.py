"""Every key of the result database and its meaning, for writers and readers alike."""

from collections.abc import Mapping

from tracking.scores import METRICS, PARTS, SCORES
from tracking.settings import COMPARED, MEANINGS

# MLflow experiments of earlier versions, which have no `task` tag
UNTAGGED_EXPERIMENTS = {
    "task1-cats-vs-dogs": "task1",
    "task2-chihuahua-vs-muffin": "task2",
    "task3-fashion-mnist": "task3",
}

SAMPLE = "sample/"  # no folder can have this name
BASELINES = ("majority", "linear")  # models without a training loop, which a network has to beat

PARAMS = {
    "model": "name in models.MODELS, library:architecture, or a baseline, which is in the group of networks beside it",
    "dataset": "published name, or name of the folder; begins with SAMPLE for generated images",
    "protocol": "method of splitting the images, with the shares of train:validation(:test)",
    "n_splits": "holdouts of the whole protocol, or folds of a repetition",
    "repetitions": "how often all folds are drawn, if more than once (children only)",
    "leak_free": "whether near duplicates stay in one part, and duplicates of test images are not trained on",
    "split": "number of the holdout or fold, from 0, through all repetitions (children only)",
    "replicate": "number of the training on the split, from 0, where there are several (children only)",
    "tune": "number of configurations of each model that a tuned split tries",
    "space": "what is tuned between which values, and the values of trial 0, such as lr=0.0001..0.01 from lr=0.001",
    "halving": "whether the worse half of the trials stops at rungs",
    "trial": "number of the configuration, from 0, which is the task's own (trials only)",
    "chosen_trial": "the trial with the lowest validation loss, whose settings and model are the split's",
    "n_train": "images trained on (children only)",
    "n_val": "images that choose the best epoch (children only)",
    "n_test": "images that are scored once, at the end (children only)",
    "parameters": "parameters of the model, also where only its head was trained",
    "macs": "multiply-accumulates of one forward pass of one image",
    "threads": "CPU threads of one operation, which the last bits depend on",
    "seed": "split_seed and train_seed, if they are equal",
    **MEANINGS,
    "normalisation": "mean and sd of each channel (0 to 255) that pretrained weights expect; else the training part's",
}
SEEDS = ("split_seed", "train_seed")  # runs of earlier versions have only `seed`
# Runs with equal values of these params, the same data digest and the same kind of device form a comparison group; of
# pretrained weights the kind is compared, too: the library's, or a file
TUNING = ("tune", "space", "halving")  # missing in runs that are not tuned
GROUP_PARAMS = ("protocol", "n_splits", "leak_free", *TUNING, *COMPARED)
CHILD_PARAMS = (
    "repetitions",
    "split",
    "replicate",
    "trial",
    "chosen_trial",
    "n_train",
    "n_val",
    "n_test",
)  # parents and children have the others
IDENTITY = ("model", "split", "replicate")  # of a run in its comparison group; a run without a replicate is number 0


def trials_of(task: str) -> str:
    """The name under which a task's trials are stored: apart, since the UI shows few runs of an experiment at once."""
    return task + TRIALS


def tuned_settings(params: Mapping[str, object]) -> frozenset[str]:
    """The settings that were tuned, by a run's params: they are results, and divide no runs into groups."""
    space = params.get("space")
    parts = space.split() if isinstance(space, str) else ()
    return frozenset(part.partition("=")[0] for part in parts if "=" in part)


def is_divergence(stopped: str) -> bool:
    """Whether a trial diverged, by its tag `STOPPED`; the others are empty, or the epoch after which it stopped."""
    return bool(stopped) and not stopped.isdecimal()


def has_open_end(protocol: str) -> bool:
    """Whether more splits of a protocol, by its name, leave the first ones as they are: `n_splits` decides nothing."""
    return protocol.startswith("repeated holdout")


def has_folds(protocol: str) -> bool:
    """Whether a protocol, by its name, has folds: more splits of it are `repetitions`, each of `n_splits` folds."""
    return protocol == "stratified k-fold"


EPOCH_METRICS = {  # step = epoch, from 1
    "train/loss": "mean cross-entropy over the epoch's batches, each before its step (nats)",
    "train/accuracy": "share of training images predicted correctly, likewise",
    **{f"val/{score.name}": f"{score.label} of the validation part after the epoch" for score in SCORES.values()},
    "lr": "learning rate of the epoch",
    "epoch_seconds": "wall time from the end of the epoch before: its logging, training, validation",
}

FINAL_METRICS = {
    **{metric: f"{metric.split('/')[1]}, {PARTS[metric.split('/')[0]]}" for metric in METRICS},
    "best_epoch": "epoch with the lowest validation loss, whose weights are kept",
    "epochs_run": "number of epochs until the end or early stopping",
    "train_seconds": "wall time of all epochs",
    "images_per_second": "training and validation images processed per second of train_seconds",
    "leaking_images": "validation and test images with a near duplicate in the training part",
    "leaking_test": "test images with a near duplicate in the training part",
}
MEAN, SD, LOW, HIGH = "mean/", "sd/", "low/", "high/"  # prefixes of a final metric on the parent
STATISTICS = {
    MEAN: "mean",
    SD: "standard deviation (ddof 1)",
    LOW: "lower end of the 95 % interval of the mean",
    HIGH: "upper end of the 95 % interval of the mean",
}
SUMMARY_METRICS = {"n_splits": "splits that have finished"} | {
    prefix + key: f"{name} over the finished splits of {key}"
    for prefix, name in STATISTICS.items()
    for key in FINAL_METRICS
}

# Columns of the UI's runs page, from the left: metrics of parents, of children, and of parents again; params of both
METRIC_COLUMNS = (
    f"{MEAN}test/accuracy", f"{SD}test/accuracy", f"{LOW}test/accuracy", f"{HIGH}test/accuracy",
    "test/accuracy", "best_val/accuracy", "best_epoch",
    "n_splits", f"{MEAN}test/f1_macro", f"{MEAN}best_val/accuracy", f"{MEAN}best_epoch",
)  # fmt: skip
PARAM_COLUMNS = ("model", "dataset", "epochs", "lr", "batch_size", "seed", "parameters")

STOPPED = "stopped"
LOOKS = "looks"
TAGS = {
    "task": "name of the task",
    "question": "question of the task",
    "fingerprint": "digest of configuration, data, split, seeds and source, which decide the result",
    "split_hash": "digest of the split's indices (children only)",
    "dataset_digest": "SHA-256 over all pixels, labels and class names",
    "source_digest": "digests of the code that decides the result: shared by all models, and of this model",
    "git_commit": "commit of the working tree, with -dirty if files differ from it",
    "hardware": "name of the processor or GPU",
    "versions": "Python, torch, torchvision, scikit-learn, and numba where its kernels are used",
    "superseded_by": "later run of the same split, model and group; or AGAIN",
    "failure": "reason why the run has no result",
    "owner": "process that does or did the work: its host, id and start (Unix time)",
    "command": "process of the command that the owner works for, likewise; may be the owner itself",
    "heartbeat": "last time the owner reported to be alive (Unix time)",
    LOOKS: "planned numbers of splits at which the models are compared, such as 5,10,20; or empty",
    STOPPED: "why a trial ended early: after which epoch it was among the worse ones, or that it diverged; or empty",
    "figures_of": "digest of the ids of the runs that the figures show (parents only)",
    "file_digests": "SHA-256 of each file in the artifacts, as JSON (children only)",
}

TASK = "task"  # tag of an experiment: its task
PREFIX = "prefix"  # tag of an experiment: whose it is, by EXPERIMENT_PREFIX (tracking.store); else nobody's
TRIALS = "/trials"  # ends the name of the experiment that has a task's trials, and of their task; no task has a slash
AGAIN = "a run that is to come"  # superseded_by of a run that --fresh is going to repeat; it counts until then
PARENT = "mlflow.parentRunId"  # MLflow's tag of a child
USER = "mlflow.user"  # MLflow's tag of a run: who began it, shown in the UI
NOTE = "mlflow.note.content"  # MLflow's tag of an experiment: its description in the UI, in Markdown
VIEWS = "mlflow.sharedViewState."  # prefix of MLflow's tags of views (JSON); the view's name in links follows
VIEW = "models"  # name of our view (tracking.view)
CHAMPION = "champion"  # alias in the model registry, where each task has a model: the best network
REASON = "reason"  # tag of a version: why it replaced the one before

CHECKPOINT = "checkpoint/best.pt"  # weights of the best epoch, and of those that cross_val needs (tracking.checkpoints)
PREDICTIONS = "predictions.npz"  # predictions for each validation and test image (tracking.predictions)
SPLIT = "split.npz"  # train, val, test: sorted indices
HISTORY = "history.json"  # the metrics of each epoch, with the time of their logging
CONFUSION = "confusion.json"  # classes; counts (rows: true classes) and mean loss of val and test
CONFUSION_FIGURE = "confusion.png"
THUMBNAILS = "thumbnails.npz"  # the most confident errors: index, pixels (uint8)
CLASSES = "classes.json"  # class names by label (parents)
MODEL_CARD = "model_card.md"  # description and costs of the model (parents)
FIGURES = "figures"  # folder: the comparison as PNG and SVG (parents)

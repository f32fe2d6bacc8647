"""Every key of the result database, once, with its meaning. Writers and readers both take them from here."""

from tracking.scores import METRICS, PARTS, SCORES
from tracking.settings import COMPARED, MEANINGS

# MLflow experiments that have no `task` tag, because an earlier version of this program made them
UNTAGGED_EXPERIMENTS = {
    "task1-cats-vs-dogs": "task1",
    "task2-chihuahua-vs-muffin": "task2",
    "task3-fashion-mnist": "task3",
}

SAMPLE = "sample/"  # no folder can be called so
BASELINES = ("majority", "linear")  # models that need no training loop; what a network has to beat

PARAMS = {
    "model": "name in models.MODELS, or a baseline's, which stands in the group of the networks it ran beside",
    "dataset": "published name, or the folder's; begins with SAMPLE for generated images",
    "protocol": "how the images are divided, with the shares of train:validation(:test)",
    "n_splits": "holdouts or folds of the whole protocol",
    "leak_free": "whether near duplicates were kept together, and none of a test image was trained on",
    "split": "which of them, from 0 (children only)",
    "n_train": "images trained on (children only)",
    "n_val": "images that choose the best epoch (children only)",
    "n_test": "images that are looked at once, at the end (children only)",
    "parameters": "trainable parameters of the model",
    "macs": "multiply-accumulates of one forward pass of one image",
    "threads": "CPU threads of one operation; last bits depend on it",
    "seed": "both seeds, if they are one number",
    **MEANINGS,
}
# Runs that agree in these params, in the data's digest and in the kind of device may be compared: a comparison group.
GROUP_PARAMS = ("protocol", "n_splits", "leak_free", *COMPARED)
CHILD_PARAMS = ("split", "n_train", "n_val", "n_test")  # the others stand on parent and child alike

EPOCH_METRICS = {  # step = epoch, from 1
    "train/loss": "mean cross-entropy over the epoch's batches, each before its step (nats)",
    "train/accuracy": "share of training images predicted right, likewise",
    **{f"val/{score.name}": f"{score.label} of the validation part after the epoch" for score in SCORES.values()},
    "lr": "learning rate of the epoch",
    "epoch_seconds": "wall time since the last epoch's record was handed over: its logging, training, validation",
}

FINAL_METRICS = {
    **{metric: f"{metric.split('/')[1]}, {PARTS[metric.split('/')[0]]}" for metric in METRICS},
    "best_epoch": "epoch with the lowest validation loss, whose weights are kept",
    "epochs_run": "epochs until the end or early stopping",
    "train_seconds": "wall time of all epochs",
    "images_per_second": "training and validation images that passed the model, per second of train_seconds",
    "leaking_images": "validation and test images of which a near duplicate was trained on",
    "leaking_test": "those of them that are in the test part",
}
# prefixes of a final metric on the parent, over its finished splits: mean, sd (ddof 1), ends of the 95 % interval
MEAN, SD, LOW, HIGH = "mean/", "sd/", "low/", "high/"
SUMMARY_METRICS = {
    "n_splits": "splits that have finished",
    **{
        f"{prefix}{key}": f"{statistic} over the finished splits of {key}"
        for prefix, statistic in {
            MEAN: "mean",
            SD: "standard deviation (ddof 1)",
            LOW: "lower end of the 95 % interval of the mean",
            HIGH: "upper end of the 95 % interval of the mean",
        }.items()
        for key in FINAL_METRICS
    },
}

# What the runs page of the UI shows, from the left, where it is opened by our links: first parents' metrics, then
# children's, then parents' again, then params of both
METRIC_COLUMNS = (
    f"{MEAN}test/accuracy", f"{SD}test/accuracy", f"{LOW}test/accuracy", f"{HIGH}test/accuracy",
    "test/accuracy", "best_val/accuracy", "best_epoch",
    "n_splits", f"{MEAN}test/f1_macro", f"{MEAN}best_val/accuracy", f"{MEAN}best_epoch",
)  # fmt: skip
PARAM_COLUMNS = ("model", "dataset", "epochs", "lr", "batch_size", "seed", "parameters")

TAGS = {
    "task": "name of the task",
    "question": "what the task asks",
    "fingerprint": "digest of all that decides the result: configuration, data, split, seed, source",
    "split_hash": "digest of the split's indices (children only)",
    "dataset_digest": "SHA-256 over all pixels, labels and class names",
    "source_digest": "digests of the code that decides the result: of what all models share, and of the model's own",
    "git_commit": "commit of the working tree, with -dirty where files differ from it",
    "hardware": "name of the processor or GPU",
    "versions": "Python, torch, torchvision and scikit-learn",
    "superseded_by": "run that did the same split of the same model again later, in the same group; or AGAIN",
    "failure": "why the run has no result",
    "owner": "process that does or did the work: its host, id, and when it started (Unix time)",
    "command": "process whose command it was done for, likewise; the owner, or the one that gave it the work",
    "heartbeat": "when that process last said that it is alive (Unix time)",
    "figures_of": "digest of the ids of the runs that the figures show (parents only)",
    "file_digests": "SHA-256 of each file in the artifacts, as JSON (children only)",
}

TASK = "task"  # tag of an experiment: the task that it belongs to
AGAIN = "a run that is to come"  # superseded_by of what --fresh has not come to yet: it counts until then
PARENT = "mlflow.parentRunId"  # MLflow's own tag
NOTE = "mlflow.note.content"  # likewise, of an experiment: its description in the UI, in Markdown
VIEWS = "mlflow.sharedViewState."  # and how the UI shows its runs, as JSON; the view's name in links follows
VIEW = "models"  # that name of ours (tracking.view)
CHAMPION = "champion"  # alias, in the model registry, of the best network of a task, whose name the model has
REASON = "reason"  # tag of its versions: why each took the place of the one before

CHECKPOINT = "checkpoint/best.pt"  # weights of the best epoch and what rebuilds the model (tracking.checkpoints)
PREDICTIONS = "predictions.npz"  # val_ and test_ index, true, pred, prob, all at the best epoch
SPLIT = "split.npz"  # train, val, test: sorted indices
HISTORY = "history.json"  # the epochs' metrics, each with the time of its logging
CONFUSION = "confusion.json"  # classes; counts of val and test, rows are true classes; and their mean loss
CONFUSION_FIGURE = "confusion.png"
THUMBNAILS = "thumbnails.npz"  # the images that were wrong with most confidence: index, pixels (uint8)
CLASSES = "classes.json"  # class names by label (parents)
MODEL_CARD = "model_card.md"  # what the model is and costs (parents)
FIGURES = "figures"  # folder of the comparison's figures as PNG and SVG (parents)

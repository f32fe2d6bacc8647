"""Size, half-width and power of the tests where two real learners have the same expected score by construction.

What      the same learner twice, with other seeds, or on the left and the right halves of randomly mirrored images: the
          expected difference is 0. Each comparison draws its own images from a large data set and follows a task's
          protocol. Power is the share of comparisons that find a difference of 5 points once it is added to the scores
Data      scikit-learn's learners for tasks 1 and 2: muffins and chihuahuas in 16 x 16 pixels; all others Fashion-MNIST
Sizes     task 1 as it is; task 2 with 590 + 148 images, task 3 with a twentieth of its images
Time      1 to 5 s a comparison of scikit-learn's learners, 4 s (task 1) to 1 minute of LeNet-5, four times that if it
          is tuned. What was drawn is kept: the same command goes on where it was interrupted

    python benchmarks/exact_nulls.py draw task1 lenet5 --comparisons 200
    python benchmarks/exact_nulls.py table

docs/statistics.md has the table.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import datasets
from analysis import statistics
from benchmarks.type_one_error import TEST, TRAIN, VAL, Protocol, Tally, before, estimate, table
from datasets import FashionMNIST, ImageData, Kaggle, RepeatedHoldout, Split, StratifiedKFold

DIFFERENCE = 0.05  # of the power
T_SHIRT, SHIRT = 0, 6  # the most similar classes of Fashion-MNIST


@dataclass(frozen=True)
class Setting:
    """A task's protocol on images drawn at random: `n_test` behind the `n_pool` that it divides."""

    protocol: RepeatedHoldout | StratifiedKFold
    n_pool: int
    n_test: int
    two_classes: bool


SETTINGS = {
    "task1": Setting(RepeatedHoldout(5, (3, 2)), 557, 140, True),
    "task2": Setting(StratifiedKFold(5), 590, 148, True),
    "task3": Setting(RepeatedHoldout(10, (2, 49, 49)), 3500, 0, False),
}

# predicted classes of the validation part (cross-fitted, for a network) and of the test part
Fit = Callable[[ImageData, Split, int], np.ndarray]


def classifier(build: Callable[[int], object]) -> Fit:
    """Learner of scikit-learn, from a function of a seed; the validation part chooses nothing."""

    def predict(data: ImageData, split: Split, seed: int) -> np.ndarray:
        pixels = data.images.reshape(len(data.images), -1) / 255.0
        model = build(seed)
        model.fit(pixels[split.train], data.labels[split.train])  # type: ignore[attr-defined]
        return np.asarray(model.predict(pixels[np.concatenate([split.val, split.test])]))  # type: ignore[attr-defined]

    return predict


def network(data: ImageData, split: Split, seed: int) -> np.ndarray:
    """LeNet-5 with the tasks' training; a twentieth of task 3 has batches of 16, so that an epoch has some steps."""
    return tuned(data, split, seed, trials=1)


def tuned(data: ImageData, split: Split, seed: int, trials: int = 8) -> np.ndarray:
    """The best of some trainings of LeNet-5, as `--tune` chooses it: both models have the same configurations."""
    import models
    from experiments.jobs.job import model_arguments
    from experiments.training import hardware
    from experiments.training.cross_fitting import SCORES_HALF
    from experiments.training.evaluation import evaluate_test
    from experiments.training.fit import TrainingDivergedError, fit
    from experiments.training.images import DeviceImages
    from experiments.training.state import TrainingState, initialise
    from experiments.tuning import halving
    from experiments.tuning.rounds import choose, lowest
    from experiments.tuning.space import DEFAULT_SPACE, configurations
    from tracking.settings import TrainingConfig

    size = 128 if len(split.train) > 128 * 2 else 16
    usual = hardware.resolve(TrainingConfig(augment=False, batch_size=size, device="cpu"))
    images, half = DeviceImages.load(data, "cpu"), datasets.halve(split.val, data.labels)
    states = [
        TrainingState(initialise(lambda: models.build("lenet5", **model_arguments(data)), seed, "cpu"), config, seed)
        for config in configurations(DEFAULT_SPACE, usual, trials, seed=0)
    ]
    trainings = [fit(state, images, split, half) for state in states]
    alive, curves = list(range(trials)), [[] for _ in states]
    for rung in halving.rungs(usual.epochs, halving=trials > 1):
        for number in alive:
            try:
                for record in trainings[number]:
                    curves[number].append((record.val.loss, *record.half_losses))
                    if record.epoch == rung < usual.epochs:
                        break
            except TrainingDivergedError:
                curves[number].append((np.inf, np.inf, np.inf))
        if rung < usual.epochs:
            alive = halving.survivors({number: lowest(curves[number]) for number in alive})
    chosen, *of_halves = choose({number: curves[number] for number in alive})
    predicted = np.empty(len(split.val), np.int64)
    for number, (trial, place) in enumerate(zip(of_halves, SCORES_HALF, strict=True)):
        predicted[half == number] = states[trial].chosen[place].val.predicted.numpy()[half == number]
    test = evaluate_test(states[chosen].model, images, split, *images.normalisation(split.train), usual.precision)
    assert test is not None
    return np.concatenate([predicted, test.predicted.numpy()])


def forest(seed: int) -> object:
    """Twenty extremely randomised trees: most of the spread is the seed's."""
    from sklearn.ensemble import ExtraTreesClassifier

    return ExtraTreesClassifier(20, random_state=seed)


def random_features(seed: int) -> object:
    """Ridge regression on 100 random Fourier features."""
    from sklearn.kernel_approximation import RBFSampler
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline

    return make_pipeline(RBFSampler(gamma=0.01, n_components=100, random_state=seed), RidgeClassifier(1.0))


def gradient_descent(seed: int) -> object:
    """Logistic regression by 5 epochs of stochastic gradient descent."""
    from sklearn.linear_model import SGDClassifier

    return SGDClassifier(loss="log_loss", max_iter=5, tol=None, random_state=seed)


def support_vectors(_: int) -> object:
    """Support vector machine with a Gaussian kernel: no seed, all of the spread is that of images."""
    from sklearn.svm import SVC

    return SVC()


def naive_bayes(_: int) -> object:
    """Gaussian naive Bayes, likewise."""
    from sklearn.naive_bayes import GaussianNB

    return GaussianNB()


NETWORKS: dict[str, Fit] = {"lenet5": network, "tuned_lenet5": tuned}
SEEDED: dict[str, Fit] = {  # two trainings of each model on a split
    "forest": classifier(forest),
    "random_features": classifier(random_features),
    "gradient_descent": classifier(gradient_descent),
}
MIRRORED: dict[str, Fit] = {"support_vectors": classifier(support_vectors), "naive_bayes": classifier(naive_bayes)}
LEARNERS = SEEDED | NETWORKS | MIRRORED


def population(learner: str, setting: Setting, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """All images that comparisons draw from, uint8, and their labels from 0."""
    if setting.two_classes and learner not in NETWORKS:
        data = datasets.load(Kaggle("samuelcortinhas/muffin-vs-chihuahua-image-classification"), folder)
        small = data.images.reshape(len(data.images), 16, 8, 16, 8, 3).mean((2, 4)).astype(np.uint8)
        return small, data.labels
    data = datasets.load(FashionMNIST(), folder)
    if not setting.two_classes:
        return data.images, data.labels
    kept = np.isin(data.labels, (T_SHIRT, SHIRT))
    return data.images[kept], (data.labels[kept] == SHIRT).astype(np.int64)


def compare(
    learner: str, setting: Setting, images: np.ndarray, labels: np.ndarray, number: int
) -> dict[str, np.ndarray]:
    """Draw images and train two models on each split: those of scikit-learn that have a seed with two each.

    Returns
    -------
    dict
        `correct` (bool, models x seeds x J x n), `index` of the scored images (int32, J x n), `n_val`, `n_train`.
    """
    rng = np.random.default_rng([number, *learner.encode()])
    drawn = rng.choice(len(images), setting.n_pool + setting.n_test, replace=False)
    pixels, own = images[drawn], labels[drawn]
    mirrored = learner in MIRRORED
    if mirrored:
        flipped = rng.random(len(pixels)) < 0.5
        pixels = np.where(flipped[:, None, None, None], pixels[:, :, ::-1], pixels)
        middle = pixels.shape[2] // 2
        views = [pixels[:, :, :middle], pixels[:, :, ::-1][:, :, :middle]]  # a half, and the other one mirrored
    else:
        views = [pixels, pixels]
    classes = tuple(str(label) for label in range(labels.max() + 1))
    data = [ImageData("drawn", np.ascontiguousarray(view), own, classes, setting.n_pool) for view in views]
    splits = datasets.draw_splits(setting.protocol, data[0], int(rng.integers(2**31)))
    seeds = rng.integers(2**31, size=(2, 2 if learner in SEEDED else 1, len(splits)))
    correct = [
        [
            [
                LEARNERS[learner](view, split, int(seed)) == own[np.concatenate([split.val, split.test])]
                for split, seed in zip(splits, of_one, strict=True)
            ]
            for of_one in of_model
        ]
        for view, of_model in zip(data, seeds, strict=True)
    ]
    least = min(len(split.val) for split in splits)  # folds differ by one image: the last one of the larger is left out
    kept = [np.r_[:least, len(split.val) : len(split.val) + len(split.test)] for split in splits]
    index = [np.concatenate([split.val, split.test])[of_split] for split, of_split in zip(splits, kept, strict=True)]
    return {
        "correct": np.array([[[row[k] for row, k in zip(rows, kept, strict=True)] for rows in m] for m in correct]),
        "index": np.array(index, np.int32),
        "n_val": np.array(least),
        "n_train": np.array(len(splits[0].train)),
    }


def draw(options: argparse.Namespace) -> None:
    """Draw the comparisons that the folder does not have yet."""
    setting = SETTINGS[options.task]
    images, labels = population(options.learner, setting, options.data_dir)
    folder = options.folder / f"{options.task}-{options.learner}"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(options.comparisons):
        path = folder / f"{number:04d}.npz"
        if not path.exists():
            partial = path.with_suffix(".part")
            with partial.open("wb") as file:
                np.savez_compressed(file, **compare(options.learner, setting, images, labels, number))
            partial.rename(path)
            print(path, flush=True)


def tabulate(options: argparse.Namespace) -> None:
    """Print a Markdown table of the comparisons that were drawn."""
    rows = []
    for folder in sorted(path for path in options.folder.iterdir() if path.is_dir()):
        name, _, learner = folder.name.partition("-")
        setting = SETTINGS[name]
        tallies = Tally(), Tally(), Tally()
        spread = []
        for path in sorted(folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as arrays:
                correct, index = arrays["correct"].astype(float), arrays["index"].astype(int)
                n_val, n_train = int(arrays["n_val"]), int(arrays["n_train"])
            own_test = not setting.n_test
            n_test = index.shape[1] - n_val
            protocol = Protocol(name, len(index), n_train, n_val, n_test, fixed_test=not own_test)
            differences, parts = in_full(correct[0] - correct[1], index, n_val, setting.n_pool + setting.n_test)
            one = estimate(differences[:1], parts, protocol)
            tallies[0].add(one)
            tallies[1].add(estimate(differences, parts, protocol) if len(differences) > 1 else one)
            tallies[2].add(before(differences[0], parts, protocol))
            spread.append(shares(differences[0], parts, protocol))
        one, two, earlier = (tally.cells() for tally in tallies)
        two = two if learner in SEEDED else [""] * 3
        of_spread = [f"{share:.2f}" for share in np.mean(spread, axis=0) / np.mean(spread, axis=0).sum()]
        rows.append([f"{name}, {learner.replace('_', ' ')}", str(tallies[0].n), *of_spread, *one, *two, *earlier])
    names = ("one seed", "two seeds", "before")
    header = ["learner", "comparisons", "noise", "images", "shared", "rest"]
    print(table([*header, *(f"{each}: {what}" for each in names for what in ("size", "±", "power"))], rows))


def in_full(differences: np.ndarray, index: np.ndarray, n_val: int, n_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Spread the differences of scored images, (seeds, J, n), over all images, (seeds, J, N); and the parts, (J, N)."""
    n_splits = len(index)
    rows = np.arange(n_splits)[:, None]
    full = np.zeros((len(differences), n_splits, n_images))
    full[:, rows, index] = differences
    parts = np.full((n_splits, n_images), TRAIN)
    parts[rows, index[:, :n_val]] = VAL
    parts[rows, index[:, n_val:]] = TEST
    return full, parts


def shares(differences: np.ndarray, parts: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Divide the variance of a split's difference, whose expectation is known to be 0, into four parts.

    Noise of single images, the choice of images, what two splits have in common beyond their scored images (the shared
    training images), and the rest. A single comparison says little of the third: average over many.
    """
    split, place = np.nonzero(parts != TRAIN)
    found = statistics.variance_parts(differences[split, place], statistics.arrange(split, place))
    noise, images = found.noise / found.n, found.of_images / found.n
    means = found.means
    n_splits = len(means)
    total = float(np.mean(means**2))
    covariance = (float(means.sum() ** 2) - float(np.sum(means**2))) / (n_splits * (n_splits - 1))
    overlap = found.of_images * found.squared_weights - images / n_splits
    shared = covariance - overlap * n_splits / (n_splits - 1)
    return np.array([noise, images, shared, total - noise - images - shared])


def main() -> None:
    """Draw comparisons, or print the table of those that were drawn."""
    parser = argparse.ArgumentParser(description="Tests on real learners; see the module's docstring.")
    parser.add_argument("--folder", type=Path, default=Path("nulls"), help="of the comparisons (default: %(default)s)")
    commands = parser.add_subparsers(required=True)
    drawing = commands.add_parser("draw", help="train the learners")
    drawing.add_argument("task", choices=SETTINGS)
    drawing.add_argument("learner", choices=LEARNERS)
    drawing.add_argument("--comparisons", type=int, default=200)
    drawing.add_argument("--data-dir", type=Path, default=os.environ.get("DATA_DIR"))
    drawing.set_defaults(do=draw)
    commands.add_parser("table", help="size, half-width and power as Markdown").set_defaults(do=tabulate)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()

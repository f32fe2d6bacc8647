"""A folder of your own: which model tells its classes apart best?

    python experiments/folder.py DIR

DIR holds train/<class>/ and, if you like, val/<class>/ and test/<class>/, or a folder for each class. It is a task of
its own, with its own experiment and champion, and is only read. All options of the task scripts can follow, such as
-m lenet5 --epochs 10 --jobs 2.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import DatasetError, ImageFolder, Protocol, PublishedValidation, RepeatedHoldout, StratifiedKFold
from datasets.folder import list_folder, usual_shape
from datasets.images import one_sentence
from datasets.names import readable_name
from experiments import Task, TrainingConfig, main
from tracking.commands import print_in_any_encoding, script_tasks


def parse(arguments: list[str]) -> tuple[Task, list[str]]:
    """Make the task of a command line; return it with the options that are left."""
    epilog = f"All options of the task scripts can follow: python experiments/{script_tasks()[0]}.py --help lists them."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], epilog=epilog, allow_abbrev=False)
    parser.add_argument("dir", metavar="DIR", type=Path, help="the folder; it comes first")
    parser.add_argument("--name", help="of the task; default: the folder's")
    parser.add_argument("--holdout", metavar="3:2[:t]", type=_shares, help="shares of training, validation and test")
    parser.add_argument("--folds", metavar="K", type=int, help="stratified K-fold cross-validation instead")
    parser.add_argument("--image-size", type=int, help="in pixels; default: by the pictures, at most 128")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="1 is gray, 3 is colour; default: by the pictures")
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        parser.error("name the folder first: folder.py DIR [options]")
    chosen, left = parser.parse_known_args(arguments)
    if any(each.partition("=")[0] in ("--data-dir", "--sample") for each in left):
        parser.error("the folder is named already; leave --data-dir and --sample out")
    if chosen.holdout and chosen.folds is not None:
        parser.error("--holdout and --folds exclude each other")
    if chosen.image_size is not None and not 8 <= chosen.image_size <= 1024:
        parser.error(f"--image-size: {chosen.image_size} is not from 8 to 1024")
    try:
        task = make_task(chosen.dir, chosen.name, chosen.holdout, chosen.folds, chosen.image_size, chosen.channels)
    except DatasetError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except ValueError as error:
        parser.error(str(error))
    return task, left


def make_task(
    folder: Path,
    name: str | None = None,
    holdout: tuple[int, ...] | None = None,
    folds: int | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> Task:
    """Return the task of a folder of pictures.

    Parameters
    ----------
    folder : Path
        It holds `train/<class>/*`, or a folder for each class; see `datasets.folder.list_folder`.
    name : str, optional
        Of the task; that of the folder unless given.
    holdout : tuple of int, optional
        Shares of training, validation and, with a third number, test images of each holdout.
    folds : int, optional
        Folds instead of holdouts. Without both, `val/` is the validation part or, if there is none, holdouts are drawn.
    image_size, channels : int, optional
        They follow from the pictures unless given.
    """
    folder = folder.expanduser().resolve()
    with one_sentence():
        if not folder.is_dir():
            raise DatasetError(f"{readable_name(str(folder))} is no folder; name one that holds your pictures")
        listing = list_folder(folder)
        size, colours = usual_shape(listing)
    protocol: Protocol
    if folds is not None:
        protocol = StratifiedKFold(folds)
    elif holdout or not listing.parts["val"]:
        protocol = RepeatedHoldout(5, holdout or ((3, 2) if listing.parts["test"] else (3, 1, 1)))
    else:
        protocol = PublishedValidation()
    size = image_size or size
    called = task_name(name or readable_name(folder.name))
    return Task(
        name=called,
        question=f"Which class of {called}?",
        data=ImageFolder(str(folder), size, channels or colours, listing),
        protocol=protocol,
        models=("lenet5", "vggnet", "resnetcnn"),
        training=TrainingConfig(batch_size=128, augment=size > 32),
    )


def task_name(name: str) -> str:
    """Turn a folder's name into that of a task: letters, digits, `_` and `-`, and not that of a script."""
    called = re.sub(r"[^\w-]+", "-", name).strip("-") or "folder"
    return f"folder-{called}" if called in script_tasks() else called


def _shares(text: str) -> tuple[int, ...]:
    parts = text.split(":")
    if not all(part.isdecimal() and int(part) for part in parts) or len(parts) not in (2, 3):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3:2 or 3:1:1")
    return tuple(map(int, parts))


if __name__ == "__main__":
    print_in_any_encoding()
    os.environ.pop("DATA_DIR", None)  # of the other tasks
    task, sys.argv[1:] = parse(sys.argv[1:])
    main(task)

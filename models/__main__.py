"""`python -m models`: structure and cost of each model at the inputs of the tasks."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from models import MODELS, ModelError, describe, unusable_sentences
from models.library import PREFIXES

INPUTS = {"28 px gray\n10 classes": (1, 10, 28), "128 px RGB\n2 classes": (3, 2, 128)}


def main() -> None:
    """Print a table with one row per model: parameters and multiply-accumulates for each input, and the layers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for label in INPUTS:
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("layers\n(at 128 px)")
    problems = {sentence: sentence for sentence in unusable_sentences()}
    for name in MODELS:
        costs, layers = [], ""
        for shape in INPUTS.values():
            try:
                card = describe(name, *shape)
                layers = card.layers
                costs.append(f"{card.parameters:,}\n{card.macs / 1e6:,.1f} M MACs")
            except ModelError as error:
                problems.setdefault(name, str(error))  # one sentence per model
                costs.append("–")
        table.add_row(name, *costs, layers.replace("[", r"\["))
    console = Console(highlight=False)
    console.print(table)
    for problem in problems.values():
        print(f"! {problem}", file=sys.stderr)
    console.print(
        "First line parameters, second multiply-accumulates per image. C convolution, BN BatchNorm, R ReLU, T tanh, "
        "S subsampling, FC fully connected, GAP global average pool, SE squeeze-and-excitation, MB inverted bottleneck "
        "with its expansion; /2 stride, (n) channels, xn repeats, [... +x R] residual block",
        markup=False,
    )
    console.print(f"Beside these, each image classifier of two libraries: {PREFIXES}, as in -m torchvision:resnet18.")


if __name__ == "__main__":
    main()

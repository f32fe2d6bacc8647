"""`python -m models`: what each model is and costs, at the inputs of the tasks."""

from rich.console import Console
from rich.table import Table

from models import MODELS, describe

INPUTS = {"28 px gray, 10 classes": (1, 10, 28), "128 px RGB, 2 classes": (3, 2, 128)}


def main() -> None:
    """Print a table with one row a model: parameters and multiply-accumulates by input, and the layers."""
    table = Table(title="Models", show_lines=True)
    table.add_column("model", no_wrap=True)
    for label in INPUTS:
        table.add_column(f"{label}\nparameters", justify="right")
        table.add_column("\nMACs", justify="right", no_wrap=True)
    table.add_column("layers (at 128 px)", overflow="fold")
    for name in MODELS:
        cards = [describe(name, *shape) for shape in INPUTS.values()]
        costs = [text for card in cards for text in (f"{card.parameters:,}", f"{card.macs / 1e6:.1f} M")]
        table.add_row(name, *costs, cards[-1].layers)
    console = Console()
    console.print(table)
    console.print(
        "C convolution, BN BatchNorm, R ReLU, T tanh, S subsampling, FC fully connected, GAP global average pool, "
        "SE squeeze-and-excitation, MB inverted bottleneck with its expansion; /2 stride, (n) channels, xn repeats"
    )


if __name__ == "__main__":
    main()

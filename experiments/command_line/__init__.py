"""The command line of the task scripts: options become a `Request`, errors become sentences."""

from experiments.command_line.script import main

__all__ = ["main"]

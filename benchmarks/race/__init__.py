"""The race: this suite against the loops people write, on the same work. `python -m benchmarks.race` runs it."""

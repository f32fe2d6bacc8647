"""Tuning: N configurations of each model on each split, of which the validation part chooses one.

`space` says which settings are tuned and draws the configurations; `halving` stops the worse ones early. The trials are
jobs like the splits (experiments/jobs), and `run/execute.py` does them rung by rung.
"""

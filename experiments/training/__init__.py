"""Training and evaluation: images on the device, `fit`, `evaluate`, the baselines, and the hardware they run on.

A batch enters at images (`Part.batches`) and meets the optimizer in fit; an evaluation comes back as scores. Nothing in
this room knows of runs or of the result database.
"""

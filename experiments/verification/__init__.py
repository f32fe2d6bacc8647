"""Verification: every stored number of a task's finished runs is derived again, from files, data and models."""

from experiments.verification.verify import Report, verify

__all__ = ["Report", "verify"]

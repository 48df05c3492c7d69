"""Checkpoints of a training, evaluated beside it as they appear."""

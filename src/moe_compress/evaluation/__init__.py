"""Harnesses: what a checkpoint can still do, how fast it is and how large, beside its original."""

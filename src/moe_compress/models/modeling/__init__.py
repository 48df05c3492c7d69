"""Modelling files, shipped word for word inside edited checkpoints: torch and transformers alone."""

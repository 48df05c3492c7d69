"""Recipes: a model, stages, text and a seed, from a sentence, YAML or Python."""

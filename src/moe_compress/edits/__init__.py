"""Edits: everything a method changes about the structure, as values that can be replayed."""

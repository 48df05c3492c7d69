"""Checkpoints on disk: opened lazily, written layer by layer, loaded whole and checked."""

"""Stages that change weights and leave the structure."""

"""Measuring: perplexity and closeness to the original, sizes and FLOPs, statistics."""

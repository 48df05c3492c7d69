"""Whether stock transformers loads a checkpoint and computes the same, and which programs can."""

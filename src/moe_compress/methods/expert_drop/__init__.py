"""Expert Trimming: methods that remove whole experts."""

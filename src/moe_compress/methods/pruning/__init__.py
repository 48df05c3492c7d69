"""Expert Slimming: methods that make the weights cheaper and leave the structure as it is."""

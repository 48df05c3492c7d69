"""Quantization: rounding to the nearest, GPTQ and AWQ; bits shared out; activations."""

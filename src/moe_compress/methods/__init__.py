"""The methods, one file each: pure functions of tensors, entered in registry.py by what their signatures say."""

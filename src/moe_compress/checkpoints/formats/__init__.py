"""Storage formats of weights: how a file holds them, and what config.json says of it."""

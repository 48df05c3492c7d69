"""What the tests share: tiny models, edited checkpoints, naive references."""

"""Accuracy on tasks of lm_eval, paired with the original's answers."""

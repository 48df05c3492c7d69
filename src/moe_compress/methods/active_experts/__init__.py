"""Fewer active experts: top-k, or weak experts of a token skipped."""

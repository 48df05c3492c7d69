"""Factorisation: the experts of a layer as few numbers: low ranks, shared cores and bases, sparse residues."""

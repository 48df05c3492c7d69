"""Models with their storage hidden: transformers' seams, families, MoE views, edits."""

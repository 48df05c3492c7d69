"""Quality: perplexity and agreement with the original, document by document."""

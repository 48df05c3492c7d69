"""Text: documents, prompts, and windows of tokens cut out of them."""

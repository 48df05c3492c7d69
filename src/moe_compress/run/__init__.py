"""What the parts of one run share: options, arithmetic, texts, log, progress."""

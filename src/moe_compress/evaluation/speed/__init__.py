"""Speed and memory beside the original, each in a process of its own."""

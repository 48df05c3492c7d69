"""The hub: model cards, and what an upload sends."""

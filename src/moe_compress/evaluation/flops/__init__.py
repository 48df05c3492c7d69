"""FLOPs and sizes by component, from the config alone, and torch's counter beside them."""

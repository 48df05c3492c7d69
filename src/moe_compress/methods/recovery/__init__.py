"""Methods that recover what compression lost, and their arithmetic."""

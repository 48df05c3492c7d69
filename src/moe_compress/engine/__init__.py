"""The engine: layers one at a time, run forward and backward while observers watch."""

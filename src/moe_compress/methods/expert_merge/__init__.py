"""Expert merge: similar experts, found, aligned and averaged."""

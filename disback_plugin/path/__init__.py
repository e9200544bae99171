"""A degradation path on disk."""

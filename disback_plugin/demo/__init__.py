"""Demonstrate DisBack: distil one-step generators of handwritten digits, with and without a degradation path."""

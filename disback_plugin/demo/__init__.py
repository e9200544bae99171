"""The demonstration: a one-step generator of handwritten digits, distilled with and without a degradation path."""

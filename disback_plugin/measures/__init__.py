"""What the metrics are made of."""

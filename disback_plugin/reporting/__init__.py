"""What there is to see of a run: curves, pictures, a page."""

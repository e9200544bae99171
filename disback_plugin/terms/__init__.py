"""What the losses are made of: formulas, and what stands around them."""

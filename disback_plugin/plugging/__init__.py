"""What others plug in, and what is plugged in for them."""

"""LCM-LoRA: a trainer of our own."""

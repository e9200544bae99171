"""The training loop's optimizers, learning-rate schedulers and roles."""

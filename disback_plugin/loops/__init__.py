"""A live training loop: its optimizers, roles and trainer."""

"""Algorithm 1, its parts: what a recording needs, and when it ends."""

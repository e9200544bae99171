"""Algorithm 2, its parts: the plan, and the teacher that walks it."""

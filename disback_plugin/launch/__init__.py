"""`disback run`: attach DisBack to a trainer's script without editing it."""

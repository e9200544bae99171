"""The commands of `disback`, one module each: `add(commands)` adds a parser whose default `run` does the work."""

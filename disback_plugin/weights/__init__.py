"""The weights of one role: named, read, written in place, sharded or LoRA."""

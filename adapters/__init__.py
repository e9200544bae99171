"""Adapters of public score-distillation trainers, one file a trainer; found through the group `disback.adapters`."""

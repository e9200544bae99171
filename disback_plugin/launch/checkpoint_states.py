"""Keep the handle's state for each checkpoint of the trainer, in a file beside the path: "PATH.states.jsonl".

A state is found again by the checksum of the fake score, which has the same weights when the checkpoint is loaded.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from disback_plugin import distributed
from disback_plugin.handle import Handle
from disback_plugin.path import files
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["CheckpointStates"]

logger = logging.getLogger(__name__)


class CheckpointStates:
    """Append states to a file, one JSON object a line, and find them again.

    Args:
        path: Folder of the degradation path.

    Example:
        >>> CheckpointStates(Path("runs/path")).file.as_posix()
        'runs/path.states.jsonl'
    """

    def __init__(self, path: Path) -> None:
        self.file = path.with_name(f"{path.name}.states.jsonl")

    def append(self, handle: Handle) -> None:
        """Save the state of a handle, on rank 0."""
        if not distributed.is_main_process():
            return
        state = handle.state_dict()
        earlier = self.file.read_text() if self.file.exists() else ""
        files.write_text(self.file, f"{earlier}{json.dumps(state)}\n")
        logger.info("saved the state at %d generator updates with the trainer's checkpoint", handle.generator_updates)

    def find(self, fake_score: ScoreNetwork) -> dict[str, Any] | None:
        """Return the last state that was saved when the fake score had its present weights, or None."""
        if not self.file.exists():
            return None
        states = [json.loads(line) for line in self.file.read_text().splitlines()]
        checksum = fake_score.checksum()
        return next((state for state in reversed(states) if state["fake_score"] == checksum), None)

"""The states that `disback run` keeps beside the trainer's checkpoints, and the one that a resumed run continues.

"PATH.states.jsonl" has one line for each checkpoint: `Handle.state_dict()`, which identifies the weights of s_phi, and
under "generator" what identifies the generator's. A run that loads a checkpoint has the weights of that moment, by
which its state is found: two checkpoints between which only one of the networks was trained are told apart.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from disback_plugin import distributed
from disback_plugin.path import files
from disback_plugin.path.manifest import CONFIG, Manifest
from disback_plugin.weights.marks import checksums_in
from disback_plugin.weights.network import ScoreNetwork

logger = logging.getLogger(__name__)


class SavedStates:
    """The states of one path, in a file beside it.

    Args:
        path: Folder of the path.

    Example:
        >>> SavedStates(Path("runs/path")).file.name
        'path.states.jsonl'
    """

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.with_name(f"{path.name}.states.jsonl")

    def append(self, state: dict[str, Any]) -> None:
        """Add a state. Only rank 0 calls."""
        earlier = self.file.read_text() if self.file.exists() else ""
        files.write_text(self.file, f"{earlier}{json.dumps(state)}\n")

    def find(self, fake_score: ScoreNetwork, generator: ScoreNetwork | None) -> tuple[dict[str, Any] | None, bool]:
        """Return the last state that was saved when the networks had their present weights. Collective.

        Returns:
            The state, or None; and whether the trainer has restored the fake score. If it has restored the generator
            alone, the state is changed to hold for the present fake score.
        """
        lines = distributed.on_main_process(lambda: self.file.read_text().splitlines() if self.file.exists() else [])
        states = [json.loads(line) for line in reversed(lines)]
        by_fake_score = _matching(fake_score, "fake_score", states)
        if by_fake_score:
            return (_matching(generator, "generator", by_fake_score) or by_fake_score)[0], True
        known = distributed.on_main_process(
            lambda: Manifest.read(self.path) if (self.path / CONFIG).is_file() else None
        )
        # While recording, the generator is the initial one, as in any new run; s_phi goes on from the last node.
        moved = [s for s in states if known is not None and s["path"] == known.identity and s["phase"] != "recording"]
        for state in _matching(generator, "generator", moved)[:1]:
            # A first update at a learning rate of 0 changes nothing.
            if generator is not None and known is not None and generator.fingerprint() != known.generator:
                return state | {"fake_score": distributed.on_main_process(fake_score.local_checksum)}, False
        return None, True


def _matching(network: ScoreNetwork | None, key: str, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the states whose text under `key` identifies the network's present weights. Collective."""
    present: dict[str, str] = {}  # by the part that a text is about, as each takes a pass over the weights
    found = []
    if network is None:
        return []
    for state in states:
        part = (text := state.get(key, "")).partition(" of ")[2]
        if text and part not in present:
            present[part] = network.checksum_like(text)
        if text and present[part] in checksums_in(text):
            found.append(state)
    return found

"""What is said once, at the start of a run, because it goes wrong silently."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch.optim import Optimizer

from disback_plugin.errors import PathError
from disback_plugin.plugging.history import read
from disback_plugin.plugging.masking import on_main_process
from disback_plugin.plugging.runlog import RunLog
from disback_plugin.schedules import Schedule, Settling
from disback_plugin.trajectory import DegradationPath
from disback_plugin.weights import ScoreNetwork

__all__ = ["of_an_earlier_walk", "of_another_rate", "of_other_weights"]

logger = logging.getLogger(__name__)


def of_other_weights(fake_score: ScoreNetwork, path: DegradationPath) -> None:
    """Say so if s_phi holds what nobody begins with: perhaps the run goes on with one whose state is missing. All ranks
    must call.
    """
    if fake_score.adapter is not None:  # a LoRA begins at random, without effect
        return
    known = {path.manifest.teacher.checksum}.union(*({node.checksum, node.recorded} for node in path.nodes))
    if fake_score.checksum() not in known and on_main_process():
        logger.warning(
            "the fake score holds other weights than the teacher, and begins at node %d of the path. If this goes on "
            "with an earlier run, pass that run's handle.state_dict(): attach(..., state=state)",
            len(path) - 1,
        )


def of_an_earlier_walk(log: RunLog | None, path: DegradationPath) -> None:
    """Say so if the log knows a walk on this very path: it may be the one that the trainer goes on with."""
    if log is None or not log.file.is_file():
        return
    try:
        history = read(log.file)
    except PathError:  # nothing of ours
        return
    if history.updates and history.begun and history.begun[-1].get("path") == path.identity:
        logger.warning(
            "%s knows a walk on this path that came to generator update %d, and here one begins. If the trainer goes "
            "on with that run, load its state: handle.load_state_dict(state)",
            log.file,
            history.updates,
        )


def of_another_rate(path: DegradationPath, schedule: Schedule, optimizers: Sequence[Optimizer]) -> None:
    """Say so if the walk takes its length from a recording at another learning rate than that of these optimizers."""
    recorded = path.manifest.learning_rate
    if recorded is None or not isinstance(schedule, Settling):
        return
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups if group.get("lr") is not None]
    if rates and not min(rates) / 2 <= recorded <= 2 * max(rates):
        logger.warning(
            "%s was recorded at a learning rate of %g, and the fake score has %g: as long as the recording says, the "
            "walk will be too %s. Record at its own rate, or give the schedule its length: Auto(F)",
            path.folder,
            recorded,
            max(rates),
            "long" if recorded < max(rates) else "short",
        )

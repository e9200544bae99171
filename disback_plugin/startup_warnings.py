"""What is said once, at the start of a run, because it goes wrong silently."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from disback_plugin import distributed
from disback_plugin.errors import PathError
from disback_plugin.loop import optimizers
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.log_reader import read
from disback_plugin.plugins.run_log import RunLog
from disback_plugin.schedules import Schedule
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import local_tensor

__all__ = ["of_an_earlier_walk", "of_another_rate", "of_other_weights"]

logger = logging.getLogger(__name__)


def of_other_weights(teacher: ScoreNetwork, fake_score: ScoreNetwork, path: DegradationPath) -> None:
    """Say so if s_phi holds what nobody begins with: perhaps the run goes on with one whose state is missing. All ranks
    must call.
    """
    if fake_score.lora_adapter is not None:  # a LoRA begins at random, without effect
        return
    known = {checksum for node in path.nodes for checksum in (node.checksum, node.recorded)}
    recorded = bool(known) and fake_score.checksum() in known
    if not recorded and not _alike(teacher, fake_score) and distributed.is_main_process():
        logger.warning(
            "the fake score holds other weights than the teacher, and begins at node %d of the path. If this goes on "
            "with an earlier run, pass that run's handle.state_dict(): attach(..., state=state)",
            len(path) - 1,
        )


def _alike(teacher: ScoreNetwork, fake_score: ScoreNetwork) -> bool:
    """Whether all parameters are equal, at the fake score's precision; of a sharded network what this process holds."""
    originals = dict(teacher.named_tensors())
    for name, tensor in fake_score.named_tensors():
        if isinstance(tensor, nn.Parameter):  # not running statistics, which a forward changes
            mine, theirs = local_tensor(tensor), local_tensor(originals[name])
            if mine.shape == theirs.shape and not torch.equal(mine, theirs.to(mine)):
                return False
    return True


def of_an_earlier_walk(log: RunLog | None, path: DegradationPath) -> str:
    """Return what to say if the log knows a walk on this very path, and no state is loaded; empty if it does not."""
    if log is None or not log.file.is_file():
        return ""
    try:
        history = read(log.file)
    except PathError:  # nothing of ours
        return ""
    if not history.updates or not history.begun or history.begun[-1].get("path") != path.identity:
        return ""
    return (
        f"{log.file} knows a walk on this path that came to generator update {history.updates} at least, and here one "
        "begins. If the trainer goes on with that run, load its state: handle.load_state_dict(state)"
    )


def of_another_rate(
    path: DegradationPath, schedule: Schedule, fake_score: ScoreNetwork, steppers: Sequence[Optimizer]
) -> None:
    """Say so if the walk takes its length from a recording at another learning rate than that of s_phi's optimizers."""
    recorded = path.manifest.learning_rate
    if recorded is None or not schedule.until_fitted:
        return
    own = [tensor for _, tensor in fake_score.named_tensors()]
    rates = [
        float(group.get("max_lr") or group.get("initial_lr") or group.get("lr") or 0.0)
        for optimizer in steppers
        if "adam" in type(optimizer).__name__.lower()  # as the recording's was; of others a rate means something else
        for group in optimizers.groups_of(optimizer, own)
    ]
    if any(rates) and not min(filter(None, rates)) / 2 <= recorded <= 2 * max(rates):
        logger.warning(
            "%s was recorded at a learning rate of %g, and the fake score has %g: as long as the recording says, the "
            "walk will be too %s. Record at its own rate, or give the schedule its length: Auto(F)",
            path.folder,
            recorded,
            max(rates),
            "long" if recorded < max(rates) else "short",
        )

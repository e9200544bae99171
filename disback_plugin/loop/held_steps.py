"""A step that holds its weights still: what it would use up beside them, and a step that must not be held.

Gradients are hidden from such a step (`optimizers.hide_gradients`). Many optimizers count all the same, in their groups
(schedule-free's k and lr_max, Prodigy's d and k), in their state or in an attribute; some decay weights that have no
gradient.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from traceback import walk_stack
from types import FrameType
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from disback_plugin.loop.optimizers import hide_gradients, parameters, set_in_group

logger = logging.getLogger(__name__)

# Optimizers of which a warning has said that their state cannot be restored.
_NAMED: WeakSet[Optimizer] = WeakSet()


def is_initialization(optimizer: Optimizer) -> bool:
    """Return whether the step that begins only initialises the state of an optimizer, and changes no weight.

    `torch.distributed.checkpoint.state_dict` takes such a step, with learning rates of 0 and gradients of 0, when it
    reads or loads the state of an optimizer that has none (`_init_optim_state`). It is neither held still nor counted.
    Rates and gradients of 0 alone say nothing: a warm-up from 0 begins so where s_phi is still the teacher. Nothing is
    read from a device.

    Example:
        >>> from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
        >>> net = torch.nn.Linear(1, 1)
        >>> adam = torch.optim.Adam(net.parameters(), lr=0.1)
        >>> _ = adam.register_step_pre_hook(lambda *_: print(is_initialization(adam)))
        >>> adam.step()
        False
        >>> _ = get_optimizer_state_dict(net, adam)
        True
    """
    rates = (group.get("lr") for group in optimizer.param_groups)
    if optimizer.state or any(rate for rate in rates if not isinstance(rate, Tensor)):
        return False
    return any(True for _ in _checkpoint_frames())


def initialize_for_checkpoint(optimizer: Optimizer) -> None:
    """Let torch initialise the state of an optimizer if torch's distributed checkpoint is about to read an empty one.

    Torch does so itself unless there are gradients, by which it concludes that steps were taken; here they were held.
    Without a state the checkpoint could not be loaded, because loading initialises the optimizer.
    """
    for frame in () if optimizer.state else _checkpoint_frames():
        show = hide_gradients(parameters([optimizer]))
        frame.f_globals["_init_optim_state"](optimizer)
        show()
        return


def _checkpoint_frames() -> Iterator[FrameType]:
    """Yield the callers that are functions of torch's distributed checkpoint."""
    for frame, _ in walk_stack(sys._getframe()):
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            yield frame


def keep_settings(optimizer: Optimizer, weights: Iterable[Tensor]) -> Callable[[], None]:
    """Set the learning rates of weights to 0 for one step that has no gradients of them.

    Args:
        optimizer: The optimizer that is about to step.
        weights: The weights that the step holds still. Groups with other weights are left alone.

    Returns:
        A function that restores, after the step, the learning rates and what the step has counted: plain numbers and
        tensors of one element in the groups and in the state of the weights, new entries, and numbers that are
        attributes of the optimizer. It warns once if the step changed a larger tensor of the state, as a momentum.

    Example:
        >>> weight = torch.ones(1)
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> restore = keep_settings(sgd, [weight])
        >>> group = sgd.param_groups[0]
        >>> group["lr"], group["k"] = group["lr"] + 0.0, 1  # an optimizer that counts in its groups
        >>> restore()
        >>> group["lr"], "k" in group
        (0.1, False)
    """
    own = set(map(id, weights))
    groups = [group for group in optimizer.param_groups if own.issuperset(map(id, group["params"]))]
    held = set(map(id, groups))
    whole = len(groups) == len(optimizer.param_groups)
    state = {key: entry for key, entry in optimizer.state.items() if whole or id(key) in own}
    entries = [*groups, *(entry for entry in state.values() if isinstance(entry, dict))]
    saved = [(entry, dict(entry)) for entry in entries]
    tensors = [value for _, values in saved for value in values.values() if isinstance(value, Tensor)]
    versions = [(each, each._version, each.detach().clone() if each.numel() == 1 else None) for each in tensors]
    counters = {name: value for name, value in vars(optimizer).items() if whole and type(value) in (int, float)}
    for group in groups:
        rate = group.get("lr")
        others = (each.get("lr") for each in optimizer.param_groups if id(each) not in held)
        if isinstance(rate, Tensor) and any(rate is other for other in others):
            group["lr"] = rate * 0  # other weights read the same tensor
        elif rate is not None:
            set_in_group(group, "lr", rate * 0)

    @torch.no_grad()
    def restore() -> None:
        for key in [key for key in optimizer.state if key not in state and (whole or id(key) in own)]:
            del optimizer.state[key]
        optimizer.state.update(state)
        for entry, values in saved:
            for name in entry.keys() - values.keys():
                del entry[name]
            entry.update(values)
        vars(optimizer).update(counters)
        for tensor, version, number in versions:
            if tensor._version != version and number is not None:
                tensor.copy_(number)
            elif tensor._version != version and optimizer not in _NAMED:
                _NAMED.add(optimizer)
                logger.warning(
                    "%s changes its state in a step without gradients: what the recording changes in it is not "
                    "restored, unless the optimizer takes its first step after attach()",
                    type(optimizer).__name__,
                )

    return restore

"""Notice what goes wrong without an error: updates that no hook sees, rewritten weights, a teacher that nobody runs.

None of it costs a device sync in a loop that runs: version counters are compared on the host, and weights are compared
only in the first updates after DisBack has written them.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from disback_plugin.errors import StateError
from disback_plugin.loop.optimizer_hooks import UpdateCounter
from disback_plugin.loop.optimizers import parameters
from disback_plugin.weights.marks import WeightSample
from disback_plugin.weights.modules import freezes, is_compiled
from disback_plugin.weights.network import ScoreNetwork

logger = logging.getLogger(__name__)

# Backwards in a row before which weights changed although no optimizer that is hooked stepped them.
UNSEEN = 3
# Updates of s_phi after a write in which its weights are compared.
COMPARED = 3
# Generator updates in which the teacher should have run.
TEACHER_UPDATES = 3


class UnseenUpdates:
    """Notices weights that change from backward to backward although no hooked optimizer steps them.

    Optimizers that are none of torch's, an update by another method than `step()`, and copies of the weights that are
    trained in their place have no hooks. A backward that reaches one of the weights compares its version counter.

    Args:
        counter: The counter of the network's updates.
        report: Called once, at the end of a backward, with the counter.
    """

    def __init__(self, counter: UpdateCounter, report: Callable[[UpdateCounter], None]) -> None:
        self._counter, self._report = counter, report
        self._changes, self._version, self._steps = 0, -1, counter.total
        self._values: Tensor | None = None
        self._hook: RemovableHandle | None = None
        for weight in (p for optimizer in counter.optimizers for p in counter.weights(optimizer)):
            if weight.requires_grad and weight.is_leaf and weight.numel() and not hasattr(weight, "to_local"):
                self._version = weight._version
                self._hook = weight.register_post_accumulate_grad_hook(self._after_backward)  # type: ignore[no-untyped-call]
                break

    def remove(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()

    def _after_backward(self, weight: Tensor) -> None:
        if weight._version == self._version:
            return
        self._changes = self._changes + 1 if self._counter.total == self._steps else 0
        before, self._values = self._values, None
        if self._changes >= UNSEEN - 1:
            self._values = weight.detach().reshape(-1)[:1024].clone()
        self._version, self._steps = weight._version, self._counter.total
        if self._changes == UNSEEN:
            self.remove()
            # A forward that normalises its own weights (EDM2) writes the same values again: that is no update.
            close = 2 * torch.finfo(weight.dtype).eps
            if before is not None and self._values is not None and torch.allclose(before, self._values, close, 0.0):
                return
            # The teacher must not be written while a backward may still read it.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._report, self._counter))


class ForwardWatch:
    """Notices in the first generator updates whether a network runs with its own weights, and as more than a score.

    Args:
        network: The teacher.
    """

    def __init__(self, network: ScoreNetwork) -> None:
        # functional_call runs a module with other tensors; FSDP swaps them, too.
        self._own = None if network.sharded else {id(tensor) for _, tensor in network.named_tensors()}
        roots = network.modules().values()
        modules = [] if any(map(is_compiled, roots)) else network.weight_modules()  # a graph runs without hooks
        if freezes() and any(map(_runs_compiled, roots)):
            logger.warning("a compiled teacher has its weights as constants (freezing), and cannot be moved")
        self._hooks = [module.register_forward_pre_hook(self._remember) for module in modules]
        self.seen, self._updates = not self._hooks, 0
        # Of the present update, whether gradients reached the inputs of its forwards, and the updates with both kinds.
        self._differentiated, self._both = set[bool](), 0
        # The fake score's own network may be the base of the teacher's adapter.
        alone = modules and network.lora_adapter is None
        self._roots = [root.register_forward_pre_hook(self._inspect, with_kwargs=True) for root in roots if alone]

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in (*self._hooks, *self._roots):
            hook.remove()
        self._hooks.clear()

    def check(self, position: float) -> bool:
        """Return whether the answers are known, after a generator update; warn if the teacher has not run, or also so
        that gradients reach its inputs.
        """
        self._updates += 1
        self._both += len(self._differentiated) == 2
        self._differentiated.clear()
        if self._updates < TEACHER_UPDATES:
            return False
        self.remove()
        # A region that was compiled before runs without these hooks.
        dynamo = sys.modules.get("torch._dynamo.utils")
        if not self.seen and not (dynamo and dynamo.counters["stats"]["unique_graphs"]):
            logger.warning(
                "the teacher was moved to position %g, and no forward of it was seen in %d generator updates: the loop "
                "seems to evaluate another copy (a cast or stacked one, an exported graph), which DisBack cannot move. "
                "Pass the very module that the loop runs as the teacher",
                *(position, self._updates),
            )
        if self._both == TEACHER_UPDATES:
            logger.warning(
                "in each generator update the teacher runs both with and without gradients to its inputs: beside the "
                "score it seems to give features to a discriminator or another loss, and these are the active node's "
                "during backtracking. disback_plugin.plugins.OriginalFeatures keeps those of the original teacher"
            )
        return True

    def _remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():  # in a graph: nothing of this may be traced
            return
        if self._own is None or any(id(tensor) in self._own for tensor in module._parameters.values()):
            self.seen = True
            for hook in self._hooks:
                hook.remove()

    def _inspect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A forward that somebody has replaced, as OriginalFeatures does, may not be the teacher's.
        if torch.compiler.is_compiling() or "forward" in vars(module):
            return
        given = [t for value in (*args, *kwargs.values()) for t in (value if isinstance(value, list) else [value])]
        reached = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)
        self._differentiated.add(reached)


class WrittenWeights:
    """Compares s_phi with what DisBack wrote into it, in the first updates after a write.

    Args:
        network: s_phi.
        optimizers: Its optimizers. Copies of the weights that they keep, in another precision, are written too.

    Attributes:
        left: Updates in which the weights are still compared.
    """

    def __init__(self, network: ScoreNetwork, optimizers: list[Optimizer]) -> None:
        self._network, self._optimizers = network, optimizers
        self.left = self._undone = 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Surround a write of s_phi."""
        self._sample = WeightSample.of(self._network)
        earlier = self._sample.weights()
        copies = [*master_copies(self._network, self._optimizers)]
        yield
        written = self._sample.weights()
        if torch.equal(earlier, written):
            return
        with torch.no_grad():
            for copy, weight in copies:
                copy.copy_(weight)
        self._earlier, self._written, self._last, self.left = earlier, written, written, COMPARED
        self._undone = 0

    def before_update(self) -> None:
        """Compare the weights before a step of s_phi's optimizers."""
        if not self.left:
            return
        if not torch.equal(self._sample.weights(), self._last):
            logger.warning(
                "the fake score was changed between two steps of its optimizer, after DisBack had written it: by a "
                "checkpoint that was loaded, by a moving average as in IDA, or by its own forward, as a normalisation "
                "in training mode, which is harmless. What is recorded, or the start of backtracking, contains it. If "
                "a run goes on, load its state: handle.load_state_dict(state)"
            )
            self.left = 0

    def after_update(self) -> None:
        """Compare the weights after a step.

        Raises:
            StateError: If two steps in a row have left what was there before the write.
        """
        if not self.left:
            return
        self.left -= 1
        self._last = now = self._sample.weights()
        # A step may by itself undo a write that undid one step, but the next one then goes further.
        self._undone = (
            self._undone + 1 if (now - self._earlier).norm() < 0.1 * (self._written - self._earlier).norm() else 0
        )
        if self._undone == 2:
            raise StateError(
                "a fake score that its optimizer has put back to the weights from before DisBack wrote it",
                expected="an optimizer that steps the live weights; this one keeps copies, which were not found",
                cure="attach before the optimizer's first step, or let it make its master copies anew",
            )


def _runs_compiled(root: nn.Module) -> bool:
    """Return whether a network, or a part of it, is compiled, or a compiled wrapper holds it; searches all objects."""
    holders = (holder for holder in gc.get_referrers(root) if isinstance(holder, dict))
    return is_compiled(root) or any(holder.get("_orig_mod") is root for holder in holders)


# -- copies of the weights that an optimizer keeps --------------------------------------------------------------------


def master_copies(network: ScoreNetwork, optimizers: Iterable[Optimizer]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the copies that optimizers keep of a network's weights, each with its weight.

    A copy is a tensor in the optimizer's state or attributes that equals its weight at the weight's precision. All
    tensors of one place, as one key of the state or one list, have to: a zero moment is no copy of a zero weight.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> adam.masters = [p.detach().double() for p in net.parameters()]
        >>> [weight is own for (_, weight), own in zip(master_copies(ScoreNetwork(net), [adam]), net.parameters())]
        [True, True]
    """
    own = {id(tensor) for _, tensor in network.named_tensors()}
    for optimizer in optimizers:
        weights = [p for p in parameters([optimizer]) if id(p) in own]
        places: list[list[tuple[Tensor, Tensor]]] = []
        kept = [optimizer.state.get(p, {}) for p in weights]
        for key in {key for state in kept for key in state}:
            places.append([(s[key], p) for s, p in zip(kept, weights, strict=True) if torch.is_tensor(s.get(key))])
        everything = parameters([optimizer])
        for tensors in _lists_of_tensors(optimizer):
            if len(tensors) == len(everything):
                places.append([(t, p) for t, p in zip(tensors, everything, strict=True) if id(p) in own])
            elif len(tensors) == len(weights):
                places.append([*zip(tensors, weights, strict=True)])
        for pairs in places:
            if len(pairs) == len(weights) and all(_is_copy(*pair) for pair in pairs) and any(p.any() for _, p in pairs):
                yield from pairs


def _lists_of_tensors(optimizer: Optimizer) -> Iterator[list[Tensor]]:
    """Yield the tensors of each list, dictionary and inner optimizer among an optimizer's attributes."""
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults"):
            continue
        if name == "param_groups_master" or (isinstance(value, list) and value and isinstance(value[0], dict)):
            value = [p for group in value for p in group.get("params", ())]
        items = parameters([value]) if isinstance(value, Optimizer) else value
        items = list(items.values()) if isinstance(items, dict) else items
        if isinstance(items, (list, tuple)) and items and all(map(torch.is_tensor, items)):
            yield [*items]


def _is_copy(copy: Tensor, weight: Tensor) -> bool:
    return copy is not weight and copy.shape == weight.shape and torch.equal(copy.detach().to(weight), weight.detach())

"""Hooks on a loop's optimizers, through which DisBack takes part in a loop that nobody edits.

generator's weights    pre-hook    hide their gradients, so that the step changes nothing, or scale them
                       post-hook   count the update; no autograd graph is pending here
fake score's weights   pre-hook    scale the learning rate for this step, while recording
                       post-hook   restore the learning rate and count the update

An *update* is a step that changed weights. A backward without a step (gradient accumulation), a step without gradients
and a step that a GradScaler skipped are none. Weights decide, not optimizers: one optimizer may step both networks, and
an optimizer that is made later for the same weights is hooked before its first step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, MutableMapping, Set
from contextlib import ExitStack
from traceback import walk_stack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from disback_plugin.errors import RoleError, TrainingError
from disback_plugin.loop.optimizers import (
    Args,
    Kwargs,
    call_with_gradients,
    has_gradients,
    hide_gradients,
    initialize_for_checkpoint,
    is_initialization,
    keep_settings,
    parameters,
    scale_gradients,
    scale_learning_rates,
    skipped_by_scaler,
)
from disback_plugin.weights.network import ScoreNetwork

if TYPE_CHECKING:
    from disback_plugin.session import Session

logger = logging.getLogger(__name__)

# The session of each optimizer and teacher that has one: two on one loop would both move the teacher.
IN_USE: MutableMapping[Any, Session] = WeakIdKeyDictionary()


class OptimizerHooks:
    """Hooks on all optimizers of a loop.

    Args:
        generator: Optimizers of the generator. Those that step its weights later are added to this list.
        fake_score: Optimizers of s_phi, likewise. An optimizer may be in both lists: what it steps beside s_phi is then
            the generator's.
        network: s_phi. Groups of other weights keep their own learning rate.
        session: What the hooks ask and notify.
        teacher: The teacher, if it will be moved: no other handle may move it.

    Raises:
        RoleError: If one of the optimizers, or the teacher, belongs to another handle.
    """

    def __init__(
        self,
        generator: list[Optimizer],
        fake_score: list[Optimizer],
        network: ScoreNetwork,
        session: Session,
        teacher: ScoreNetwork | None = None,
    ) -> None:
        fakes = {id(tensor) for _, tensor in network.named_tensors()}
        self._session = session
        after_step = session.after_generator_step
        self.generator = UpdateCounter("generator", generator, lambda updated, idle: after_step(updated), but=fakes)
        self.fake_score = UpdateCounter("fake_score", fake_score, session.after_fake_score_step, only=fakes)
        self._roles = self.fake_score, self.generator
        self._hidden: dict[Optimizer, Callable[[], None]] = {}  # gives hidden gradients back after one step
        self._changed: dict[Optimizer, ExitStack] = {}  # restores learning rates and settings after one step
        self._held: WeakSet[Optimizer] = WeakSet()  # which have been held still
        self._initializing: set[Optimizer] = set()  # whose present step only initialises their state
        self._running: set[Optimizer] = set()
        self._known: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # number of groups that were looked at
        self._hooks: dict[Optimizer | None, list[RemovableHandle]] = {}
        claims: list[tuple[str, Any]] = [("generator_optimizer", each) for each in generator]
        claims += [("fake_score_optimizer", each) for each in fake_score]
        claims += [] if teacher is None else [("teacher", teacher.first_parameter())]
        self._claimed = [ref(each) for _, each in claims]
        for role, other in ((role, IN_USE[each]) for role, each in claims if each in IN_USE):
            raise RoleError(
                f"a {role} that a handle is attached to already (path={other.path and str(other.path.folder)!r})",
                expected="one handle a loop, and a teacher for each",
                cure="call detach() of the other handle first, or leave its with block (Handle.attached() returns the "
                "handles that were not kept); give a second student a copy.deepcopy of the teacher",
            )

    @property
    def installed(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._hooks)

    def install(self) -> None:
        """Install the hooks."""
        self._hooks[None] = [register_optimizer_step_pre_hook(self._before_any_step)]
        for optimizer in dict.fromkeys(self.generator.optimizers + self.fake_score.optimizers):
            self._hook(optimizer)
        for claim in self._claimed:
            if (claimed := claim()) is not None:
                IN_USE[claimed] = self._session

    def remove(self) -> None:
        """Remove the hooks; gradients and learning rates are the trainer's again, even after a step that raised."""
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()
        for optimizer in {*self._hidden, *self._changed}:
            self._undo_changes(optimizer)
        for claim in self._claimed:
            if (claimed := claim()) is not None:
                IN_USE.pop(claimed, None)

    def _hook(self, optimizer: Optimizer) -> None:
        self._hooks[optimizer] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            # A trainer may save a checkpoint because a step raised.
            optimizer.register_state_dict_pre_hook(self._before_state_dict),
        ]

    def _before_any_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        """Hook an optimizer that is new and steps weights of a role; it replaces those whose weights it steps, too."""
        groups = len(optimizer.param_groups)
        # An optimizer inside another one that is stepping now is the other one's own business.
        if optimizer in self._hooks or self._known.get(optimizer) == groups or (self._running and _is_nested()):
            return
        self._known[optimizer] = groups
        roles = [role for role in self._roles if role.steps(optimizer)]
        if not roles:
            return
        kind = type(optimizer).__name__
        if torch._C._current_graph_task_id() >= 0:
            raise TrainingError(
                f"{kind} that steps weights inside a backward",
                expected="optimizers that step when the backward is over: no other moment is safe for the teacher",
                cure="switch the fused or per-parameter backward of the trainer off, for generator and fake score",
            )
        for role in roles:
            for old in role.replace(optimizer):
                for hook in self._hooks.pop(old, ()):
                    hook.remove()
                self._known.pop(old, None)
        logger.info("a new %s steps weights that DisBack knows: it is followed from here on", kind)
        self._hook(optimizer)

    def _before_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._hidden.pop(optimizer, None)  # the last step may have raised: its gradients are too old
        self._undo_changes(optimizer)
        if is_initialization(optimizer):
            self._initializing.add(optimizer)
            return None
        self._initializing.discard(optimizer)
        self._running.add(optimizer)
        changed = self._changed[optimizer] = ExitStack()
        self._session.before_step(optimizer)
        # Asked before an update may end here: these gradients were computed with the present teacher.
        factor = self._session.gradient_factor() if optimizer in self.generator.optimizers else 1.0
        roles = [role for role in self._roles if optimizer in role.optimizers]
        for role in roles:
            role.before_step(optimizer)
        rate = self._session.learning_rate_factor() if self.fake_score in roles else 1
        if rate not in (None, 1):
            changed.callback(scale_learning_rates(optimizer, self.fake_score.weights(optimizer), rate))

        def change_gradients() -> None:
            for role in roles:
                held = (factor if role is self.generator else rate) is None
                role.had_gradients[optimizer] = not held and has_gradients(role.weights(optimizer))
                if held:
                    self._hidden[optimizer] = hide_gradients(role.weights(optimizer))
                    self._held.add(optimizer)
                    changed.callback(keep_settings(optimizer, role.weights(optimizer)))
                elif role is self.generator and factor not in (None, 1.0):
                    scale_gradients(role.weights(optimizer), factor)

        return call_with_gradients(args, kwargs, change_gradients)

    def _after_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        self._running.clear()
        self._undo_changes(optimizer)
        if optimizer in self._initializing:
            return
        skipped = skipped_by_scaler(optimizer)
        for role in self._roles:  # s_phi first: its update may be the last of the recording
            if optimizer in role.optimizers:
                role.after_step(optimizer, role.had_gradients.pop(optimizer, False) and not skipped)

    def _before_state_dict(self, optimizer: Optimizer) -> None:
        self._undo_changes(optimizer)
        if optimizer in self._held:
            initialize_for_checkpoint(optimizer)

    def _undo_changes(self, optimizer: Optimizer) -> None:
        self._hidden.pop(optimizer, lambda: None)()
        self._changed.pop(optimizer, ExitStack()).close()


def _is_nested() -> bool:
    """Return whether a step of another optimizer is under way; the last one may have raised."""
    frames = [frame for frame, _ in walk_stack(sys._getframe()) if frame.f_code.co_name == "wrapper"]
    return len([frame for frame in frames if frame.f_globals.get("__name__") == "torch.optim.optimizer"]) > 1


class UpdateCounter:
    """Combines the steps of one or several optimizers of a network into updates.

    An update ends once every optimizer with new gradients has stepped, or when one is about to step for a second time.
    So Muon and AdamW that share a network make one update, and of two experts, of which an iteration trains one, each
    makes its own, although old gradients may lie in the other.

    Args:
        name: Name of the network, "generator" or "fake_score".
        optimizers: The optimizers.
        at_end: Called at the end, with whether a weight was updated, and the ids of the weights of other optimizers.
        only: Ids of the network's weights, if they are known.
        but: Ids of weights that the optimizers may step beside the network's.

    Attributes:
        total: Number of their steps so far.
    """

    def __init__(
        self,
        name: str,
        optimizers: list[Optimizer],
        at_end: Callable[[bool, set[int]], None],
        *,
        only: Set[int] = frozenset(),
        but: Set[int] = frozenset(),
    ) -> None:
        self.name, self.optimizers, self._at_end, self.total = name, optimizers, at_end, 0
        self._listed, self._inside = only or but, bool(only)
        self.had_gradients: dict[Optimizer, bool] = {}  # of the optimizer that is stepping
        self._ids = {id(p) for optimizer in optimizers for p in self.weights(optimizer)} | only
        self._stepped: dict[Optimizer, bool] = {}
        self._last: dict[Optimizer, tuple[ref[Tensor], int]] = {}  # a gradient of its last step, and its version

    def weights(self, optimizer: Optimizer) -> Iterator[Tensor]:
        """Yield the weights of this network that an optimizer steps."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if (id(p) in self._listed) is self._inside:
                    yield p

    def steps(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer steps a weight of this network."""
        return not self._ids.isdisjoint(map(id, parameters([optimizer])))

    def replace(self, optimizer: Optimizer) -> list[Optimizer]:
        """Add an optimizer, and remove those of which it steps all weights; return them."""
        own = set(map(id, self.weights(optimizer)))
        old = [each for each in self.optimizers if own.issuperset(map(id, self.weights(each)))]
        for each in old:
            self.optimizers.remove(each)
            self._stepped.pop(each, None)
        self.optimizers.append(optimizer)
        self._ids |= own
        return old

    def unseen(self) -> TrainingError:
        """Return the error for weights of the network that change without a step."""
        kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer in self.optimizers}))
        return TrainingError(
            f"weights of the {self.name} that change although no step() of its optimizer ({kinds}) is called",
            expected="updates by torch.optim.Optimizer.step(), which DisBack holds still and counts",
            cure=f"pass the optimizer that the loop steps as {self.name}_optimizer",
        )

    def before_step(self, optimizer: Optimizer) -> None:
        """End the present update if this optimizer has already stepped in it."""
        if optimizer in self._stepped:
            self._end()

    def after_step(self, optimizer: Optimizer, updated: bool) -> None:
        """Count a step, with whether it updated weights."""
        self._stepped[optimizer], self.total = updated, self.total + 1
        if len(self.optimizers) > 1:
            gradient = next((p.grad for p in self.weights(optimizer) if p.grad is not None), None)
            if gradient is not None:
                self._last[optimizer] = ref(gradient), gradient._version
            if any(self._has_new_gradients(each) for each in self.optimizers if each not in self._stepped):
                return
        self._end()

    def _has_new_gradients(self, optimizer: Optimizer) -> bool:
        gradient = next((p.grad for p in self.weights(optimizer) if p.grad is not None), None)
        if gradient is None:
            return has_gradients(self.weights(optimizer))  # those of other ranks, perhaps
        last, version = self._last.get(optimizer, (lambda: None, 0))
        return gradient is not last() or gradient._version != version

    def _end(self) -> None:
        idle = {
            id(p) for optimizer in self.optimizers if optimizer not in self._stepped for p in self.weights(optimizer)
        }
        updated = any(self._stepped.values())
        self._stepped.clear()
        self._at_end(updated, idle)

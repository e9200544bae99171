"""The six hooks that a plug-in may implement, the marker for it, and what an adapter answers. Imports no torch.

| hook                            | when                                              | who is called        |
|---------------------------------|---------------------------------------------------|----------------------|
| `disback_adapter`               | `attach(trainer)` looks for the roles             | until one answers    |
| `disback_after_node_recorded`   | Algorithm 1 saved s'_i                            | everyone             |
| `disback_after_path_completed`  | it saved s'_N                                     | everyone             |
| `disback_should_advance`        | Algorithm 2, after a generator update on a node   | until one answers    |
| `disback_after_node_swapped`    | the teacher holds another position                | everyone             |
| `disback_log`                   | at each swap, and whenever a number is known      | everyone             |

A plug-in is a module, or an object, with functions of these names marked `@hookimpl`. It may take fewer arguments than
the hook has, by name; one with a default is never passed. `hookimpl(tryfirst=True)` and `trylast=True` order plug-ins,
else the last one registered is called first. Wrappers are refused: each plug-in answers for itself alone.

All but `disback_log` are called on every process of a distributed run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from disback_plugin.path.degradation_path import DegradationPath
    from disback_plugin.path.manifest import Node
    from disback_plugin.scheduler import TrajectoryScheduler
    from disback_plugin.weights.network import ScoreNetwork

__all__ = ["ARGUMENTS", "PROJECT", "Adapter", "Specs", "hookimpl"]

PROJECT = "disback"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Adapter:
    """Who plays which role in one live trainer; the four arguments of `attach`, and what the trainer needs beside.

    Attributes:
        teacher: The teacher s_theta.
        fake_score: s_phi.
        generator_optimizer: Whatever steps the generator.
        fake_score_optimizer: Whatever steps s_phi.
        plugins: What makes plug-ins that take part by themselves, by the name with which "no:NAME" leaves one out.

    Example:
        >>> from types import SimpleNamespace
        >>> def roles_of(trainer):
        ...     return Adapter(
        ...         trainer.real_unet, trainer.fake_unet, trainer.optimizer_generator, trainer.optimizer_fake
        ...     )
        >>> names = ("real_unet", "fake_unet", "optimizer_generator", "optimizer_fake")
        >>> roles_of(SimpleNamespace(**{name: name for name in names})).fake_score
        'fake_unet'
    """

    teacher: ScoreNetwork | nn.Module | Mapping[str, nn.Module]
    fake_score: ScoreNetwork | nn.Module | Mapping[str, nn.Module]
    generator_optimizer: Optimizer | Sequence[Optimizer]
    fake_score_optimizer: Optimizer | Sequence[Optimizer]
    plugins: Mapping[str, Callable[[], object]] = field(default_factory=dict)


class Specs:
    """The hooks that a plug-in may implement."""

    @hookspec(firstresult=True)
    def disback_adapter(self, trainer: object) -> Adapter | None:
        """Return the roles in a trainer that this adapter understands, or None.

        Args:
            trainer: The live trainer that the user passed to `attach`.

        Raises:
            RoleError: If it is the right trainer in a state that cannot have DisBack; say why and what would work.

        Example:
            >>> from disback_plugin.plugins.manager import PluginManager
            >>> class Pairs:
            ...     @hookimpl
            ...     def disback_adapter(self, trainer):
            ...         return Adapter(*trainer) if isinstance(trainer, tuple) else None
            >>> PluginManager(Pairs(), autoload=False).adapter(("s_theta", "s_phi", "opt_g", "opt_f")).fake_score
            's_phi'
        """

    @hookspec
    def disback_after_node_recorded(self, path: DegradationPath, node: Node) -> None:
        """Take note that s'_i is on the path. Its file is on disk by now.

        Args:
            path: The path, as far as it is recorded.
            node: The node, i >= 1: its index, iteration, size and errors; `path[node.index]` decodes it.

        Example:
            >>> class Sizes:
            ...     @hookimpl
            ...     def disback_after_node_recorded(self, node):
            ...         print(node.index, node.bytes)
        """

    @hookspec
    def disback_after_path_completed(self, path: DegradationPath) -> None:
        """Take note that recording ended: the generator may move from now on. Not called for a path that is reused.

        Args:
            path: The complete path.

        Example:
            >>> class Publish:
            ...     @hookimpl
            ...     def disback_after_path_completed(self, path):
            ...         path.push_to_hub("me/my-path")  # on the main process, in a distributed run
        """

    @hookspec(firstresult=True)
    def disback_should_advance(
        self, scheduler: TrajectoryScheduler, position: float, updates_in_node: int, signal: Any
    ) -> bool | None:
        """Overrule how long the teacher stands on a node: the paper's "when near convergence, we switch" (Sec. 4.3).

        Asked after each generator update while the teacher is on a node i >= 1 of a schedule that stands on nodes
        (`Fixed`, or any with `discrete = True`); never on a ramp, and never at the teacher itself. What is left of the
        plan follows from there: a node that was left early or late moves all later ones by as much. The scheduler's
        `state_dict` remembers what was answered; a plug-in with a state of its own has to save that itself.

        In a distributed run every process asks, and the first rank's answer holds for all. A plug-in that raises on one
        of them is left out on all. That takes one exchange of a few bytes a question, and only where a plug-in has this
        hook; all processes need the same ones.

        Args:
            scheduler: The scheduler that asks; to be read only.
            position: i, as a float.
            updates_in_node: Generator updates on this node so far, >= 1.
            signal: What the loop passed to `scheduler.step(signal)`, or set as `handle.signal`; None if nothing.

        Returns:
            True to leave the node now, False to stay on it, though its time may be up, and None to leave it to others,
            or to the plan.

        Example:
            >>> from disback_plugin.plugins.manager import PluginManager
            >>> class WhenConverged:
            ...     @hookimpl
            ...     def disback_should_advance(self, updates_in_node, signal):
            ...         return None if signal is None else signal < 0.1 or updates_in_node >= 1_000
            >>> PluginManager(WhenConverged(), autoload=False).should_advance(None, 3.0, 20, 0.05)
            True
        """

    @hookspec
    def disback_after_node_swapped(
        self, scheduler: TrajectoryScheduler, position: float, previous: float, update: int
    ) -> None:
        """Take note that the teacher holds another position: at the start, on the walk, after a resume, on `detach`.

        `previous` is the position of the call before, 0.0 at first; so what depends on the position (guidance scales)
        can be set here and nowhere else. Not called around `original_teacher`, which is no part of the walk.

        Args:
            scheduler: The scheduler, its state settled.
            position: Where the teacher stands now, in [0, N]; 0.0 is the teacher itself.
            previous: Where it stood before.
            update: Generator updates so far.

        Example:
            >>> class Guidance:
            ...     @hookimpl
            ...     def disback_after_node_swapped(self, scheduler, position):
            ...         scale = 1.0 if position else 7.5  # early nodes were recorded without guidance
        """

    @hookspec
    def disback_log(self, values: Mapping[str, float], step: int) -> None:
        """Take what a run reports: plain numbers, on the main process, between two steps and at the end.

        `Trackers` takes them to accelerate's. Where nobody listens, moves go to `logging`: INFO at a node, else DEBUG.

        Args:
            values: Numbers by name. Where the walk is: "disback/position" in [0, N]; "disback/node", the node at or
                above it; "disback/gradient", the factor on the generator's gradient; and, if the teacher moved,
                "disback/swap_ms", host milliseconds of its write, and "disback/delta_norm", how far it went along the
                path, in weight space. While recording, now and then: "disback/recording", an update of s_phi;
                "disback/agreement", the cosine of its gradient and the one before (`fitting`), and where it is known
                "disback/loss". Once, 1.0: "disback/stalled" or "disback/diverged", of a run that goes wrong in the walk
                (`monitoring`). What the loop gives to `Handle.log`. Every 50 updates: "disback/masked_samples", how
                many samples the losses left out on this process since the last report, because they were not finite;
                0 too (`masking.MaskedSamples`).
            step: Generator updates so far.

        Example:
            >>> from disback_plugin.plugins.manager import PluginManager
            >>> class Print:
            ...     @hookimpl
            ...     def disback_log(self, values, step):
            ...         print(step, dict(values))
            >>> PluginManager(Print(), autoload=False).log({"disback/masked_samples": 0}, 50)
            50 {'disback/masked_samples': 0}
        """


# The arguments of each hook, in order.
ARGUMENTS = {
    name: tuple(inspect.signature(spec).parameters)[1:]
    for name, spec in vars(Specs).items()
    if name.startswith(f"{PROJECT}_")
}

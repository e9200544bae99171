"""What a plug-in is: the six hooks, the marker `hookimpl`, an adapter's answer, and how plug-ins are installed.

| hook                           | called                                                     | implementations called |
|--------------------------------|------------------------------------------------------------|------------------------|
| `disback_adapter`              | when `attach(trainer)` looks for the roles                 | until one answers      |
| `disback_after_node_recorded`  | after Algorithm 1 saved s'_i                               | all                    |
| `disback_after_path_completed` | after Algorithm 1 saved s'_N                               | all                    |
| `disback_should_advance`       | in Algorithm 2, after a generator update on a node         | until one answers      |
| `disback_after_node_swapped`   | after the teacher was moved to another position            | all                    |
| `disback_log`                  | at each move of the teacher, and when a number is measured | all                    |

A plug-in is a module, or an object, with functions of these names marked `@hookimpl`. A function may take fewer
arguments than the hook has, by name; pluggy never passes an argument that has a default. `hookimpl(tryfirst=True)` and
`trylast=True` order plug-ins; otherwise the plug-in registered last is called first. Wrappers are refused, because
plug-ins are isolated from each other.

`disback_log` is called on the main process of a distributed run, the other hooks on every process.

Installed plug-ins are listed by their entry points without importing any; a plug-in's name is that of its entry point:

    [project.entry-points."disback.adapters"]     # imported only when a trainer needs an adapter
    my_trainer = "my_package.disback_adapter"

    [project.entry-points."disback.hooks"]        # imported by every run
    my_tracker = "my_package.disback_tracker"

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from itertools import chain
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from disback_plugin.path.degradation_path import DegradationPath
    from disback_plugin.path.manifest import Node
    from disback_plugin.scheduler import TrajectoryScheduler
    from disback_plugin.weights.network import ScoreNetwork

PROJECT = "disback"
ADAPTERS, HOOKS = "disback.adapters", "disback.hooks"
# If several distributions have a plug-in of one name, this distribution's is used.
OURS = "disback-plugin"


hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Adapter:
    """The roles in one live trainer: four arguments of `attach`, and the plug-ins that the trainer needs.

    Attributes:
        teacher: The teacher s_theta.
        fake_score: The fake score s_phi.
        generator_optimizer: The optimizer of the generator, or several.
        fake_score_optimizer: The optimizer of the fake score, or several.
        plugins: Functions without arguments, each of which makes a plug-in for this run, by the plug-in's name;
            "no:NAME" blocks one.
        sample: A function that returns samples x_0 of the student, as `record` takes it, or whatever `loss` makes them
            of. It is called only if teacher and fake score have different architectures.
        loss: A function of a network and x_0 that returns the denoising loss, likewise.
        stand_in: For a trainer without a fake score, whose network and optimizer are then None: returns a context
            manager with the attributes `fake_score` and `optimizer`, which trains that network while it is open, as
            long as the recording lasts. It is not called with record=0.

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
    fake_score: ScoreNetwork | nn.Module | Mapping[str, nn.Module] | None
    generator_optimizer: Optimizer | Sequence[Optimizer]
    fake_score_optimizer: Optimizer | Sequence[Optimizer] | None
    plugins: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    sample: Callable[[], Any] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    stand_in: Callable[[], Any] | None = None


class Specs:
    """The hooks that a plug-in may implement."""

    @hookspec(firstresult=True)
    def disback_adapter(self, trainer: object) -> Adapter | None:
        """Return the roles in a trainer that this adapter knows, or None for any other trainer.

        Args:
            trainer: The live trainer that the user passed to `attach`.

        Raises:
            RoleError: If this is the right trainer in a state that DisBack cannot work with; the error says why, and
                what would work.

        Example:
            >>> from disback_plugin.plugins.manager import PluginManager
            >>> class Pairs:
            ...     @hookimpl
            ...     def disback_adapter(self, trainer):
            ...         return Adapter(*trainer) if isinstance(trainer, tuple) else None
            >>> PluginManager(Pairs(), autoload=False).find_adapter(("s_theta", "s_phi", "opt_g", "opt_f")).fake_score
            's_phi'
        """

    @hookspec
    def disback_after_node_recorded(self, path: DegradationPath, node: Node) -> None:
        """React to a new node s'_i, whose file is on disk by now.

        Args:
            path: The path recorded so far.
            node: The node, i >= 1: its index, iteration and size; `path[node.index]` decodes its weights.

        Example:
            >>> class Sizes:
            ...     @hookimpl
            ...     def disback_after_node_recorded(self, node):
            ...         print(node.index, node.bytes)
        """

    @hookspec
    def disback_after_path_completed(self, path: DegradationPath) -> None:
        """React to the end of a recording; the generator is trained from now on. Not called for a reused path.

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
        """Decide whether the teacher leaves its node: the paper's "when near convergence, we switch" (Sec. 4.3).

        Called after each generator update while the teacher is on a node i >= 1 of a schedule that stays on nodes
        (`Fixed`, or any with `discrete = True`); never on a ramp, and never at the teacher itself. A node left early or
        late moves all later nodes of the schedule by as many updates. The scheduler's `state_dict` remembers the
        answers; a plug-in saves any state of its own itself.

        In a distributed run every process calls the hook, and the answer of rank 0 holds for all. A plug-in that raises
        on one rank is left out on all. This costs one exchange of a few bytes for each call, and only if a plug-in has
        this hook; all ranks need the same plug-ins.

        Args:
            scheduler: The scheduler that asks; read it, do not change it.
            position: i, as a float.
            updates_in_node: Generator updates on this node so far, >= 1.
            signal: The argument of `scheduler.step(signal)`, or the value of `handle.signal`; None if neither is set.

        Returns:
            True to leave the node now, False to stay on it even if the schedule leaves it, None to let another plug-in
            or the schedule decide.

        Example:
            >>> from disback_plugin.plugins.manager import PluginManager
            >>> class WhenConverged:
            ...     @hookimpl
            ...     def disback_should_advance(self, updates_in_node, signal):
            ...         return None if signal is None else signal < 0.1 or updates_in_node >= 1_000
            >>> PluginManager(WhenConverged(), autoload=False).should_advance(updates_in_node=20, signal=0.05)
            True
        """

    @hookspec
    def disback_after_node_swapped(
        self, scheduler: TrajectoryScheduler, position: float, previous: float, update: int
    ) -> None:
        """React to a move of the teacher: at the start, during backtracking, after a resume, and on `detach`.

        `previous` is the position of the call before, 0.0 at first, so that a setting that depends on the position (a
        guidance scale) can be set in this hook alone. `original_teacher` does not call this hook.

        Args:
            scheduler: The scheduler; its state is up to date.
            position: The teacher's position now, in [0, N]; 0.0 is the teacher itself.
            previous: The teacher's position before.
            update: Generator updates so far.

        Example:
            >>> class Guidance:
            ...     @hookimpl
            ...     def disback_after_node_swapped(self, scheduler, position):
            ...         scale = 1.0 if position else 7.5  # early nodes were recorded without guidance
        """

    @hookspec
    def disback_log(self, values: Mapping[str, float], step: int) -> None:
        """Receive the numbers of a run: plain numbers, on the main process, between two steps and at the end.

        `Trackers` sends them to accelerate's trackers. If no plug-in implements this hook, each move of the teacher is
        logged by `logging`, at INFO on a node and else at DEBUG.

        Args:
            values: Numbers by name. During backtracking: "disback/position" in [0, N]; "disback/node", the node at or
                above the position; "disback/gradient", the factor on the generator's gradient; and, if the teacher
                moved, "disback/swap_ms", the host's milliseconds for the write, and "disback/delta_norm", the length of
                the move along the path in weight space. As 1.0 "disback/detached", if the teacher is restored before
                backtracking has ended; position, node and factor are then the last of the run. While recording, now and
                then: "disback/recording", the recording iteration; "disback/agreement", the cosine between two
                successive gradients of the fake score; and, where it is known, "disback/loss". At its end:
                "disback/path_bytes", the size of the path, and "disback/node_seconds", the mean time of a node's write.
                Once, as 1.0: "disback/stalled" or "disback/diverged", if a run stops converging. Now and then:
                "disback/effective_step", the root mean square of the generator's steps over their learning rate. Every
                number given to `Handle.log`, or returned by an evaluation (`attach(evaluate=)`). Every 50 updates:
                "disback/masked_samples", how many samples the losses on this process left out since the last report
                because they were not finite, 0 included (`MaskedSamples`).
            step: Generator updates so far.

        Example:
            >>> from disback_plugin.plugins.manager import PluginManager
            >>> class Print:
            ...     @hookimpl
            ...     def disback_log(self, values, step):
            ...         print(step, dict(values))
            >>> PluginManager(Print(), autoload=False).call(
            ...     "disback_log", values={"disback/masked_samples": 0}, step=50
            ... )
            50 {'disback/masked_samples': 0}
        """


HOOK_NAMES = tuple(name for name in vars(Specs) if name.startswith(PROJECT))
# Hooks that only report: a plug-in that implements no other hook cannot change what a run trains.
REPORTING = {"disback_log", "disback_after_node_recorded", "disback_after_path_completed"}


# -- installed plug-ins ----------------------------------------------------------------------------------------------


@dataclass
class Plugin:
    """An entry in the list of plug-ins.

    Attributes:
        name: Name of the entry point; for an object that the script passed, the name of its class.
        distribution: The distribution that has the entry point; "" for an object.
        version: The distribution's version.
        group: `ADAPTERS` or `HOOKS`; "" for an object.
        value: The entry point's value, "package.module" or "package.module:object".
        status: "installed" (not imported yet), "ready" (imported and valid), "blocked" or "broken".
        reason: The error of a broken plug-in, the option that blocks a blocked one; else "".
        hooks: The hooks that it implements, once it is ready.

    Example:
        >>> print(Plugin("mine", "disback-mine", "1.0", HOOKS, "mine.plugin"))
        mine of disback-mine 1.0
    """

    name: str
    distribution: str = ""
    version: str = ""
    group: str = ""
    value: str = ""
    status: str = "installed"
    reason: str = ""
    hooks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} of " + (f"{self.distribution} {self.version}" if self.distribution else "the script")


def installed() -> list[Plugin]:
    """Return the plug-ins of all installed distributions without importing any, the one to use of each name first.

    A second plug-in of one name is marked as broken, and so is a distribution whose entry points are unreadable.

    Example:
        >>> [plugin.value for plugin in installed() if plugin.name == "dmd2"]
        ['disback_adapters.dmd2']
    """
    found: dict[str, list[Plugin]] = {}
    for distribution in distributions():
        name, version = "an unknown distribution", ""
        try:
            if f"{PROJECT}." not in (distribution.read_text("entry_points.txt") or ""):
                continue
            # A later Python raises KeyError for what is missing.
            facts = {key: distribution.metadata[key] for key in ("Name", "Version") if key in distribution.metadata}
            name, version = facts.get("Name", name), facts.get("Version", version)
            points = [point for point in distribution.entry_points if point.group in (ADAPTERS, HOOKS)]
            plugins = [Plugin(point.name, name, version, point.group, point.value) for point in points]
        except Exception as error:  # one unreadable distribution must not hide the plug-ins of the others
            reason = f"its entry points cannot be read ({error})"
            plugins = [Plugin(name, name, version, HOOKS, status="broken", reason=reason)]
        found.setdefault(name, plugins)  # a distribution that is on sys.path twice is imported from the first
    used: dict[str, Plugin] = {}
    listed = [*found.pop(OURS, []), *chain.from_iterable(found[name] for name in sorted(found))]
    for plugin in listed:
        if used.setdefault(plugin.name, plugin) is not plugin:
            plugin.status, plugin.reason = "broken", f"its name is taken by {used[plugin.name]}"
    return listed

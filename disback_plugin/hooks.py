"""The pluggy host: what an adapter of a trainer implements and how it is found, and who hears what a run has to say.
Imports no torch.

An adapter is a module named by an entry point of the group `disback.adapters`, in this distribution or any other:

    [project.entry-points."disback.adapters"]
    my_trainer = "my_package.disback_adapter"

Only the adapter that is asked for is imported; without a name all are asked in turn.

A plug-in that wants to be told of a run is registered by the run's own script (`register`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import pluggy

from disback_plugin.errors import OptionError, RoleError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from disback_plugin.weights import ScoreNetwork

__all__ = ["GROUP", "Adapter", "find_adapter", "hookimpl", "log", "register"]

GROUP = "disback.adapters"

hookspec = pluggy.HookspecMarker("disback")
hookimpl = pluggy.HookimplMarker("disback")


@dataclass(frozen=True)
class Adapter:
    """Who plays which role in one live trainer; the four arguments of `attach`.

    Attributes:
        teacher: The teacher s_theta.
        fake_score: s_phi.
        generator_optimizer: Whatever steps the generator.
        fake_score_optimizer: Whatever steps s_phi.
    """

    teacher: ScoreNetwork | nn.Module | Mapping[str, nn.Module]
    fake_score: ScoreNetwork | nn.Module | Mapping[str, nn.Module]
    generator_optimizer: Optimizer | Sequence[Optimizer]
    fake_score_optimizer: Optimizer | Sequence[Optimizer]


class Specs:
    """The hooks that a plug-in may implement."""

    @hookspec(firstresult=True)
    def disback_adapter(self, trainer: object) -> Adapter | None:
        """Return the roles in a trainer that this adapter understands, or None.

        Args:
            trainer: The live trainer that the user passed to `attach`.

        Raises:
            RoleError: If it is the right trainer in a state that cannot have DisBack; say why and what would work.
        """

    @hookspec
    def disback_log(self, values: Mapping[str, float], step: int) -> None:
        """Take what a run reports: plain numbers, on the main process, between two steps and at the end.

        Args:
            values: Numbers by name. "disback/masked_samples": how many samples the losses left out on this process
                since the last report, because they were not finite; reported by `masking.MaskedSamples`, 0 too.
            step: Generator updates so far.

        Example:
            >>> class Print:
            ...     @hookimpl
            ...     def disback_log(self, values, step):
            ...         print(step, dict(values))
            >>> unregister = register(Print())
            >>> log({"disback/masked_samples": 0}, step=50)
            50 {'disback/masked_samples': 0}
            True
            >>> unregister()
        """


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("disback")
    manager.add_hookspecs(Specs)
    return manager


_LISTENERS = _new_manager()


def register(plugin: object) -> Callable[[], None]:
    """Let a plug-in hear what runs of this process report.

    Args:
        plugin: An object or module with functions marked `@hookimpl` and named after a hook of `Specs`.

    Returns:
        A function that takes it out again.

    Raises:
        OptionError: If it has none, or one that is no hook's.
    """
    known = {name for name in vars(Specs) if name.startswith("disback_")}
    named = {name for name in dir(plugin) if hasattr(getattr(plugin, name, None), "disback_impl")}
    if not named or not named <= known:
        raise OptionError(
            f"a plug-in that implements {sorted(named) or 'nothing'}",
            expected=f"some of {sorted(known)}, marked with @hookimpl",
            cure="mark the method with disback_plugin.hookimpl and give it the hook's name",
        )
    _LISTENERS.register(plugin)

    def unregister() -> None:
        if _LISTENERS.is_registered(plugin):
            _LISTENERS.unregister(plugin)

    return unregister


def log(values: Mapping[str, float], *, step: int) -> bool:
    """Call `disback_log` of every registered plug-in; return whether there was one."""
    if not _LISTENERS.hook.disback_log.get_hookimpls():
        return False
    _LISTENERS.hook.disback_log(values=values, step=step)
    return True


def find_adapter(trainer: object, name: str | None = None) -> Adapter:
    """Return the roles in a trainer.

    Args:
        trainer: The live trainer.
        name: Entry point to ask; None asks all that are installed, and skips those that cannot be imported.

    Raises:
        OptionError: If there is no adapter of this name.
        RoleError: If no adapter understands the trainer, or the named one cannot be imported.
    """
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name is not None and name not in installed:
        raise OptionError(
            f"adapter={name!r}",
            expected=f"one of {sorted(installed)}",
            cure="install the distribution that has it, or pass teacher=, fake_score= and the two optimizers yourself",
        )
    broken: list[str] = []
    manager = _new_manager()
    for point in [installed[name]] if name else installed.values():
        try:
            manager.register(point.load(), name=point.name)
        except Exception as error:  # a third party's module may raise anything
            broken.append(f"{_origin(point)} ({type(error).__name__}: {error})")
    manager.check_pending()
    adapter: Adapter | None = manager.hook.disback_adapter(trainer=trainer)
    if adapter is None:
        asked = f"{name or sorted(installed)}" + (f"; could not be imported: {', '.join(broken)}" if broken else "")
        raise RoleError(
            f"a {type(trainer).__module__}.{type(trainer).__qualname__} that no adapter understands (asked {asked})",
            expected="a trainer that one of them knows",
            cure="pass teacher=, fake_score=, generator_optimizer= and fake_score_optimizer= instead of the trainer",
        )
    return adapter


def _origin(point: EntryPoint) -> str:
    distribution = point.dist.name if point.dist else "an unknown distribution"
    return f"{point.name} of {distribution}"

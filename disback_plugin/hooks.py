"""The pluggy host: what an adapter of a trainer implements, and how it is found. Imports no torch.

An adapter is a module named by an entry point of the group `disback.adapters`, in this distribution or any other:

    [project.entry-points."disback.adapters"]
    my_trainer = "my_package.disback_adapter"

Only the adapter that is asked for is imported; without a name all are asked in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import pluggy

from disback_plugin.errors import OptionError, RoleError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from disback_plugin.weights import ScoreNetwork

__all__ = ["GROUP", "Adapter", "find_adapter", "hookimpl"]

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
    manager = pluggy.PluginManager("disback")
    manager.add_hookspecs(Specs)
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

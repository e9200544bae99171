"""`attach`: both stages on a live training loop that nobody edits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from disback_plugin import distributed
from disback_plugin.errors import OptionError
from disback_plugin.handle import Handle
from disback_plugin.loop import optimizers
from disback_plugin.loop.lr_schedulers import Stateful
from disback_plugin.plugins.hookspecs import Adapter
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.schedules import Schedule, resolve
from disback_plugin.weights.network import Network, ScoreNetwork

__all__ = ["attach"]

Optimizers = Optimizer | Sequence[Optimizer]


def attach(
    trainer: object = None,
    *,
    adapter: str | None = None,
    teacher: Network | None = None,
    fake_score: Network | None = None,
    generator_optimizer: Optimizers | None = None,
    fake_score_optimizer: Optimizers | None = None,
    path: str | os.PathLike[str] | None = None,
    record: int = 200,
    every: int = 50,
    codec: str = "int8",
    keep_teacher: bool = True,
    schedule: Schedule | str = "auto",
    prefetch: bool | None = None,
    state: Mapping[str, Any] | None = None,
    plugins: PluginManager | Sequence[object] = (),
    restore: str | Stateful | Sequence[str | Stateful] = "schedulers",
    log: str | os.PathLike[str] | None = None,
) -> Handle:
    """Add DisBack to a training loop; returns a handle whose `detach()` takes it out again without a trace.

    With a new `path` the first updates of the fake score record it, `record` of them or, under "auto", fewer, while the
    generator is held still; then backtracking starts by itself. A finished path in the folder is reused, an unfinished
    one resumed, any other refused.

    To resume, attach when the trainer is built, load its checkpoint, and give `load_state_dict` the saved state. A
    trainer that loads its checkpoint while it is built is attached after that, with `state`.

    Args:
        trainer: A live trainer that an installed adapter understands; else pass the four roles.
        adapter: Name of the adapter to ask, an entry point of the group `disback.adapters`; None asks all.
        teacher: The teacher s_theta ("real score"): a module, plain, compiled or wrapped in DDP, or a `ScoreNetwork`.
        fake_score: s_phi, of the teacher's architecture. It is set to the teacher (new path), the last node so far
            (unfinished) or s'_N (finished path).
        generator_optimizer: Whatever steps the generator, all of it: one optimizer or several, plain or accelerate's.
        fake_score_optimizer: Whatever steps s_phi. It may step more, as a discriminator, but nothing of the generator.
        path: Folder of the path; None only with record=0.
        record: Recording iterations, in fake-score updates, >= 0; 200 in the paper. The default schedule ends them as
            soon as s_phi is fitted, and gives them twice its learning rate until then. 0 changes nothing in a run, bit
            for bit, unless the schedule scales gradients without a path.
        every: Updates between two nodes, >= 1; 50 in the paper. The last node is saved after the last update.
        codec: How nodes are stored: "int8" (a quarter of float32, an error of a thousandth) or "exact" (a plain
            safetensors state dict).
        keep_teacher: Whether the path holds node 0. If not, its size halves, and to attach again needs a teacher that
            is node 0 bit for bit.
        schedule: How the teacher walks back: an object of `schedules`, or its name as `schedules.parse` reads it. A
            setting of the paper wants its own recording too: `**schedules.recipe("edm-64").options`.
        prefetch: Whether to decode the next position ahead of time, as in `TrajectoryScheduler`.
        state: What `Handle.state_dict` returned at the moment whose checkpoint the trainer has loaded. The path is then
            taken as it is, s_phi is left alone, and the teacher is written, whatever it holds.
        plugins: Who takes part in the run beside the installed plug-ins: names of installed ones that have to work,
            "no:NAME" for those that shall stay out, and plug-ins themselves (`hooks`).
        restore: What a recording inside the loop uses up though the generator stands still, and is put back at its end:
            "schedulers", the learning-rate schedulers of both optimizers, which are found by themselves; objects
            with `state_dict` and `load_state_dict` of plain numbers, as the ramp of an average, or several:
            ("schedulers", ramp). () for nothing: warm-ups are then over before the generator moves.
        log: File of the run's log, which `disback report` reads and `Handle.log` adds to; lines are added to it. None:
            beside the path, as "PATH.log.jsonl", and none without a path. `plugins=("no:run_log",)` leaves it out.

    Returns:
        The handle; also a context manager that detaches at its end.

    Raises:
        RoleError: If a role is no module, cannot be written, or an optimizer steps the wrong network or two of them.
        MismatchError: If teacher and fake score differ in keys or shapes.
        PathError: If the folder holds something else, or cannot be written.
        OptionError: If a count is out of its domain, or the schedule does not fit the path, or `plugins` names what is
            not installed.
        PluginError: If the named adapter, or a plug-in that `plugins` names, is broken.
        StateError: If `state` is of another run or moment.
        RankError: If another rank of the process group failed, was given something else, or did not come.

        Whatever is raised, no weight was written and no hook is left; but a plug-in that hears of the start of a
        finished path and raises does so when s_phi is s'_N and the teacher s'_0 again.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> teacher, fake, generator = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        >>> opt_f, opt_g = (torch.optim.Adam(net.parameters(), lr=0.01) for net in (fake, generator))
        >>> with attach(
        ...     teacher=teacher,
        ...     fake_score=fake,
        ...     generator_optimizer=opt_g,
        ...     fake_score_optimizer=opt_f,
        ...     path=tempfile.mkdtemp(),
        ...     record=4,
        ...     every=2,
        ...     schedule="ramp:3",
        ... ) as handle:
        ...     for _ in range(8):  # the trainer's loop
        ...         x = generator(torch.randn(4, 2))
        ...         opt_f.zero_grad()
        ...         (fake(x.detach()) - x.detach()).square().mean().backward()
        ...         opt_f.step()
        ...         opt_g.zero_grad()
        ...         ((fake(x) - teacher(x)).detach() * x).sum().backward()
        ...         opt_g.step()
        ...         print(handle.phase, round(handle.position, 2))
        recording 0.0
        recording 0.0
        recording 0.0
        backtracking 1.8
        backtracking 1.2
        backtracking 0.6
        done 0.0
        done 0.0
    """
    given = {
        "teacher": teacher,
        "fake_score": fake_score,
        "generator_optimizer": generator_optimizer,
        "fake_score_optimizer": fake_score_optimizer,
    }

    def build() -> Handle:
        taking_part = PluginManager.of(plugins)
        roles = _roles(trainer, adapter, given, taking_part)
        return Handle(
            teacher=ScoreNetwork.of(roles.teacher, role="teacher"),
            fake_score=ScoreNetwork.of(roles.fake_score, role="fake score"),
            generator_optimizers=optimizers.unwrap(roles.generator_optimizer, role="generator_optimizer"),
            fake_score_optimizers=optimizers.unwrap(roles.fake_score_optimizer, role="fake_score_optimizer"),
            schedule=resolve(schedule),
            prefetch=prefetch,
            plugins=taking_part,
            restore=restore,
        )

    handle = distributed.on_every_rank(build, "have its roles")
    handle.begin(path, record=record, every=every, codec=codec, keep_teacher=keep_teacher, state=state, log=log)
    return handle


def _roles(trainer: object, adapter: str | None, given: dict[str, Any], plugins: PluginManager) -> Adapter:
    named = [name for name, value in given.items() if value is not None]
    if trainer is None and adapter is None and len(named) == len(given):
        return Adapter(**given)
    if trainer is not None and not named:
        return plugins.find_adapter(trainer, adapter)
    raise OptionError(
        f"attach({', '.join(['trainer'] * (trainer is not None) + ['adapter'] * (adapter is not None) + named)})",
        expected=f"a trainer and perhaps its adapter's name, or {', '.join(given)}",
        cure="pass one or the other, completely",
    )

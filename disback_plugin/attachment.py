"""`attach`: both stages on a live training loop that nobody edits."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from disback_plugin import distributed
from disback_plugin.errors import OptionError, PathError, PluginError
from disback_plugin.handle import Handle
from disback_plugin.loop import optimizers, roles
from disback_plugin.loop.lr_schedulers import Restorable
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Manifest, Recording
from disback_plugin.plugins.hookspecs import Adapter
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.recorder import open_or_create
from disback_plugin.schedules import Schedule, resolve
from disback_plugin.session import Session
from disback_plugin.weights.network import Network, ScoreNetwork
from disback_plugin.weights.sharding import FullState
from disback_plugin.weights.tensors import fingerprint

__all__ = ["attach"]

logger = logging.getLogger(__name__)

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
    record: int = Recording.iterations,
    every: int = Recording.every,
    codec: str = Recording.codec,
    keep_teacher: bool = Recording.keep_teacher,
    schedule: Schedule | str = "auto",
    prefetch: bool | None = None,
    state: Mapping[str, Any] | None = None,
    plugins: PluginManager | Sequence[object] = (),
    restore: Restorable = "schedulers",
    log: str | os.PathLike[str] | None = None,
) -> Handle:
    """Add DisBack to a training loop and return a handle, whose `detach()` removes it without a trace.

    With a new `path` the first updates of the fake score record it, while the generator is held still; then
    backtracking begins by itself. A finished path in the folder is reused, an unfinished one resumed, and any other
    refused.

    To resume, attach after the trainer is built, load its checkpoint, and give `load_state_dict` the saved state. If a
    trainer loads its checkpoint while it is built, attach after that, with `state`.

    Args:
        trainer: A live trainer that an installed adapter understands; else pass the four roles.
        adapter: Name of the adapter to ask, an entry point of the group `disback.adapters`; None asks all.
        teacher: The teacher s_theta ("real score"): a module, plain, compiled or wrapped in DDP, or a `ScoreNetwork`.
        fake_score: s_phi, of the teacher's architecture. It is set to the teacher (new path), the last node so far
            (unfinished path) or s'_N (finished path).
        generator_optimizer: All optimizers of the generator: one or several, plain or accelerate's.
        fake_score_optimizer: All optimizers of s_phi. They may step more, as a discriminator, but not the generator.
        path: Folder of the path; None only with record=0.
        record: Recording iterations, in fake-score updates, >= 0; 200 in the paper. The default schedule ends recording
            as soon as s_phi is fitted, and doubles its learning rate until then. 0 changes nothing in a run, bit for
            bit, unless the schedule scales gradients without a path.
        every: Updates between two nodes, >= 1; 50 in the paper. The last node is saved after the last update.
        codec: Format of the nodes: "int8" (a quarter of float32, with an error of a thousandth) or "exact".
        keep_teacher: Whether the path holds node 0. If not, its size halves, and it can be used again only with the
            same teacher, bit for bit.
        schedule: How the teacher moves back: an object of `schedules`, or its name as `schedules.parse` reads it. A
            setting of the paper needs its own recording too: `**schedules.recipe("edm-64").options`.
        prefetch: Whether to decode the next position ahead of time, as in `TrajectoryScheduler`.
        state: The result of `Handle.state_dict` at the moment whose checkpoint the trainer has loaded. The path is then
            used as it is, s_phi is not written, and the teacher is, whatever it holds.
        plugins: Plug-ins that take part in the run beside the installed ones: names of installed ones that have to
            work, "no:NAME" to exclude one, and plug-ins themselves.
        restore: Objects that a recording advances although the generator stands still, to be restored at its end:
            "schedulers" for the learning-rate schedulers of both optimizers, which are found by themselves; objects
            with `state_dict` and `load_state_dict` of plain numbers, as the ramp of an average; or several:
            ("schedulers", ramp). () restores nothing: warm-ups are then over before the generator moves.
        log: File of the run's log, which `disback report` reads and `Handle.log` adds to; lines are appended. None:
            beside the path, as "PATH.log.jsonl", and none without a path. `plugins=("no:run_log",)` disables it.

    Returns:
        The handle; as a context manager it detaches at the end of its block.

    Raises:
        RoleError: If a role is no module or cannot be written, or an optimizer steps the wrong network or two of them.
        MismatchError: If teacher and fake score differ in keys or shapes.
        PathError: If the folder holds something else, or cannot be written.
        OptionError: If a count is out of its domain, the schedule does not fit the path, or `plugins` names a plug-in
            that is not installed.
        PluginError: If the named adapter, or a plug-in that `plugins` names, is broken.
        StateError: If `state` is of another run or moment.
        RankError: If another rank of the process group failed, had other arguments, or did not come.

        On error, no weights have been written and no hooks remain. Exception: if a plug-in raises while backtracking on
        a finished path begins, the fake score is already s'_N; the teacher is restored.

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

    def build() -> Session:
        manager = PluginManager.of(plugins)
        found = _roles(trainer, adapter, given, manager)
        return Session(
            ScoreNetwork.of(found.teacher, role="teacher"),
            ScoreNetwork.of(found.fake_score, role="fake score"),
            optimizers.unwrap(found.generator_optimizer, role="generator_optimizer"),
            optimizers.unwrap(found.fake_score_optimizer, role="fake_score_optimizer"),
            schedule=resolve(schedule),
            prefetch=prefetch,
            plugins=manager,
            restore=restore,
        )

    session = distributed.on_every_rank(build, "have its roles")
    settings = {"record": record, "every": every, "codec": codec, "keep_teacher": keep_teacher}
    _begin(session, path, settings, state, log)
    return Handle(session)


def _roles(trainer: object, adapter: str | None, given: dict[str, Any], plugins: PluginManager) -> Adapter:
    """Return the four roles, as they were passed or as an adapter finds them in the trainer."""
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


def _begin(
    session: Session,
    folder: str | os.PathLike[str] | None,
    settings: dict[str, Any],
    state: Mapping[str, Any] | None,
    log: str | os.PathLike[str] | None,
) -> None:
    """Open or create the path, continue where the run stands, and install the hooks."""
    if distributed.is_main_process():
        session.log = session.plugins.add_run_log(log, folder)
    where = None if folder is None else str(Path(folder).absolute())
    resumed = state is not None
    distributed.agree({"path": where, **settings, "schedule": repr(session.schedule), "resumes": resumed})
    if state is not None:
        state = session.validate_form(state)
    try:
        _open(session, folder, settings, state)
    except PluginError:  # of a plug-in that was called when backtracking began
        if session.scheduler is not None:
            session.scheduler.restore_teacher()
        raise
    if session.path is not None and session.scheduler is not None and not resumed and distributed.is_main_process():
        if session.schedule.until_fitted:
            roles.warn_of_other_rate(session.path, session.fake_score, session.fake_score_optimizers)
        session.warning = _earlier_run(session, session.path)
    _begin_log(session, settings, resumed)
    if session.scheduler is not None:
        logger.info("%r", session)
    session.hooks.install()


def _open(
    session: Session,
    folder: str | os.PathLike[str] | None,
    settings: dict[str, Any],
    state: Mapping[str, Any] | None,
) -> None:
    record, *others = settings.values()
    if record == 0 and not isinstance(record, bool):
        if folder is not None and DegradationPath.exists(folder):
            raise OptionError(
                f"record=0 and a path in {folder}",
                expected="one or the other",
                cure="pass path=None for a run without DisBack, or omit record=: a finished path is reused",
            )
        session.begin_backtracking()
        if state is not None:
            session.load(state, session.validate(state))
    elif folder is None or not str(folder):
        raise OptionError("no path=", expected="a folder for the nodes", cure="pass path=..., or record=0 for none")
    elif state is not None:
        _open_at(session, folder, state)
    else:
        plan, generator = Recording(record, *others), _fingerprint_of(session.generator_optimizers)
        path = open_or_create(folder, session.teacher, plan, generator=generator, validate=session.schedule.validate)
        roles.warn_of_other_weights(session.teacher, session.fake_score, path)
        session.open(path)


def _open_at(session: Session, folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Continue from a state, on the path in a folder as it is."""

    def prepare() -> Manifest:
        path = DegradationPath(folder)
        path.remove_leftovers()
        path.verify()
        return path.manifest

    path = session.path = DegradationPath(folder, distributed.on_main_process(prepare))
    progress = session.validate(state)
    if not path.manifest.recording.keep_teacher:
        path.verify_teacher(session.teacher.full_state())
    distributed.on_every_rank(lambda: session.teacher.write(path.source(0)), "read node 0")
    session.load(state, progress)


def _fingerprint_of(generator_optimizers: list[Optimizer]) -> str:
    """Return the fingerprint of the weights that the optimizers step. Collective if they are sharded."""
    weights = optimizers.parameters(generator_optimizers)
    state = FullState({str(index): weight for index, weight in enumerate(weights)})
    return distributed.on_main_process(lambda: fingerprint(state), state) if state.sharded else fingerprint(state)


def _earlier_run(session: Session, path: DegradationPath) -> str:
    """Return a warning if the log knows a run that backtracked on this very path; else an empty text."""
    if session.log is None or not session.log.file.is_file():
        return ""
    from disback_plugin.plugins.log_reader import read

    try:
        history = read(session.log.file)
    except PathError:  # the file is no log
        return ""
    if not history.updates or not history.begun or history.begun[-1].get("path") != path.identity:
        return ""
    return (
        f"{session.log.file} has a run on this path that came to generator update {history.updates} at least, and here "
        "one begins. If the trainer continues that run, load its state: handle.load_state_dict(state)"
    )


def _begin_log(session: Session, settings: dict[str, Any], resumed: bool) -> None:
    if session.log is None:
        return
    recorded = None if session.recorder is None else session.progress.recorded
    steppers = {"generator": session.generator_optimizers, "fake score": session.fake_score_optimizers}
    session.log.begin(
        "attach",
        update=session.progress.generator_updates,
        recording=recorded,
        resumed=resumed or bool(recorded),
        **({} if session.path is None else session.path.log_fields()),
        settings={"schedule": repr(session.schedule), **settings},
        **roles.describe_roles((session.teacher, session.fake_score), steppers),
    )

"""`attach`: both stages on a live training loop that nobody edits."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from disback_plugin import distributed
from disback_plugin.errors import OptionError, PathError
from disback_plugin.handle import Handle
from disback_plugin.loop.lr_schedulers import Restorable
from disback_plugin.loop.optimizers import parameters
from disback_plugin.loop.roles import describe_roles, same_weights, warn_of_other_rate
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.plugins.hookspecs import Adapter
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.progress import validate_form
from disback_plugin.recorder import open_or_create
from disback_plugin.schedules import Schedule, parse
from disback_plugin.session import Session
from disback_plugin.weights.network import Network
from disback_plugin.weights.sharding import FullState

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
    sample: Callable[[], Tensor] | None = None,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
    path: str | os.PathLike[str] | None = None,
    record: int = Recording.iterations,
    every: int = Recording.every,
    codec: str = Recording.codec,
    keep_teacher: bool = Recording.keep_teacher,
    schedule: Schedule | str = "auto",
    state: Mapping[str, Any] | None = None,
    plugins: PluginManager | Sequence[object] = (),
    restore: Restorable = "schedulers",
    log: str | os.PathLike[str] | None = None,
    evaluate: Callable[[], Mapping[str, Any] | None] | None = None,
    evaluate_every: int = 1_000,
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
            The fake score's own network, if that is the base of its LoRA: then it is the teacher with adapters off.
        fake_score: s_phi, of the teacher's architecture, or a LoRA of peft on an equal base. It is set to the teacher
            (new path), the last node so far (unfinished path) or s'_N (finished path). Modules that the teacher lacks
            are left alone.
            Experts by noise level are mappings from names to networks: they share one path and one position, and a step
            of any of them is an update.
        generator_optimizer: All optimizers of the generator: one or several, plain or accelerate's. Those that step its
            weights later are followed.
        fake_score_optimizer: All optimizers of s_phi. They may step more, as a discriminator; one that also steps the
            generator is passed for both.
        sample: Returns samples x_0 of the student, shape (B, ...), without gradient. Needed, with `loss`, where teacher
            and fake score differ in architecture: a LoRA beside the teacher is fitted to x_0, once in each fake-score
            update, while these warm the fake score up. On a finished path only the fake score is warmed up.
        loss: Takes the teacher and x_0 and returns the denoising loss, shape ().
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
        state: The result of `Handle.state_dict` at the moment whose checkpoint the trainer has loaded. The path is then
            used as it is, s_phi is not written, and the teacher is, whatever it holds.
        plugins: Plug-ins that take part in the run beside the installed ones: names of installed ones that have to
            work, "no:NAME" to exclude one, and plug-ins themselves.
        restore: Objects that a recording advances although the generator stands still, to be restored at its end:
            "schedulers" for the learning-rate schedulers of both optimizers, which are found by themselves; objects
            with `state_dict` and `load_state_dict` of plain numbers, as the ramp of an average; or several:
            ("schedulers", ramp). () restores nothing: warm-ups are then over before the generator moves.
        log: File of the run's log, which `disback report` reads and `Handle.log` adds to; lines are appended. None:
            beside the path, as "PATH.log.jsonl", and none without a path. `plugins=("no:run_log",)` disables it. With
            record=0, a file is also how to ask whether the fake score follows the student: its gradients' agreement is
            logged, and a run that stalls or diverges is warned of, as while backtracking.
        evaluate: Measures the student and returns numbers and pictures by name, which are logged as by `Handle.log`;
            None logs nothing. It is called before the student's first update, not while recording, and then every
            `evaluate_every` updates: after the step, with the original teacher in place and without gradient; the
            global random states are restored. What else it changes, as a network's mode, it changes back. What it
            raises ends the run. On several ranks all call it, and what rank 0 returns is logged.
        evaluate_every: Generator updates between two evaluations, >= 1.

    Returns:
        The handle: keep it, for its `detach()`. As a context manager it detaches at the end of its block.

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
    names = ("teacher", "fake_score", "generator_optimizer", "fake_score_optimizer")
    given = dict(zip(names, (teacher, fake_score, generator_optimizer, fake_score_optimizer), strict=True))

    def build() -> tuple[Session, Recording | None]:
        if state is not None:
            validate_form(state)
        manager = PluginManager.of(plugins)
        found = _find_roles(trainer, adapter, given, manager)
        found = replace(found, sample=sample or found.sample, loss=loss or found.loss)
        plan = _plan_recording(path, record, every, codec, keep_teacher)
        options: dict[str, Any] = {"folder": None if plan is None else path, "monitors": log is not None}
        options |= {"evaluate": evaluate, "evaluate_every": evaluate_every}
        return Session(found, parse(schedule), plugins=manager, restore=restore, **options), plan

    session, plan = distributed.on_every_rank(build, "have its roles")
    folder = None if path is None else Path(path).absolute()
    settings = {"record": record, "every": every, "codec": codec, "keep_teacher": keep_teacher}
    settings |= {"schedule": repr(session.schedule)} | ({} if evaluate is None else {"evaluate_every": evaluate_every})
    resumes = state is not None
    distributed.agree({"path": str(folder), "resumes": resumes, **settings})
    if distributed.is_main_process():
        session.log = session.plugins.add_run_log(log, folder)
    try:
        if plan is not None and folder is not None:
            session.path = _open(session, folder, plan, resumes=resumes)
        return _begin(session, state, settings)
    except BaseException:
        if session.hooks.installed:
            session.detach(failed=True)
        elif session.scheduler is not None:
            session.scheduler.restore_teacher()
        if session.path is not None:
            session.path.lock.release()
        raise


def _begin(session: Session, state: Mapping[str, Any] | None, settings: dict[str, Any]) -> Handle:
    """Start, or continue from a state; write the line of the log with which a process begins, and install the hooks."""
    handle = Handle(session)
    if state is None:
        session.begin()
    else:
        handle.load_state_dict(state)
    if session.log is not None:
        session.log.begin(
            "attach",
            update=session.progress.generator_updates,
            recording=session.recorded,
            resumed=state is not None or bool(session.recorded),
            **({} if session.path is None else session.path.log_fields()),
            settings=settings,
            roles=describe_roles(*session.roles),
        )
    if session.scheduler is not None:
        logger.info("%r", session)
    session.install()
    return handle


def _find_roles(trainer: object, adapter: str | None, given: dict[str, Any], plugins: PluginManager) -> Adapter:
    """Return the four roles, as they were passed or as an adapter finds them in the trainer."""
    named = [name for name, value in given.items() if value is not None]
    if trainer is None and adapter is None and len(named) == len(given):
        return Adapter(**given)
    if trainer is not None and not named:
        return trainer if isinstance(trainer, Adapter) else plugins.find_adapter(trainer, adapter)
    raise OptionError(
        f"attach({', '.join(['trainer'] * (trainer is not None) + ['adapter'] * (adapter is not None) + named)})",
        expected=f"a trainer and perhaps its adapter's name, or {', '.join(given)}",
        cure="pass one or the other, completely",
    )


def _plan_recording(folder: str | os.PathLike[str] | None, record: int, *others: Any) -> Recording | None:
    """Return the plan of the recording, or None for a run without a path."""
    if record != 0 or isinstance(record, bool):
        if folder is None or not str(folder):
            raise OptionError("no path=", expected="a folder for the nodes", cure="pass path=..., or record=0 for none")
        return Recording(record, *others)
    if folder is not None and DegradationPath.exists(folder):
        raise OptionError(
            f"record=0 and a path in {folder}",
            expected="one or the other",
            cure="pass path=None for a run without DisBack, or omit record=: a finished path is reused",
        )
    return None


def _open(session: Session, folder: Path, plan: Recording, *, resumes: bool) -> DegradationPath:
    """Return the path in a folder, or begin one; warn of what may be wrong with a run that begins without a state."""
    student = None
    if not resumes:
        weights = enumerate(parameters(session.generator_optimizers))
        student = FullState({str(index): weight for index, weight in weights}).fingerprint()
    validate = session.schedule.validate
    path = open_or_create(folder, session.teacher, plan, generator=student, validate=validate, resumes=resumes)
    if not resumes:
        _warn(session, path)
    return path


def _warn(session: Session, path: DegradationPath) -> None:
    """Warn if a run without a state seems to be a resumed one, or the path's learning rate differs. Collective."""
    if session.separate:
        return
    known = {checksum for node in path.nodes for checksum in (node.checksum, node.recorded)}
    # A LoRA adapter begins at random, without effect.
    expected = session.fake_score.lora_adapter is not None or (known and session.fake_score.checksum() in known)
    other = not expected and not same_weights(session.teacher, session.fake_score)
    if not distributed.is_main_process():
        return
    if other:
        logger.warning(
            "the fake score holds other weights than the teacher, and begins at node %d of the path. If this goes on "
            "with an earlier run, load its checkpoint (disback run), or pass its handle.state_dict(): "
            "attach(..., state=state)",
            len(path) - 1,
        )
    if path.complete and session.schedule.until_fitted:
        warn_of_other_rate(path.manifest, session.fake_score, session.fake_score_optimizers)
    if path.complete and session.log is not None and os.path.isfile(session.log.file):
        from disback_plugin.plugins.log_reader import read

        with suppress(PathError):  # the file is no log
            history = read(session.log.file)
            if history.updates and history.begun and history.begun[-1].get("path") == path.identity:
                session.warning = (
                    f"{session.log.file} has a run on this path that came to generator update {history.updates} at "
                    "least, and here one begins. If the trainer continues that run, load its state: "
                    "handle.load_state_dict(state)"
                )

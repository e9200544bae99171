"""Algorithm 1, degradation recording: fit s' to samples of the initial generator, saving nodes s'_i (Sec. 4.2).

s' starts as the teacher and minimises Eq. 7, the loss that trains the fake score. With the generator standing still the
trainer's own fake-score step is Algorithm 1, and it ends where Algorithm 2 starts: s_phi = s'_N.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from tqdm import tqdm

from disback_plugin import distributed
from disback_plugin.errors import OptionError, TrainingError
from disback_plugin.loop.lr_schedulers import RestorableObjects
from disback_plugin.loop.optimizers import groups_of, has_gradients, parameters, skipped_by_scaler
from disback_plugin.loop.roles import check_memory, check_networks, networks_of
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.progress import Progress
from disback_plugin.recorder import Recorder, open_or_create
from disback_plugin.teacher_fit import Fit, Loss, Sample, private_random_stream
from disback_plugin.weights.modules import copy_of_module
from disback_plugin.weights.network import Network, ScoreNetwork

# This many steps in a row without an update are a broken loop, not a slow start: a GradScaler that starts at 2^16 skips
# at most about 20.
PATIENCE = 100


def record(
    teacher: Network,
    fake_score: Network | None = None,
    fake_step: Callable[[], object] | None = None,
    *,
    path: str | os.PathLike[str],
    iterations: int = Recording.iterations,
    every: int = Recording.every,
    codec: str = Recording.codec,
    keep_teacher: bool = Recording.keep_teacher,
    sample: Sample | None = None,
    loss: Loss | None = None,
    learning_rate: float = 1e-5,
    seed: int = 0,
    plugins: PluginManager | Sequence[object] = (),
    log: str | os.PathLike[str] | None = None,
) -> DegradationPath:
    """Run Algorithm 1. A finished path in the folder is reused, an unfinished one resumed, anything else refused.

    Either the trainer's own fake score is fitted (`fake_score`, `fake_step`; it ends as s'_N), or a copy of the teacher
    (`sample`, `loss`), for trainers whose fake score has another architecture or cannot be reached.

    Args:
        teacher: The teacher s_theta. Never changed.
        fake_score: s_phi, of the teacher's architecture. It is set to the teacher (or to the last node of an unfinished
            path), trained by `fake_step`, and left at s'_N. The learning-rate schedulers of its optimizer are restored.
        fake_step: Does one update of s_phi on samples of the initial generator, optimizer step included. If it returns
            the loss, a tensor of one element, the loss is logged.
        path: Folder for the nodes.
        iterations: Updates of s' in all, >= 1; 200 in the paper.
        every: Updates between two nodes, >= 1; 50 in the paper. The last node is saved after the last update.
        codec: Format of the nodes: "int8" (a quarter of float32, with an error of a thousandth) or "exact".
        keep_teacher: Whether the path holds node 0. If not, it can be used only with the same teacher, bit for bit.
        sample: Returns a batch of samples x_0 of the initial generator, shape (B, ...), without gradient. To let a
            recording resume bit for bit, it draws from the global random stream and keeps no state of its own.
        loss: Takes the network and x_0 and returns the denoising loss, shape (); it draws likewise.
        learning_rate: Learning rate of Adam for the copy, > 0; 1e-5 in the paper (B.2). `schedule="auto"` takes the
            length of backtracking from the recording: for "auto", pass the rate of the fake score in training.
        seed: Seed of the random numbers that `sample` and `loss` draw. The global random state is the same before and
            after.
        plugins: Plug-ins to call beside the installed ones: names, "no:NAME" to exclude one, or objects.
        log: File of the run's log; None: beside the path, as "PATH.log.jsonl".

    Returns:
        The complete path.

    Raises:
        OptionError: If neither pair of functions, or a mixture, was given, or a count is out of its domain.
        PathError: If the folder holds something else.
        TrainingError: If `fake_step` does not change s_phi.
        PluginError: If a plug-in that was asked for is broken.

    Example:
        >>> import tempfile
        >>> teacher, generator = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> def sample() -> Tensor:
        ...     return generator(torch.randn(8, 2)).detach()
        >>> def denoise(net: nn.Module, x_0: Tensor) -> Tensor:
        ...     return (net(x_0 + torch.randn_like(x_0)) - x_0).square().mean()
        >>> len(record(teacher, sample=sample, loss=denoise, path=tempfile.mkdtemp(), iterations=4, every=2))
        3
    """
    target, manager = ScoreNetwork.of(teacher, role="teacher"), PluginManager.of(plugins)
    plan = Recording(iterations, every, codec, keep_teacher)
    pairs = {"fake_score": fake_score, "fake_step": fake_step, "sample": sample, "loss": loss}
    given = [name for name, value in pairs.items() if value is not None]
    if given not in (["fake_score", "fake_step"], ["sample", "loss"]):
        raise OptionError(
            f"record(teacher, {', '.join(given)})",
            expected="fake_score and fake_step, or sample and loss",
            cure="pass one of the two pairs",
        )
    if fake_score is not None and fake_step is not None:
        target, network = networks_of(target, fake_score)
        check_networks(target, network)
        check_memory(target, network)
        opened = open_or_create(path, target, plan)
        with opened.lock:
            recorder = Recorder(opened, network, Progress(), plugins=manager)
            recorder.start()
            if not opened.complete:
                _begin_log(recorder, manager, log, asdict(plan))
                _fit(recorder, fake_step)
        return opened
    finished = DegradationPath.exists(path) and DegradationPath(path).complete
    # The copy is made before anything is written.
    copied = None if finished or sample is None or loss is None else _fit_of_copy(target, sample, loss, learning_rate)
    opened = open_or_create(path, target, plan)
    if opened.complete or copied is None:
        return opened
    with opened.lock:
        recorder = Recorder(opened, copied.network, Progress(), training=copied.state, plugins=manager)
        saved = opened.training_state()
        if saved is None:
            recorder.start()
        if opened.manifest.fitted is None:  # else the rate at which s' was fitted is known
            opened.update_manifest(learning_rate=float(learning_rate))
        _begin_log(recorder, manager, log, asdict(plan) | {"learning_rate": learning_rate, "seed": seed})
        with private_random_stream(seed), torch.enable_grad():
            if saved is not None:
                copied.load_state(saved)
                recorder.load_fit(saved["fit"])
            _fit(recorder, copied.step)
    return opened


def _begin_log(
    recorder: Recorder, plugins: PluginManager, file: str | os.PathLike[str] | None, settings: dict[str, Any]
) -> None:
    """Begin the log, now that nothing can be refused any more."""
    path, recorded = recorder.path, recorder.progress.recorded
    log = plugins.add_run_log(file, path.folder) if distributed.is_main_process() else None
    if log is not None:
        log.begin("record", recording=recorded, resumed=recorded > 0, **path.log_fields(), settings=settings)


def _fit(recorder: Recorder, step: Callable[[], object]) -> None:
    """Update the network until node N is saved, with a progress bar."""
    total, recorded = recorder.path.manifest.iterations, recorder.progress.recorded
    with _observed(recorder), tqdm(desc="recording", total=total, initial=recorded, disable=None) as bar:
        while not recorder.done:
            recorder.update(_one_update(recorder, step))
            bar.update()


@contextmanager
def _observed(recorder: Recorder) -> Iterator[None]:
    """Observe the gradients of each update, whichever optimizer makes it, before its caller may clear them.

    The learning-rate schedulers of these optimizers are restored at the end.
    """
    weights = [tensor for _, tensor in recorder.network.named_tensors()]
    steppers: dict[Optimizer, RestorableObjects] = {}

    def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if optimizer not in steppers and groups_of(optimizer, weights):
            steppers[optimizer] = RestorableObjects("schedulers", [optimizer])
            steppers[optimizer].capture(optimizer)

    def after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if optimizer in steppers and has_gradients(parameters([optimizer])) and not skipped_by_scaler(optimizer):
            recorder.observe_gradients()

    hooks = register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for objects in steppers.values():
            objects.restore()


def _one_update(recorder: Recorder, fake_step: Callable[[], object]) -> object:
    """Call `fake_step` until it has updated the network, and return its result; a GradScaler may skip some steps.

    Raises:
        TrainingError: If the network is not updated.
    """
    # Of parameters only: a forward writes running statistics.
    weights = [tensor for _, tensor in recorder.network.named_tensors() if isinstance(tensor, nn.Parameter)]
    versions = [weight._version for weight in weights]
    for _ in range(PATIENCE + 1):
        returned = fake_step()
        # Only the version shows an update without a torch optimizer; only the hook shows one through `.data`.
        if recorder.gradients_seen or versions != [weight._version for weight in weights]:
            return returned
    raise TrainingError(
        f"{PATIENCE + 1} calls of fake_step() in a row that did not write to the fake score",
        expected="one optimizer step of the fake score's parameters a call",
        cure="pass the very module that fake_step trains, and call optimizer.step() in it",
    )


def _fit_of_copy(teacher: ScoreNetwork, sample: Sample, loss: Loss, learning_rate: float) -> Fit:
    """Return the fit of a copy of the teacher; raises OptionError if the teacher cannot be copied."""
    module, *others = teacher.modules().values()
    kind = "that is a LoRA adapter" if teacher.lora_adapter else "that is sharded" if teacher.sharded else ""
    if kind or others:
        raise OptionError(
            f"a teacher {kind or 'of several experts'}, with sample and loss, which train a copy of it",
            expected="one module that can be copied",
            cure="use fake_score and fake_step, or record before sharding, or each expert on its own",
        )
    try:
        copied = copy_of_module(module).requires_grad_(True)
    except Exception as error:
        found = f"a teacher that cannot be copied ({type(error).__name__}: {error})"
        raise OptionError(found, expected="one that can", cure="use fake_score and fake_step") from error
    network = ScoreNetwork(copied, role="recorded copy")
    return Fit(network, copied, sample, loss, learning_rate, dict(copied.named_buffers()))

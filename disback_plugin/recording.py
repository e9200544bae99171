"""Algorithm 1, degradation recording: fit s' to samples of the initial generator, saving nodes s'_i (Sec. 4.2).

s' starts as the teacher and minimises Eq. 7, the very loss that trains the fake score. With the generator standing
still the trainer's own fake-score step *is* Algorithm 1, and it ends where Algorithm 2 starts: s_phi = s'_N.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from disback_plugin import distributed, training_state
from disback_plugin.errors import OptionError, TrainingError
from disback_plugin.loop import optimizers
from disback_plugin.loop.lr_schedulers import rewound
from disback_plugin.loop.roles import check_apart
from disback_plugin.opening import open_or_create
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.recorder import Recorder
from disback_plugin.snapshot import copy_of, private_stream
from disback_plugin.weights.network import Network, ScoreNetwork

__all__ = ["PATIENCE", "record", "updated"]

# So many steps in a row without an update are a broken loop, not a slow start: a GradScaler that starts at 2^16 skips
# at most about 20, and no public trainer updates the generator more often than the fake score.
PATIENCE = 100


def record(
    teacher: Network,
    fake_score: Network | None = None,
    fake_step: Callable[[], object] | None = None,
    *,
    path: str | os.PathLike[str],
    iterations: int = 200,
    every: int = 50,
    codec: str = "int8",
    keep_teacher: bool = True,
    sample: Callable[[], Tensor] | None = None,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
    learning_rate: float = 1e-5,
    seed: int = 0,
    plugins: PluginManager | Sequence[object] = (),
    log: str | os.PathLike[str] | None = None,
) -> DegradationPath:
    """Algorithm 1. A finished path in the folder is reused, an unfinished one resumed, anything else refused.

    Either the trainer's own fake score does the work (`fake_score`, `fake_step`; it ends as s'_N), or a copy of the
    teacher is trained here (`sample`, `loss`), for trainers whose fake score has another architecture or is out of
    reach.

    Args:
        teacher: The teacher s_theta. Never changed.
        fake_score: s_phi, of the teacher's architecture. It is set to the teacher (or to the last node of an unfinished
            path), trained by `fake_step`, and left at s'_N. Learning-rate schedulers of whoever steps it are put back.
        fake_step: Does one update of s_phi on samples of the initial generator, optimizer step included. If it returns
            the loss, a tensor of one element, that is logged.
        path: Folder for the nodes.
        iterations: Updates of s' in all, >= 1; 200 in the paper.
        every: Updates between two nodes, >= 1; 50 in the paper. The last node is saved after the last update.
        codec: How nodes are stored: "int8" (a quarter of float32, an error of a thousandth) or "exact" (a plain
            safetensors state dict).
        keep_teacher: Whether the path holds node 0. If not, it needs the teacher itself, bit for bit, to be used.
        sample: Returns a batch of samples x_0 of the initial generator, shape (B, ...), without gradient. It draws from
            the global random stream and keeps no state of its own, or a recording does not resume bit for bit.
        loss: Takes the network and x_0 and returns the denoising loss, shape (); likewise.
        learning_rate: Of Adam in the standalone form, > 0; 1e-5 in the paper (B.2). `schedule="auto"` takes the length
            of its walk from the recording: for that pass the rate of the fake score in the training to come.
        seed: Of the random numbers that `sample` and `loss` draw in the standalone form. They draw from a stream of
            their own: the global random state is the same before and after.
        plugins: Who hears of the nodes: names of installed plug-ins, "no:NAME" for those that shall not, and plug-ins
            themselves (`hooks`).
        log: File of the run's log (`runlog`); None: beside the path, as "PATH.log.jsonl".

    Returns:
        The complete path.

    Raises:
        OptionError: If neither form, or a mixture of both, was given, or a count is out of its domain.
        PathError: If the folder holds something else.
        TrainingError: If `fake_step` does not move s_phi.
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
    target = ScoreNetwork.of(teacher, role="teacher")
    folder, plan = Path(path), Recording(iterations, every, codec, keep_teacher)
    listening = PluginManager.of(plugins)
    settings = {"iterations": iterations, "every": every, "codec": codec, "keep_teacher": keep_teacher}

    def begin_log(recorder: Recorder, **more: Any) -> None:
        """Begin the log, now that nothing is refused any more."""
        kept = listening.add_run_log(log, folder) if distributed.is_main_process() else None
        if kept is not None:
            at = recorder.iteration
            kept.begin("record", recording=at, resumed=at > 0, **recorder.path.log_fields(), settings=settings | more)

    if fake_score is not None and fake_step is not None and sample is None and loss is None:
        network = ScoreNetwork.of(fake_score, role="fake score")
        check_apart(target, network)
        opened = open_or_create(folder, target, plan)
        return _record_in_loop(opened, network, fake_step, listening, begin_log)
    if fake_score is None and fake_step is None and sample is not None and loss is not None:
        opened = open_or_create(folder, target, plan)
        return _record_copy(opened, target, sample, loss, learning_rate, seed, listening, begin_log)
    given = [
        name
        for name, value in {"fake_score": fake_score, "fake_step": fake_step, "sample": sample, "loss": loss}.items()
        if value is not None
    ]
    raise OptionError(
        f"record(teacher, {', '.join(given)})",
        expected="fake_score and fake_step, or sample and loss",
        cure="pass one of the two pairs",
    )


def _record_in_loop(
    path: DegradationPath,
    network: ScoreNetwork,
    step: Callable[[], object],
    plugins: PluginManager,
    begin_log: Callable[..., None],
) -> DegradationPath:
    if path.complete:
        distributed.on_every_rank(lambda: network.write(path.source(len(path) - 1)), "read the last node")
        return path
    recorder = Recorder(path, network, plugins=plugins)
    recorder.start()
    begin_log(recorder)
    weights = (tensor for _, tensor in network.named_tensors())
    with rewound(weights), _progress(recorder) as bar:
        while not recorder.done:
            recorder.update(updated(recorder, step))
            bar.update()
    return path


def updated(recorder: Recorder, step: Callable[[], object]) -> object:
    """Call `step` until it has updated the network, and return what it returned; a GradScaler may skip some.

    The gradients are looked at when its optimizer has stepped: `step` may clear them before it returns.

    Raises:
        TrainingError: If it goes on without.
    """
    network = recorder.network
    before = _versions(network)
    with optimizers.watched((tensor for _, tensor in network.named_tensors()), recorder.look):
        for _ in range(PATIENCE + 1):
            returned = step()
            # Of an optimizer that writes `.data` no version tells; of a loop without an optimizer, no step.
            if recorder.looked or _versions(network) != before:
                return returned
    raise TrainingError(
        f"{PATIENCE + 1} calls of fake_step() in a row that did not write to the fake score",
        expected="one optimizer step of the fake score's parameters a call",
        cure="pass the very module that fake_step trains, and call optimizer.step() in it",
    )


def _record_copy(
    path: DegradationPath,
    teacher: ScoreNetwork,
    sample: Callable[[], Tensor],
    loss: Callable[[nn.Module, Tensor], Tensor],
    learning_rate: float,
    seed: int,
    plugins: PluginManager,
    begin_log: Callable[..., None],
) -> DegradationPath:
    if path.complete:
        return path
    student_score = copy_of(teacher)
    optimizer = torch.optim.Adam(student_score.parameters(), lr=learning_rate)
    network = ScoreNetwork(student_score, role="recorded copy")

    def capture() -> dict[str, Tensor]:
        return training_state.capture(network, optimizer) | {"fit": recorder.fit.to_tensor()}

    recorder = Recorder(path, network, training=capture, plugins=plugins)
    saved = path.training_state()
    if saved is None:
        recorder.start()
    if path.manifest.fitted is None:  # else it is known at which rate
        path.update_manifest(learning_rate=float(learning_rate))
    begin_log(recorder, learning_rate=learning_rate, seed=seed)
    with private_stream(seed), _progress(recorder) as bar, torch.enable_grad():
        if saved is not None:  # go on as if nothing had happened: weights, moments and random numbers
            training_state.restore(saved, network, optimizer)
            recorder.resume(saved["fit"])
        while not recorder.done:
            optimizer.zero_grad()
            value = loss(student_score, sample())
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            recorder.update(value)
            bar.update()
    return path


def _progress(recorder: Recorder) -> tqdm[NoReturn]:
    total = recorder.path.manifest.iterations
    return tqdm(desc="recording", total=total, initial=recorder.iteration, disable=None)


def _versions(network: ScoreNetwork) -> int:
    # Parameters only: running statistics are written by a mere forward.
    parameters = [t for _, t in network.named_tensors() if isinstance(t, nn.Parameter)]
    return sum(parameter._version for parameter in parameters)

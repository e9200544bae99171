"""Algorithm 1, degradation recording: fit s' to samples of the initial generator, saving nodes s'_i (Sec. 4.2).

s' starts as the teacher and minimises Eq. 7, the loss that trains the fake score. With the generator standing still the
trainer's own fake-score step is Algorithm 1, and it ends where Algorithm 2 starts: s_phi = s'_N.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from disback_plugin import distributed
from disback_plugin.errors import OptionError, TrainingError
from disback_plugin.loop.lr_schedulers import restored
from disback_plugin.loop.optimizer_hooks import after_updates
from disback_plugin.loop.roles import check_networks
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.progress import Progress
from disback_plugin.recorder import PATIENCE, Recorder, open_or_create
from disback_plugin.weights.network import Network, ScoreNetwork

__all__ = ["record"]


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
    sample: Callable[[], Tensor] | None = None,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
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
    target = ScoreNetwork.of(teacher, role="teacher")
    folder, plan = Path(path), Recording(iterations, every, codec, keep_teacher)
    manager = PluginManager.of(plugins)
    settings = {"iterations": iterations, "every": every, "codec": codec, "keep_teacher": keep_teacher}

    def begin_log(recorder: Recorder, **more: Any) -> None:
        """Begin the log, now that nothing can be refused any more."""
        kept = manager.add_run_log(log, folder) if distributed.is_main_process() else None
        if kept is not None:
            recorded = recorder.progress.recorded
            about = recorder.path.log_fields() | {"settings": settings | more}
            kept.begin("record", recording=recorded, resumed=recorded > 0, **about)

    if fake_score is not None and fake_step is not None and sample is None and loss is None:
        network = ScoreNetwork.of(fake_score, role="fake score")
        check_networks(target, network)
        opened = open_or_create(folder, target, plan)
        _record_fake_score(opened, network, fake_step, manager, begin_log)
    elif fake_score is None and fake_step is None and sample is not None and loss is not None:
        opened = open_or_create(folder, target, plan)
        if not opened.complete:
            _record_copy(opened, target, sample, loss, learning_rate, seed, manager, begin_log)
    else:
        functions = {"fake_score": fake_score, "fake_step": fake_step, "sample": sample, "loss": loss}
        raise OptionError(
            f"record(teacher, {', '.join(name for name, value in functions.items() if value is not None)})",
            expected="fake_score and fake_step, or sample and loss",
            cure="pass one of the two pairs",
        )
    return opened


def _record_fake_score(
    path: DegradationPath,
    network: ScoreNetwork,
    fake_step: Callable[[], object],
    plugins: PluginManager,
    begin_log: Callable[..., None],
) -> None:
    if path.complete:
        distributed.on_every_rank(lambda: network.write(path.source(len(path) - 1)), "read the last node")
        return
    recorder = Recorder(path, network, Progress(), plugins=plugins)
    recorder.start()
    begin_log(recorder)
    with restored(tensor for _, tensor in network.named_tensors()), _progress_bar(recorder) as bar:
        while not recorder.done:
            recorder.update(_one_update(recorder, fake_step))
            bar.update()


def _one_update(recorder: Recorder, fake_step: Callable[[], object]) -> object:
    """Call `fake_step` until it has updated the network, and return its result; a GradScaler may skip some steps.

    Raises:
        TrainingError: If the network is not updated.
    """
    weights = [tensor for _, tensor in recorder.network.named_tensors()]
    # Of parameters only: a forward writes running statistics.
    versions = [weight._version for weight in weights if isinstance(weight, nn.Parameter)]
    with after_updates(weights, recorder.observe_gradients):  # fake_step may clear the gradients
        for _ in range(PATIENCE + 1):
            returned = fake_step()
            # Only the version shows an update without a torch optimizer; only the hook shows one through `.data`.
            if recorder.gradients_seen or versions != [w._version for w in weights if isinstance(w, nn.Parameter)]:
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
) -> None:
    copied = _trainable_copy(teacher)
    optimizer = torch.optim.Adam(copied.parameters(), lr=learning_rate)
    network = ScoreNetwork(copied, role="recorded copy")

    def training() -> dict[str, Tensor]:
        return _capture(network, optimizer) | {"fit": recorder.fit.to_tensor()}

    recorder = Recorder(path, network, Progress(), training=training, plugins=plugins)
    saved = path.training_state()
    if saved is None:
        recorder.start()
    if path.manifest.fitted is None:  # else the rate at which s' was fitted is known
        path.update_manifest(learning_rate=float(learning_rate))
    begin_log(recorder, learning_rate=learning_rate, seed=seed)
    with private_random_stream(seed), _progress_bar(recorder) as bar, torch.enable_grad():
        if saved is not None:
            _restore(saved, network, optimizer)
            recorder.load_fit(saved["fit"])
        while not recorder.done:
            optimizer.zero_grad()
            value = loss(copied, sample())
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            recorder.update(value)
            bar.update()


def _progress_bar(recorder: Recorder) -> tqdm[NoReturn]:
    total = recorder.path.manifest.iterations
    return tqdm(desc="recording", total=total, initial=recorder.progress.recorded, disable=None)


def _trainable_copy(teacher: ScoreNetwork) -> nn.Module:
    """Return a copy of the teacher's module that can be trained; raises OptionError if it cannot be copied."""
    module, *others = teacher.modules().values()
    what, needed, cure = "", "", ""
    if teacher.lora_adapter is not None:
        what, needed = "a teacher that is a LoRA adapter", "fake_score and fake_step"
        cure = "pass fake_score=ScoreNetwork(model, lora_adapter=...), and a fake_step that trains that adapter"
    elif teacher.sharded:
        what, needed = "a sharded teacher", "a module that can be copied"
        cure = "record before sharding, or use fake_score and fake_step"
    elif others:
        what, needed = f"a teacher of {1 + len(others)} experts", "one module"
        cure = "record each expert on its own, or use fake_score and fake_step"
    if what:
        raise OptionError(f"{what}, with sample and loss, which train a copy of it", expected=needed, cure=cure)
    return copy.deepcopy(module).requires_grad_(True)


@contextmanager
def private_random_stream(seed: int) -> Iterator[None]:
    """Seed the global random streams inside, and restore their states at the end.

    Example:
        >>> before = torch.get_rng_state()
        >>> with private_random_stream(0):
        ...     x = torch.randn(1)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if started else []):
        # Not torch.manual_seed: before the first use of CUDA its seed is remembered, and would stay.
        torch.default_generator.manual_seed(seed)
        if started:
            torch.cuda.manual_seed_all(seed)
        yield


# -- weights, moments and random streams, for a recording that resumes bit for bit ------------------------------------


def _capture(network: ScoreNetwork, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return copies of the weights, all buffers, Adam's moments and the random streams, on the CPU."""
    weights = {f"weights|{name}": tensor for name, tensor in network.state_dict().items()}
    buffers = {f"buffers|{name}": tensor for name, tensor in _buffers(network)}  # a state dict holds only some of them
    moments = {
        f"optimizer|{index}|{key}": tensor
        for index, entries in optimizer.state_dict()["state"].items()
        for key, tensor in entries.items()
    }
    streams = {"random|cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        streams |= {f"random|cuda|{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return {name: tensor.detach().cpu().clone() for name, tensor in (weights | buffers | moments | streams).items()}


def _restore(saved: Mapping[str, Tensor], network: ScoreNetwork, optimizer: Optimizer) -> None:
    """Restore the tensors that `_capture` returned; raises MismatchError before a write if they do not fit."""
    network.load_state_dict({name.partition("|")[2]: t for name, t in saved.items() if name.startswith("weights|")})
    with torch.no_grad():
        for name, buffer in _buffers(network):
            buffer.copy_(saved[f"buffers|{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        if name.startswith("optimizer|"):
            _, index, key = name.split("|")
            moments.setdefault(int(index), {})[key] = tensor.clone()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    torch.set_rng_state(saved["random|cpu"])
    for device, name in enumerate(name for name in saved if name.startswith("random|cuda|")):
        torch.cuda.set_rng_state(saved[name], device)


def _buffers(network: ScoreNetwork) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in network.modules().items():
        for name, buffer in module.named_buffers():
            yield prefix + name, buffer

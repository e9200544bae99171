"""Algorithm 1 without the trainer's fake score: a copy of the teacher, or a LoRA beside it, is fitted to samples.

Where teacher and fake score differ in size, `TeacherRecorder` does it in turns with the trainer's own fake-score
updates: each of these is an iteration, which warms the fake score up on the same initial generator while the LoRA is
fitted. On a finished path only the warm-up is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from disback_plugin import distributed
from disback_plugin.convergence import NOBODY
from disback_plugin.errors import OptionError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.progress import Progress
from disback_plugin.recorder import Recorder
from disback_plugin.weights.lora_teachers import AddedLora
from disback_plugin.weights.network import ScoreNetwork

Sample = Callable[[], Tensor]
Loss = Callable[[nn.Module, Tensor], Tensor]

LEARNING_RATE = 1e-4  # of Adam for the LoRA


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


class Fit:
    """Adam on the loss of samples, with a state from which it resumes bit for bit.

    Args:
        network: The weights that are fitted.
        module: The network that the loss runs.
        sample: As in `record`.
        loss: As in `record`.
        learning_rate: The learning rate.
        buffers: Further tensors that the forwards change.
    """

    def __init__(
        self,
        network: ScoreNetwork,
        module: nn.Module,
        sample: Sample,
        loss: Loss,
        learning_rate: float,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.network, self._module, self._sample, self._loss = network, module, sample, loss
        tensors = dict.fromkeys(tensor for _, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter))
        self._parameters, self._buffers = list(tensors), dict(buffers or {})
        self._optimizer = torch.optim.Adam(self._parameters, lr=learning_rate)

    def step(self) -> Tensor:
        """Do one update, with the gradient's mean over all ranks, and return the loss."""
        self._optimizer.zero_grad()
        loss = self._loss(self._module, self._sample())
        loss.backward(inputs=self._parameters)  # type: ignore[no-untyped-call]
        if distributed.is_distributed():
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
                gradient /= torch.distributed.get_world_size()
        self._optimizer.step()
        return loss

    def state(self) -> dict[str, Tensor]:
        """Return copies of the weights, all buffers, Adam's moments and the random streams, on the CPU."""
        tensors = {f"weights|{name}": tensor for name, tensor in self.network.state_dict().items()}
        # A state dict holds only the persistent buffers.
        tensors |= {f"buffers|{name}": buffer for name, buffer in self._buffers.items()}
        for index, entries in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer|{index}|{key}": tensor for key, tensor in entries.items()}
        tensors["random|cpu"] = torch.get_rng_state()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            tensors |= {f"random|cuda|{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from a `state`; raises MismatchError before any write if the weights do not fit."""
        weights = {name.partition("|")[2]: t for name, t in saved.items() if name.startswith("weights|")}
        self.network.load_state_dict(weights)
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                buffer.copy_(saved[f"buffers|{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved.items():
            if name.startswith("optimizer|"):
                _, index, key = name.split("|")
                moments.setdefault(int(index), {})[key] = tensor.clone()
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})
        torch.set_rng_state(saved["random|cpu"])
        for device, name in enumerate(name for name in saved if name.startswith("random|cuda|")):
            torch.cuda.set_rng_state(saved[name], device)


class TeacherRecorder(Recorder):
    """Counts the fake score's updates, and fits the LoRA beside the teacher once in each of them.

    Iterations that the path has already are only counted: the fake score catches up.

    Args:
        path: The path, finished or not.
        network: The teacher; of a finished path perhaps a whole one, which is not written here.
        progress: The run's progress.
        sample: As in `record`; None if the path is finished.
        loss: As in `record`; None likewise.
        until_fitted: As in `Recorder`.
        plugins: As in `Recorder`.
    """

    def __init__(
        self,
        path: DegradationPath,
        network: ScoreNetwork,
        progress: Progress,
        sample: Sample | None,
        loss: Loss | None,
        *,
        until_fitted: bool,
        plugins: PluginManager,
    ) -> None:
        super().__init__(path, network, progress, until_fitted=until_fitted, plugins=plugins)
        if not path.complete and (sample is None or loss is None):
            raise OptionError(
                "a teacher and a fake score of different architectures, and no finished path",
                expected="sample= and loss=, with which a LoRA on the teacher is fitted to the student's samples",
                cure="pass both, as disback.record takes them, or record first: disback.record(teacher, sample=..., "
                "loss=..., path=...)",
            )
        self._functions: tuple[Any, Any] = sample, loss
        self._fit: Fit | None = None
        progress.recorded = 0

    def start(self) -> None:
        """Write nothing yet: the teacher stays as it is until backtracking, and the fake score is the trainer's."""

    def load_fit(self, fit: Tensor | str) -> None:
        """Ignore the cosines of a saved state: the path has those of its last node."""

    def go_back(self, iteration: int) -> None:
        """Continue at an iteration, or at the last node if the LoRA's later updates are lost."""
        self.progress.recorded = min(iteration, self._last)

    @property
    def _last(self) -> int:
        return self.path.nodes[-1].iteration if self.path.nodes else 0

    def observe_gradients(self, idle: Set[int] = NOBODY) -> None:
        """Ignore the gradients of the fake score's update: `update` observes those of the LoRA."""

    def update(self, loss: object = None) -> None:
        """Count an update of the fake score; fit the LoRA too unless the path has this iteration. Collective."""
        iteration = self.progress.recorded + 1
        if self.done or iteration <= self._last:
            self.progress.recorded += not self.done
            return
        assert isinstance(self.network, AddedLora)
        group = torch.distributed if distributed.is_distributed() else None
        seed = iteration * group.get_world_size() + group.get_rank() if group else iteration
        with self.network.training() as module, torch.enable_grad(), private_random_stream(seed):
            if self._fit is None:
                self._fit = Fit(self.network, module, *self._functions, LEARNING_RATE)
                self._training = self._fit.state
                with private_random_stream(0):
                    self._resume(self._fit)
            loss = self._fit.step()
            super().observe_gradients()
            super().update(loss)

    def _resume(self, fit: Fit) -> None:
        """Continue with the LoRA of the last node."""
        saved = self.path.training_state()
        if saved is not None:
            fit.load_state(saved)
            super().load_fit(saved["fit"])
        elif self._last:
            self.network.load_state_dict(self.path[-1])

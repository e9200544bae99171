"""The next position, decoded in a thread while the trainer works; the move itself is then a copy at memory speed.

It takes the memory of one node on the host, pinned where the teacher is on a GPU. There is no stream of its own: the
copy writes into weights that the trainer's stream reads, and that stream's order is what keeps it safe.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from disback_plugin.weights.checksum import Checksum
from disback_plugin.weights.inplace_copy import Source, fill
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import Part
from disback_plugin.weights.tensor_meta import room

__all__ = ["Ahead", "Ready"]


@dataclass(frozen=True)
class Ready:
    """A decoded position: all weights that this process holds, on the host, and their checksum."""

    state: dict[str, Tensor]
    checksum: str


class Ahead:
    """Decodes one position ahead of time.

    Args:
        network: The network that will be written, for the kind of memory to use.

    Example:
        >>> from torch import nn
        >>> from disback_plugin.path.delta import NodeSource
        >>> net = nn.Linear(1, 1, bias=False)
        >>> ahead = Ahead(ScoreNetwork(net))
        >>> ahead.begin(2.0, NodeSource({"weight": torch.ones(1, 1)}))
        >>> ahead.write(ahead.take(2.0))
        >>> net.weight.item()
        1.0
    """

    def __init__(self, network: ScoreNetwork) -> None:
        self._network = network
        self._parts = network.parts() or {}
        self._device = network.witness().device
        self._on_gpu = self._device.type == "cuda"
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self._position: float | None = None
        self._thread: threading.Thread | None = None
        self._ready: Ready | None = None
        self._error: Exception | None = None
        self._copied: torch.cuda.Event | None = None

    def begin(self, position: float, source: Source) -> None:
        """Start to decode a position, unless it is the one at hand; what was there is forgotten."""
        if position == self._position:
            return
        self.forget()
        self._position = position
        # Not a daemon: the interpreter waits for it at its end, where a thread that goes on would abort the process.
        self._thread = threading.Thread(target=self._decode, args=(source,), name="disback-prefetch")
        self._thread.start()

    def take(self, position: float) -> Ready | None:
        """Return a position, waiting until it is decoded; None if it is not the one that was begun.

        Raises:
            Exception: What went wrong in the thread.
        """
        if position != self._position:
            return None
        ready, error = self._join()
        if error is not None:
            raise error
        return ready

    def write(self, ready: Ready) -> None:
        """Copy a decoded position into the network."""
        self._network.load_parts(ready.state, non_blocking=self._on_gpu)
        if self._on_gpu:
            self._copied = torch.cuda.current_stream(self._device).record_event()

    def forget(self) -> None:
        """Wait for the thread, if there is one, and drop what it made."""
        self._join()

    def close(self) -> None:
        """Forget, and give the memory back."""
        self.forget()
        self._memory.clear()

    def _join(self) -> tuple[Ready | None, Exception | None]:
        if self._thread is not None:
            self._thread.join()
        made = self._ready, self._error
        self._position = self._thread = self._ready = self._error = None
        return made

    def _decode(self, source: Source) -> None:
        try:
            if self._copied is not None:
                self._copied.synchronize()  # the last copy still reads this memory
            total, state = Checksum(), {}
            with torch.no_grad():
                for name, layout in source.layout().items():
                    part = self._parts.get(name, Part(layout.shape))
                    flat = self._room(name, layout.dtype, part.elements)
                    fill(flat, part, source, name, layout.dtype, total, (name,))
                    state[name] = flat.view(part.local_shape)
            self._ready = Ready(state, total.digest())
        except Exception as error:
            self._error = error

    def _room(self, name: str, dtype: torch.dtype, elements: int) -> Tensor:
        """Return memory that the next position uses again."""
        if (name, dtype) not in self._memory:
            self._memory[name, dtype] = room(elements, dtype, pinned=self._on_gpu)
        return self._memory[name, dtype]

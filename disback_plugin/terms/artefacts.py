"""What inductor makes of a formula, called directly.

Dynamo's way into a compiled function, guards and all, takes as long on a CPU as the kernel of a latent. Where the
caller knows everything that the graph depends on, what was compiled can be called without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Artefact", "tensors"]

Call: TypeAlias = Callable[..., tuple[Tensor, ...]]


class Artefact:
    """Inductor as a backend of dynamo that remembers what it made, and with what that was called.

    Example:
        >>> def double(x: Tensor) -> tuple[Tensor, ...]:
        ...     return (2 * x,)
        >>> artefact, x = Artefact(), torch.ones(3, 2)
        >>> torch._dynamo.mark_dynamic(x, 0)
        >>> outputs = torch.compile(double, backend=artefact)(x)
        >>> call = artefact.direct((x,), outputs)
        >>> call is None or call(torch.ones(5, 2))[0].sum().item() == 20
        True
    """

    def __init__(self) -> None:
        self.graphs = 0
        self._made: Callable[..., Any] | None = None
        self._arguments: tuple[Any, ...] = ()
        self._results: tuple[Any, ...] = ()

    def __call__(self, graph: Any, examples: Any) -> Callable[..., Any]:
        """Compile a graph; what dynamo asks a backend for."""
        self.graphs += 1
        sizes: list[Any] = [example for example in examples if isinstance(example, torch.SymInt)]
        known = [len(size.node.shape_env.guards) for size in sizes]
        made = torch._dynamo.lookup_backend("inductor")(graph, examples)
        # A condition on the batch that inductor has added is one that only dynamo checks.
        added = known != [len(size.node.shape_env.guards) for size in sizes]
        self._made = made if sizes and not added else None

        def remembering(*arguments: Any) -> Any:
            self._arguments, self._results = arguments, made(*arguments)
            return self._results

        return remembering

    def direct(self, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Call | None:
        """Return the way past dynamo, or None where there is none for sure.

        Args:
            inputs: What the compiled function was just called with: nested tuples of constants and of different
                tensors without graph, whose axis 0 is the batch or of size 1. The first is a tensor.
            outputs: What it returned.

        Returns:
            The same function, for inputs that differ from these in values and batch only.
        """
        # Without its wrapper, which hides it from a dynamo that is not there.
        made = getattr(self._made, "_torchdynamo_orig_callable", self._made)
        given = [inputs[0].shape[0], *tensors(inputs)]
        places = [_place(argument, given) for argument in self._arguments]
        order = [_place(output, self._results) for output in outputs]
        self._arguments = self._results = ()
        # On a GPU the call overlaps with kernels, and a guard watches over 32-bit indices. Strides that do not follow
        # from the shape may have been taken for the batch, if they were as large.
        exempt = all(tensor.is_cpu and tensor.is_contiguous() for tensor in given[1:])
        if made is None or None in places or None in order or not exempt:
            return None

        def call(*inputs: Any) -> tuple[Tensor, ...]:
            given = [inputs[0].shape[0], *tensors(inputs)]
            results = made(*[given[place] for place in places])  # type: ignore[index]
            return tuple([results[place] for place in order])

        return call


def tensors(inputs: Sequence[Any]) -> list[Tensor]:
    """Return the tensors in nested tuples, in order."""
    found: list[Tensor] = []
    for entry in inputs:
        if isinstance(entry, Tensor):
            found.append(entry)
        elif isinstance(entry, tuple):
            found += tensors(entry)
    return found


def _place(value: Any, among: Sequence[Any]) -> int | None:
    """Return where a tensor is found, or a size that equals the first."""
    if isinstance(value, int):
        return 0 if among[0] == value else None
    return next((i for i, other in enumerate(among) if other is value), None)

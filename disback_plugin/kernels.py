"""The losses of `losses`, fused: same names, same signatures, one pass over memory instead of a dozen.

`torch.compile` makes one kernel of each formula: gradient and the loss of each sample come out of it together.

    from disback_plugin import kernels
    loss = kernels.dmd(x, real, fake, eps=eps, alpha=alpha, sigma=sigma, prediction=Prediction.EPS)

One graph serves every batch of two or more. On CUDA a block takes a whole sample (`split_reductions=False`: a single
kernel) as long as samples are small, as latents are; large images are split over blocks.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from disback_plugin import losses
from disback_plugin.errors import OptionError
from disback_plugin.terms import formulas
from disback_plugin.terms.artefacts import Artefact, tensors
from disback_plugin.terms.formulas import Formula

__all__ = ["denoising", "diff_instruct", "dmd", "fuse", "sid", "vsd"]

P = ParamSpec("P")
R = TypeVar("R")
Mode = Literal["auto"] | bool

# Elements of a sample up to which one block a sample is right: a latent of 4 x 128 x 128.
ONE_BLOCK = 1 << 16
# Elements of a batch from which on compiling is worth its seconds on a CPU: that of latents, 4 x 4 x 64 x 64. Fused is
# 1.5 times as fast from two elements on, but below this it repays the 10 to 20 s of a process's first compiled form,
# at 20 to 100 microseconds a call, after some 200,000 calls only.
WINS_ON_CPU = 1 << 16


def fuse(loss: Callable[P, R], *, compile: Mode = "auto") -> Callable[P, R]:
    """Return the fused twin of a loss.

    Args:
        loss: One of `denoising, diff_instruct, dmd, sid, vsd` of `losses`, or any function that calls them.
        compile: True: compile always, and raise if that fails. "auto": run the plain form for batches so small that
            fused does not win, and from the first failure of the compiler on, with one warning. False: the plain form.

    Returns:
        A function with the loss's signature; `__wrapped__` is the loss.

    Raises:
        OptionError: If `compile` is none of these.

    Example:
        >>> from disback_plugin.prediction import Prediction
        >>> x = torch.zeros(2, 3, requires_grad=True)
        >>> loss = fuse(losses.diff_instruct)(x, x + 1.0, x, alpha=1.0, sigma=1.0, prediction=Prediction.SCORE)
        >>> loss.backward()
        >>> x.grad[0].tolist()
        [-0.5, -0.5, -0.5]
    """
    if compile not in ("auto", True, False):
        raise OptionError(f"compile={compile!r}", expected="'auto', True or False", cure="leave it away for 'auto'")

    @functools.wraps(loss)
    def fused(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return loss(*args, **kwargs)  # a part of the caller's own graph, which fuses it
        token = formulas.RUN.set(_RUNNERS[compile])
        try:
            return loss(*args, **kwargs)
        finally:
            formulas.RUN.reset(token)

    return fused


def _always(formula: Formula, *inputs: Any) -> tuple[Tensor, ...]:
    tensor: Tensor = inputs[0]
    # A batch of one would be a graph of its own, and one of none has nothing to do.
    if tensor.shape[0] < 2:
        return formula(*inputs)
    return _compiled(formula, tensor.device.type, _one_block(tensor), _kind(inputs))(*inputs)


def _where_it_wins(formula: Formula, *inputs: Any) -> tuple[Tensor, ...]:
    tensor: Tensor = inputs[0]
    if formula in _FAILED or (tensor.device.type == "cpu" and tensor.numel() < WINS_ON_CPU):
        return formula(*inputs)
    try:
        return _always(formula, *inputs)
    except Exception as error:  # whatever a missing or broken compiler raises
        _FAILED.add(formula)
        warnings.warn(
            f"the fused form of {formula.__name__} does not compile here ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); the plain form is used from now on",
            RuntimeWarning,
            stacklevel=5,
        )
        return formula(*inputs)


@functools.cache
def _compiled(formula: Formula, device: str, one_block: bool, kind: Hashable) -> Formula:
    """Compile a formula for one kind of inputs: all that is alike but for the batch."""
    # A code object of its own: dynamo counts graphs by code object, and gives up after eight. A name of its own: by it
    # dynamo remembers what varied, and a constant that differs between two kinds would become an input of the second.
    name = f"{formula.__name__}_{hashlib.sha256(repr(kind).encode()).hexdigest()[:8]}"
    whole = _averaged(formula) if device == "cpu" else formula
    twin = FunctionType(whole.__code__.replace(co_name=name), whole.__globals__, closure=whole.__closure__)
    artefact = Artefact()
    if one_block:
        compiled: Formula = torch.compile(twin, fullgraph=True, options={"split_reductions": False})
    else:
        compiled = torch.compile(twin, fullgraph=True, backend=artefact)
    ready: Formula | None = None

    def with_any_batch(*inputs: Any) -> tuple[Tensor, ...]:
        nonlocal ready
        if ready is not None:
            return ready(*inputs)
        if any(factor.requires_grad for factor in tensors(inputs)):
            ready = formula  # a learned weight wants a graph through the formula
            return formula(*inputs)
        marked = _with_dynamic_batch(inputs, len(inputs[0]))
        outputs = compiled(*marked)
        ready = artefact.direct(marked, outputs) or compiled
        return outputs

    return with_any_batch


def _averaged(formula: Formula) -> Formula:
    """The mean of the losses inside the kernel; on a GPU it would be a kernel of its own."""

    def averaged(*inputs: Any) -> tuple[Tensor, ...]:
        *gradients, values, finite = formula(*inputs)
        # A sum in float32 would come with a condition on the batch.
        return *gradients, values.mean(dtype=torch.float64).to(values.dtype), finite

    return averaged


def _kind(inputs: tuple[Any, ...]) -> Hashable:
    """Return what a graph depends on: dtypes, devices, image sizes, strides, which factors are per sample or learned,
    constants; and, once more, the process's own settings.
    """
    first: Tensor = inputs[0]
    shape, device = first.shape, first.device
    process = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    return device, shape[1:], process, _kinds(inputs, shape, device)


def _kinds(inputs: tuple[Any, ...], shape: torch.Size, device: torch.device) -> Hashable:
    kinds: list[Hashable] = []
    for e in inputs:
        if not isinstance(e, Tensor):
            kinds.append(_kinds(e, shape, device) if isinstance(e, tuple) else e)
            continue
        same = e.shape == shape and e.device == device
        if same and type(e) is Tensor and e.is_contiguous() and not e.requires_grad:
            kinds.append(e.dtype)  # as nearly all are
        else:
            per_sample = e.shape[:1] == shape[:1]
            kinds.append((type(e), e.dtype, e.device, e.shape[1:], e.stride(), per_sample, e.requires_grad))
    return tuple(kinds)


def _one_block(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and tensor[0].numel() <= ONE_BLOCK


def _with_dynamic_batch(inputs: Any, batch: int) -> Any:
    """Mark the batch axis on aliases: a mark on the caller's own tensors would follow them into his graphs."""
    if isinstance(inputs, Tensor):
        alias = inputs.view_as(inputs)
        if alias.ndim and len(alias) == batch:
            torch._dynamo.mark_dynamic(alias, 0)
        return alias
    return tuple(_with_dynamic_batch(entry, batch) for entry in inputs) if isinstance(inputs, tuple) else inputs


_FAILED: set[Formula] = set()
_RUNNERS: dict[Mode, Callable[..., tuple[Tensor, ...]]] = {
    "auto": _where_it_wins,
    True: _always,
    False: formulas.plainly,
}

denoising = fuse(losses.denoising)
diff_instruct = fuse(losses.diff_instruct)
dmd = fuse(losses.dmd)
sid = fuse(losses.sid)
vsd = fuse(losses.vsd)

"""The losses of `losses`, fused: the same names and signatures, one pass over memory instead of a dozen.

`torch.compile` makes one kernel of each formula, which computes the gradient and the loss of each sample.

    from disback_plugin import kernels
    loss = kernels.dmd(x, real, fake, eps=eps, alpha=alpha, sigma=sigma, prediction=Prediction.EPS)

One graph serves every batch of two or more. On CUDA a block takes a whole sample (`split_reductions=False`: a single
kernel) if samples are small, as latents are; large images are split over blocks.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from disback_plugin import _loss_formulas as formulas
from disback_plugin import losses
from disback_plugin._loss_formulas import Formula
from disback_plugin.errors import OptionError

__all__ = ["denoising", "diff_instruct", "dmd", "fuse", "sid", "vsd"]

P = ParamSpec("P")
R = TypeVar("R")
Mode = Literal["auto"] | bool
Kind: TypeAlias = tuple[torch.device, torch.Size, bool, tuple[Hashable, ...], tuple[Hashable, ...]]

# Elements of a sample up to which one block a sample is right: a latent of 4 x 128 x 128.
ONE_BLOCK = 1 << 16
# Elements of a batch from which compiling is worth its seconds on a CPU: a batch of latents, 4 x 4 x 64 x 64. Smaller
# batches gain 20 to 100 microseconds a call, which repay the 10 to 20 s of a process's first compilation too late.
WINS_ON_CPU = 1 << 16


def fuse(loss: Callable[P, R], *, compile: Mode = "auto") -> Callable[P, R]:
    """Return the fused form of a loss.

    Args:
        loss: One of `denoising, diff_instruct, dmd, sid, vsd` of `losses`, or any function that calls them.
        compile: True: always compile, and raise if that fails. "auto": run the plain form for batches so small that
            fused does not win, and after the first failure of the compiler, with one warning. False: the plain form.

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
    if compile not in _RUNNERS:
        raise OptionError(f"compile={compile!r}", expected="'auto', True or False", cure="omit it for 'auto'")

    @functools.wraps(loss)
    def fused(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return loss(*args, **kwargs)  # the caller's own graph contains the loss and fuses it
        token = formulas.RUNNER.set(_RUNNERS[compile])
        try:
            return loss(*args, **kwargs)
        finally:
            formulas.RUNNER.reset(token)

    return fused


def _run_compiled(formula: Formula, *inputs: Any) -> tuple[Tensor, ...]:
    kind = _kind(inputs)
    # A batch of one would need a graph of its own.
    if kind is None or len(inputs[0]) < 2:
        return formula(*inputs)
    compiled = _COMPILED.get((formula, kind))
    if compiled is None:
        compiled = _COMPILED[formula, kind] = _compile(formula, kind, inputs)
    return compiled(*inputs)


def _run_where_it_wins(formula: Formula, *inputs: Any) -> tuple[Tensor, ...]:
    first: Tensor = inputs[0]
    if formula in _FAILED or (first.device.type == "cpu" and first.numel() < WINS_ON_CPU):
        return formula(*inputs)
    try:
        return _run_compiled(formula, *inputs)
    except Exception as error:  # a missing or broken compiler may raise anything
        _FAILED.add(formula)
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        message = f"the fused form of {formula.__name__} does not compile here ({reason}); the plain form is used"
        warnings.warn(message, RuntimeWarning, stacklevel=5)
        return formula(*inputs)


def _compile(formula: Formula, kind: Kind, inputs: tuple[Any, ...]) -> Formula:
    """Compile a formula for one kind of inputs, which may differ in the batch size alone."""
    # Dynamo gives up on a code object after eight graphs, so each kind has its own. It remembers by the name of the
    # code what varied, and would turn a constant that differs between two kinds into an input of the second.
    device, sample, fully_compared = kind[:3]
    name = f"{formula.__name__}_{hashlib.sha256(repr(kind).encode()).hexdigest()[:8]}"
    whole = _with_mean_loss(formula) if device.type == "cpu" else formula
    twin = FunctionType(whole.__code__.replace(co_name=name), whole.__globals__, closure=whole.__closure__)
    example = [_with_dynamic_batch(entry, len(inputs[0])) for entry in inputs]
    one_block = device.type == "cuda" and sample.numel() <= ONE_BLOCK
    options: dict[str, Any] = {"split_reductions": False} if one_block else {}
    if fully_compared and hasattr(torch.compiler, "skip_all_guards_unsafe"):  # this torch has guard filters
        options["guard_filter_fn"] = _keep_guards_on_the_batch
    compiled: Formula = torch.compile(twin, fullgraph=True, options=options)
    compiled(*example)
    return compiled


def _keep_guards_on_the_batch(guards: Any) -> list[bool]:
    """Skip the guards on what `_kind` has compared already: on a CPU they take as long as the kernel of a latent."""
    return [guard.guard_type in ("SHAPE_ENV", "DUPLICATE_INPUT") for guard in guards]


def _with_mean_loss(formula: Formula) -> Formula:
    """Return the formula with the mean of the losses inside the kernel; on a GPU the mean would be a second kernel."""

    def averaged(*inputs: Any) -> tuple[Tensor, ...]:
        *gradients, values, finite = formula(*inputs)
        # A sum in float32 would add a condition on the batch size.
        return *gradients, values.mean(dtype=torch.float64).to(values.dtype), finite

    return averaged


def _kind(inputs: tuple[Any, ...]) -> Kind | None:
    """Return the kind of some inputs; None if they must not be compiled.

    A kind is all that a graph depends on but for the batch size: the device, the shape of a sample, whether dynamo's
    guards would find nothing else, the settings of the process, the constants, and of each tensor the dtype, device,
    sizes, strides and whether its first axis is the batch.
    """
    first: Tensor = inputs[0]
    shape, device = first.shape, first.device
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device.type)
    process = (*modes, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    # A stride may equal the batch size and be taken for it, and on a GPU a guard decides on 32-bit indices.
    fully_compared = device.type == "cpu"
    kinds: list[Hashable] = []
    for e in inputs:
        if not isinstance(e, Tensor):
            kinds.append(e)
        # A learned factor needs a graph through the formula; a lazily negated tensor or a subclass hides its values.
        elif e.requires_grad or e.is_neg() or type(e) not in (Tensor, torch.nn.Parameter):
            return None
        elif e.shape == shape and e.device == device and e.is_contiguous():
            kinds.append(e.dtype)  # nearly all inputs are of this kind
        else:
            kinds.append((e.dtype, e.device, e.ndim, e.shape[1:], e.stride(), e.shape[:1] == shape[:1]))
            fully_compared = fully_compared and e.is_cpu and e.is_contiguous()
    return device, shape[1:], fully_compared, process, tuple(kinds)


def _with_dynamic_batch(entry: Any, batch: int) -> Any:
    """Mark the batch axis dynamic on a view, so that the caller's tensor is not marked."""
    if not isinstance(entry, Tensor):
        return entry
    view = entry.view_as(entry)
    if view.ndim and len(view) == batch:
        torch._dynamo.mark_dynamic(view, 0)
    return view


_COMPILED: dict[tuple[Formula, Kind], Formula] = {}
_FAILED: set[Formula] = set()
_RUNNERS: dict[Mode, Callable[..., tuple[Tensor, ...]]] = {
    "auto": _run_where_it_wins,
    True: _run_compiled,
    False: formulas.run_plain,
}

denoising = fuse(losses.denoising)
diff_instruct = fuse(losses.diff_instruct)
dmd = fuse(losses.dmd)
sid = fuse(losses.sid)
vsd = fuse(losses.vsd)

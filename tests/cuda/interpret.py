"""Run the generated CUDA code on CPU tensors by Triton's interpreter, and compare the result with float64.

    TRITON_INTERPRET=1 python interpret.py CASE...  # those of `codegen`, after it; a line of JSON answers each

The wrapper that inductor wrote launches the kernels that inductor wrote; only allocation and the device guard are the
CPU's. Reference: the plain function on the same inputs in float64.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from codegen import Case, each, with_any_batch


def replay(case: Case) -> dict[str, Any]:
    """Run a case and return the relative error of each output."""
    import torch
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.runtime import triton_helpers

    def module_instead(graph: Any, inputs: Any, **_: Any) -> Any:
        def call(args: list[Any]) -> Any:
            return module.call(args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=module_instead)

    function, arguments = case.made()
    torch._dynamo.reset()
    start = time.perf_counter()
    needs_gpu = [(triton_helpers, "set_driver_to_gpu"), (torch.cuda, "_DeviceGuard"), (torch.cuda, "set_device")]
    with contextlib.ExitStack() as stack:
        for owner, name in needs_gpu:
            stack.enter_context(mock.patch.object(owner, name, contextlib.nullcontext))
        module = PyCodeCache.load(Path(case.source).read_text().replace("empty_strided_cuda(", "empty_strided_cpu("))
        module.get_raw_stream = lambda _: 0
        found = torch.compile(function, backend=backend, fullgraph=True)(*with_any_batch(arguments))
    exact = function(*each(arguments, in_float64))
    return {
        "name": case.name,
        "seconds": time.perf_counter() - start,
        "errors": [[str(f.dtype), relative_error(f, e)] for f, e in zip(found, exact, strict=True)],
    }


def in_float64(argument: Any) -> Any:
    """Return the argument in float64, as the reference takes it."""
    import torch

    if isinstance(argument, torch.dtype):
        return torch.float64
    return argument.double() if isinstance(argument, torch.Tensor) else argument


def relative_error(found: Any, exact: Any) -> float:
    """Return the largest error over the largest value of its sample or, for one number a sample, of the batch."""
    rows = len(exact) if exact.ndim > 1 else 1
    found, exact = (t.double().reshape(rows, -1) for t in (found, exact))
    size = exact.abs().amax(1)
    return ((found - exact).abs().amax(1) / size.where(size > 0, 1.0)).max().item()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(replay(Case(**json.loads(argument)))), flush=True)  # noqa: T201

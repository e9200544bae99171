"""Write, count and compile the CUDA code that inductor generates for a function, on a machine without a GPU.

    python codegen.py CASE...  # each CASE is `Case` as JSON; a line of JSON answers each

Dynamo traces the function on fake `cuda` tensors, inductor believes in a GPU (`pretend`) and is stopped as soon as its
code is written. Triton needs no GPU to make a cubin of it; ptxas' own report says what the cubin takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# Folding evaluates constants on the device; the rest keeps one process's cases apart.
ALWAYS = {"joint_graph_constant_folding": False, "force_disable_caches": True, "use_static_triton_launcher": False}


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to compile, the options, and the file of the generated code.

    make: `module:function` that is called with `given` and returns (function, arguments): a function of nested tuples
    of CPU tensors that returns a tuple of tensors, and what to call it with. options: those of `torch.compile`.
    capability: of the GPU, 90 for sm_90. source: the file of the generated code. cubins: compile it too, with what
    `triton` adds to inductor's own options of `triton.compile`.
    """

    name: str
    make: str
    source: str
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    capability: int = 90
    cubins: bool = False
    triton: dict[str, Any] = dataclasses.field(default_factory=dict)

    def made(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the function and its arguments on the CPU."""
        module, _, name = self.make.partition(":")
        return getattr(importlib.import_module(module), name)(**self.given)


class Written(BaseException):
    """Raised when inductor has written its code, because the next step needs a GPU."""


def generate(case: Case) -> str:
    """Return the module that inductor writes: the kernels and the wrapper that launches them."""
    import pretend
    import torch
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode

    written: list[str] = []

    def stop(code: str) -> None:
        written.append(code)
        raise Written

    def inductor(graph: Any, inputs: Any) -> Any:
        with pretend.gpu(case.capability), mock.patch.object(GraphLowering, "save_output_code", staticmethod(stop)):
            return compile_fx(graph, inputs, config_patches={**ALWAYS, **case.options})

    function, arguments = case.made()
    torch._dynamo.reset()
    with FakeTensorMode(), contextlib.suppress(Written):
        torch.compile(function, backend=inductor, fullgraph=True)(*with_any_batch(on_gpu(arguments)))
    (code,) = written
    Path(case.source).write_text(code)
    return code


def compiled(case: Case, code: str) -> Iterator[dict[str, Any]]:
    """Yield the resources, as ptxas reports them, of each configuration of each kernel that the autotuner would try."""
    import pretend
    import torch
    from torch._inductor.codecache import PyCodeCache
    from triton import knobs

    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    with pretend.gpu(case.capability), torch._inductor.config.patch(ALWAYS):
        for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL):
            autotuner = getattr(PyCodeCache.load(source), name)
            chosen = autotuner._create_compile_options
            autotuner._create_compile_options = lambda *a, chosen=chosen: {**chosen(*a), **case.triton}
            for config in autotuner.configs:
                start = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()) as report:
                    binary = autotuner._precompile_config(config).kernel
                yield {
                    "kernel": name,
                    "config": {**config.kwargs, "num_warps": config.num_warps},
                    "registers": total(r"Used (\d+) registers", report.getvalue()),
                    "spilled_bytes": total(r"(\d+) bytes spill (?:stores|loads)", report.getvalue()),
                    "shared_bytes": binary.metadata.shared,
                    "cubin_bytes": len(binary.asm["cubin"]),
                    "seconds": time.perf_counter() - start,
                }


def total(pattern: str, report: str) -> int:
    found = re.findall(pattern, report)
    if not found:
        raise ValueError(f"no {pattern!r} in the report of ptxas: {report!r}")
    return sum(map(int, found))


def inspect(case: Case) -> dict[str, Any]:
    """Return the counts and the resources of a case without running its code."""
    start = time.perf_counter()
    code = generate(case)
    seconds = time.perf_counter() - start
    wrapper = re.sub("#.*", "", code[code.index("def call(self, args)") : code.index("runner = Runner")])
    return {
        "name": case.name,
        "kernels": wrapper.count(".run("),
        "other_calls": len(re.findall(r"extern_kernels\.|torch\.ops\.|aten\.", wrapper)),
        "in_float64": "fp64" in code or "float64" in code,
        "seconds": seconds,
        "cubins": list(compiled(case, code)) if case.cubins else [],
    }


def each(arguments: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to each entry of nested tuples."""
    return tuple(each(a, change) for a in arguments) if isinstance(arguments, tuple) else change(arguments)


def on_gpu(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return fake tensors with the same layout; the two halves of a guided batch share memory here too."""
    import torch

    wholes: dict[int, torch.Tensor] = {}

    def move(a: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return a
        if a._base is None:
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
        (whole,) = on_gpu((a._base,)) if id(a._base) not in wholes else (wholes[id(a._base)],)
        return wholes.setdefault(id(a._base), whole).as_strided(a.shape, a.stride(), a.storage_offset())

    return each(arguments, move)


def with_any_batch(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Mark the batch axis of every tensor dynamic, as `kernels` does."""
    import torch

    def mark(a: Any) -> Any:
        if isinstance(a, torch.Tensor) and a.ndim and len(a) == len(arguments[0]):
            torch._dynamo.mark_dynamic(a, 0)
        return a

    return each(arguments, mark)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(inspect(Case(**json.loads(argument)))), flush=True)  # noqa: T201

"""Pretend to inductor that there is a GPU. Private names of torch are replaced, so use this in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

TORCH = ("2.14", "2.15")  # the minor versions whose names are replaced here
MULTIPROCESSORS = {75: 40, 80: 108, 90: 132, 100: 148}  # T4, A100, H100, B200


def why_not() -> str:
    """Return what this installation lacks, or an empty string. On Linux torch installs all that is needed."""
    import torch

    if ".".join(torch.__version__.split(".")[:2]) not in TORCH:
        return f"replaces private names of torch {' and '.join(TORCH)}, and this is {torch.__version__}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return "Triton is not installed"
    if not Path(triton.origin).parent.joinpath("backends", "nvidia", "bin", "ptxas").exists():
        return "Triton came without ptxas"
    return ""


@contextlib.contextmanager
def gpu(capability: int) -> Iterator[None]:
    """Pretend that there is one GPU of this compute capability (90 for sm_90) to generate and compile code for."""
    import torch
    from torch._dynamo import device_interface
    from torch._inductor.fx_passes import fuse_attention, pad_mm
    from torch._inductor.runtime import hints, triton_helpers
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    properties = types.SimpleNamespace(
        name=f"sm_{capability}",
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=MULTIPROCESSORS[capability],
        regs_per_multiprocessor=1 << 16,
        max_threads_per_multi_processor=1024 if capability == 75 else 2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
    )
    target = GPUTarget("cuda", capability, 32)
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10)),
        (torch.cuda, "get_rng_state", lambda *_: torch.zeros(1)),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "_exchange_device", lambda _: 0),
        (torch.cuda, "_maybe_exchange_device", lambda _: 0),
        (device_interface.CudaInterface, "get_device_properties", staticmethod(lambda device=None: properties)),
        (fuse_attention, "_sfdp_init", lambda *_: None),  # these two trace their patterns on real tensors;
        (pad_mm, "_pad_mm_init", lambda *_: None),  # no attention and no matrix product here
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        (driver, "_active", types.SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)),
    ]
    remembered = [
        hints.DeviceProperties.create,
        _triton.has_triton,
        _triton.triton_backend,
        _triton.triton_hash_with_backend,
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_device_properties, cuda=[properties]))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_current_devices, cuda=0))
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        for function in remembered:
            function.cache_clear()
            stack.callback(function.cache_clear)
        yield

"""Run every comparison on one thread, and record the machine. `pytest --benchmark` runs the comparisons alone."""

from __future__ import annotations

import platform
import time

import pytest
import torch


def pytest_addoption(parser):
    """Define the flag `--benchmark`."""
    group = parser.getgroup("disback")
    group.addoption("--benchmark", action="store_true", help="run only the speed comparisons, grouped, and save them")


@pytest.hookimpl(optionalhook=True, tryfirst=True)  # a hook of pytest-xdist for `-n auto` in pyproject.toml
def pytest_xdist_auto_num_workers(config):
    """Return 0 with `--benchmark`: comparisons of speed run in one process. None leaves the number to pytest-xdist."""
    return 0 if config.option.benchmark else None


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config):
    """Translate the flag into the options of pytest-benchmark; without it the comparisons are skipped."""
    options = config.option
    if not hasattr(options, "benchmark_only"):
        return
    if options.benchmark:
        options.benchmark_only = True
        options.benchmark_group_by = "group"
        options.benchmark_autosave = options.benchmark_autosave or "disback"
        options.benchmark_disable_gc = True
    elif not (options.benchmark_only or options.benchmark_enable):
        options.benchmark_skip = True


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # As in any process that has run a network: glibc keeps freed blocks up to this size instead of mapping pages anew.
    del [torch.empty(7 << 20)][:]
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = 1
    machine_info["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["python"] = platform.python_version()


@pytest.fixture(scope="session")
def copy_bandwidth():
    """Bytes a second that a large copy moves, read and written, on this thread."""
    source = torch.empty(1 << 26)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / min(seconds)

"""A pytest plug-in of this repository: `pytest --benchmark` runs the speed comparisons, and only them.

Named by `-p` in pyproject.toml, not by an entry point, so that nobody else's pytest loads it. Imports nothing heavy.
"""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["pytest_addoption", "pytest_configure"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Define the flag `--benchmark`."""
    group = parser.getgroup("disback")
    group.addoption("--benchmark", action="store_true", help="run only the speed comparisons, grouped, and save them")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    """Translate the flag into the options of pytest-benchmark; without it the comparisons are skipped."""
    options: Any = config.option
    if not hasattr(options, "benchmark_only"):
        return
    if options.benchmark:
        options.benchmark_only = True
        options.benchmark_group_by = "group"
        options.benchmark_autosave = options.benchmark_autosave or "disback"
        options.benchmark_disable_gc = True
    elif not (options.benchmark_only or options.benchmark_enable):
        options.benchmark_skip = True

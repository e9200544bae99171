"""Networks that a function of the user's builds: what `pkg.module:build` on a command line stands for.

def build():
    ...
    return {"teacher": teacher, "fake_score": fake_score, "fake_step": fake_step}    # the trainer's own fake score
    return {"teacher": teacher, "sample": sample, "loss": loss}                      # or a recording of its own
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from disback_plugin.errors import OptionError, RoleError

__all__ = ["IN_LOOP", "STANDALONE", "built"]

# The two sets of keyword arguments of `record` that make a recording.
IN_LOOP = ("teacher", "fake_score", "fake_step")
STANDALONE = ("teacher", "sample", "loss")

_FUNCTIONS = ("fake_step", "sample", "loss")


@contextmanager
def built(target: str, *, learning_rate: float | None = None) -> Iterator[dict[str, Any]]:
    """Call `pkg.module:build`, and hold the working folder on the import path meanwhile, as `python -m` does.

    Args:
        target: Module and function; the function takes no argument.
        learning_rate: Of a recording with sample and loss; None leaves it to `record`.

    Yields:
        What it returned: keyword arguments of `record`, "teacher" and one of the two pairs; and the rate, if given.

    Raises:
        OptionError: If there is no such module or function, or a rate for a fake_step.
        RoleError: If it raised, or returned something else.

    Example:
        >>> with built("json:loads") as networks:  # doctest: +ELLIPSIS
        ...     pass
        Traceback (most recent call last):
        disback_plugin.errors.RoleError: found json:loads(), which raised TypeError: ...
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        networks = _checked(target, _call(target, _function(target)))
        if learning_rate is not None and "loss" not in networks:
            raise OptionError(
                f"--learning-rate and fake_step of {target}",
                expected="no rate: fake_step() has an optimizer of its own",
                cure="leave --learning-rate out",
            )
        yield networks if learning_rate is None else {**networks, "learning_rate": learning_rate}
    finally:
        sys.path.remove(here)


def _function(target: str) -> Callable[[], object]:
    module, colon, name = target.partition(":")
    if not (module and colon and name) or module.endswith(".py"):
        raise OptionError(
            f"{target!r}",
            expected="a module and a function in it, as pkg.module:build",
            cure="write train.networks:build for build() in train/networks.py, and run from the folder above",
        )
    try:
        found: Any = import_module(module)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        raise OptionError(
            f"no module {error.name}" if missing else f"module {module}, which raised {_short(error)}",  # type: ignore[attr-defined]
            expected=f"a module {module} that can be imported from {Path.cwd()}",
            cure="run from the folder that `python -m` would find it in" if missing else f"try python -m {module}",
        ) from error
    function = getattr(found, name, None)
    if not callable(function):
        raise OptionError(
            f"no function {name} in {found.__file__ or module}",
            expected="a function without arguments that returns the networks",
            cure=f"define {name}(), or name another",
        )
    return function  # type: ignore[no-any-return]


def _call(target: str, function: Callable[[], object]) -> object:
    try:
        return function()
    except Exception as error:
        raise RoleError(
            f"{target}(), which raised {_short(error)}",
            expected="a function without arguments that returns the networks",
            cure="mend it; --debug shows the whole traceback",
        ) from error


def _short(error: Exception) -> str:
    """Return an error with the last line of code that it came through."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"


def _checked(target: str, networks: object) -> dict[str, Any]:
    keys = set(networks) if isinstance(networks, Mapping) else None
    if keys not in (set(IN_LOOP), set(STANDALONE)):
        what = type(networks).__name__ if keys is None else f"the keys {', '.join(sorted(map(str, keys))) or '(none)'}"
        raise RoleError(
            f"{what} from {target}()",
            expected=f"a mapping with {', '.join(IN_LOOP)}, or with {', '.join(STANDALONE)}",
            cure="return one of the two, all keys and no more",
        )
    assert isinstance(networks, Mapping)
    for name in _FUNCTIONS:
        if name in networks and not callable(networks[name]):
            raise RoleError(
                f"{name} of {target}(), a {type(networks[name]).__name__}",
                expected="a function",
                cure=f"return the function {name} itself, not what it returns",
            )
    return dict(networks)

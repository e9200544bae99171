"""The function of `disback run --evaluate MODULE:FUNCTION`, called with variables of the script."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name
from types import FrameType
from typing import Any

from disback_plugin.errors import OptionError, RoleError
from disback_plugin.launch import Watch


def find_evaluation(name: str, frame: FrameType | None) -> Callable[[], Any]:
    """Return a function without arguments for `attach(evaluate=)`: each argument without a default is a variable.

    Args:
        name: "MODULE:FUNCTION"; the script itself is `__main__`.
        frame: Frame from which on the callers' variables are searched, as they are now.

    Raises:
        OptionError: If there is no such function.
        RoleError: If no caller has one of the variables.
    """
    try:
        function = resolve_name(name)
        given = inspect.signature(function).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise OptionError(
            f"no function {name!r} ({error})",
            expected="--evaluate MODULE:FUNCTION, importable from the script's folder, or __main__:FUNCTION",
            cure="correct the name, or set PYTHONPATH",
        ) from error
    needed = {argument.name: argument.name for argument in given if argument.default is argument.empty}
    try:
        return partial(function, **vars(Watch("", frame="", knows="").find_roles(frame, needed)))
    except RoleError as error:
        raise RoleError(
            f"an argument of {name} that is no variable of the script, among {', '.join(needed)}",
            expected="variables of the script, where its networks are used",
            cure="rename the argument, or give it a default",
        ) from error

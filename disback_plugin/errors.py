"""Errors that carry the cure: what was found, what was expected, what to do.

Every error of this package is a `DisbackError` and also the builtin error that a caller would guess, so that both
`except DisbackError` and `except ValueError` work.
"""

from __future__ import annotations

from functools import partial


class DisbackError(Exception):
    """Base of all errors of this package.

    Args:
        found: What is there now, naming the object in question.
        expected: What would have been right.
        cure: The line to change or the step to take, as an imperative.

    Example:
        >>> raise DisbackError("record=-1", expected="a count >= 0", cure="pass record=200")
        Traceback (most recent call last):
        disback_plugin.errors.DisbackError: found record=-1; expected a count >= 0; to mend it, pass record=200.
    """

    def __init__(self, found: str, *, expected: str, cure: str) -> None:
        super().__init__(f"found {found}; expected {expected}; to mend it, {cure}.")
        self.found = found
        self.expected = expected
        self.cure = cure

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are pickled by position; ours take keywords.
        return (partial(type(self), expected=self.expected, cure=self.cure), (self.found,))


class OptionError(DisbackError, ValueError):
    """An argument is out of its domain."""


class RoleError(DisbackError, TypeError):
    """What was passed cannot play its role: teacher, fake score or optimizer."""


class MismatchError(DisbackError, ValueError):
    """Weights do not fit a network: other keys, other shapes, another kind of dtype."""


class PathError(DisbackError, ValueError):
    """A degradation path is missing, broken, foreign or unfinished."""


class StateError(DisbackError, ValueError):
    """A saved state belongs to another run, or was loaded in the wrong order."""


class TrainingError(DisbackError, RuntimeError):
    """The training loop does something that the method cannot work with."""


class RankError(DisbackError, RuntimeError):
    """Another rank of the same run failed, sees something else, or does not come."""


class PluginError(DisbackError, RuntimeError):
    """A plug-in that the user asked for cannot be loaded, or raised."""

"""The prompts of a text file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disback_plugin.errors import OptionError


def prompts_of(source: str | Sequence[str]) -> list[str]:
    """Return prompts from a list, or from a text file in UTF-8 with one prompt a line; a byte-order mark is no prompt.

    Raises:
        OptionError: If there is no such file, it has another encoding, or no prompt is in it.

    Example:
        >>> prompts_of(["a red cube", ""])
        ['a red cube']
    """
    expected = "a text file in UTF-8, one prompt a line"
    try:
        lines = source
        if isinstance(source, str):  # only a line feed ends a line: captions hold other separators, as U+2028
            lines = Path(source).read_text(encoding="utf-8-sig").split("\n") if Path(source).is_file() else ()
    except (OSError, UnicodeDecodeError) as error:
        cure = "save it in UTF-8"
        raise OptionError(f"{source}, which cannot be read ({error})", expected=expected, cure=cure) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise OptionError(f"no prompt in {source!r}", expected=expected, cure="correct the name")
    return found

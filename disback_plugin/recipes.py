"""The paper's settings by name, from recipes.toml: how long the recording, and how long on each node.

| name       | record | every | generator updates on nodes N - 1, ..., 1 | source         |
|------------|--------|-------|------------------------------------------|----------------|
| `edm-64`   | 200    | 50    | 1,000, 10,000, 10,000                    | B.2            |
| `lsun-256` | 200    | 50    | 500, 1,000, 1,000                        | B.2            |
| `sdxl`     | 1,000  | 100   | nine times 1,000                         | B.2            |
| `lcm-lora` | 200    | 50    | three times 1,000: not stated, see note  | 4.2, A         |

They are the paper's, not our advice: README, "Does it help?".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from disback_plugin.errors import OptionError

__all__ = ["Recipe", "names", "recipe"]


@dataclass(frozen=True)
class Recipe:
    """One setting of the paper; also `schedules.recipe(name)`.

    Attributes:
        name: Its name, which is also a name of its schedule: `schedule="edm-64"`.
        setting: Teacher, student and data.
        record: Recording iterations, in updates of s'.
        every: Of these, between two nodes.
        budgets: Generator updates on nodes N - 1, ..., 1.
        source: Where in the paper.
        quotes: The paper's words.
        training: Its optimizers, rates, batch and length; for information.
        note: What the paper leaves open or contradicts.

    Example:
        >>> edm = recipe("edm-64")
        >>> edm.budgets, edm.nodes, edm.options
        ((1000, 10000, 10000), 4, {'record': 200, 'every': 50, 'schedule': 'edm-64'})
    """

    name: str
    setting: str
    record: int
    every: int
    budgets: tuple[int, ...]
    source: str
    quotes: tuple[str, ...]
    training: str
    note: str

    @property
    def nodes(self) -> int:
        """N, the index of the last node."""
        return -(-self.record // self.every)

    @property
    def options(self) -> dict[str, Any]:
        """What `attach` needs to be told of it: `attach(..., **recipe("edm-64").options)`."""
        return {"record": self.record, "every": self.every, "schedule": self.name}


@cache
def _all() -> dict[str, Recipe]:
    text = files("disback_plugin").joinpath("recipes.toml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = tomllib.loads(text)
    for row in table.values():
        row |= {"budgets": tuple(row["budgets"]), "quotes": tuple(row["quotes"])}
    return {name: Recipe(name=name, **row) for name, row in table.items()}


def names() -> tuple[str, ...]:
    """Return the names of all recipes.

    Example:
        >>> names()
        ('edm-64', 'lsun-256', 'sdxl', 'lcm-lora')
    """
    return tuple(_all())


def recipe(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        OptionError: If there is none of this name.

    Example:
        >>> recipe("sdxl").record, recipe("sdxl").source
        (1000, 'B.2, third paragraph')
    """
    if name not in _all():
        raise OptionError(f"recipe {name!r}", expected=f"one of {', '.join(names())}", cure="correct the name")
    return _all()[name]

"""Short tables for people, in a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), indent: str = "  ") -> str:
    """Return rows as lines of aligned columns, two spaces apart.

    Args:
        rows: Cells of each row, as many in every row.
        right: Indices of the columns that are aligned to the right, as numbers are.
        indent: Text before each line.

    Example:
        >>> print(aligned([("node", "bytes"), ("0", "1,000")], right=[1], indent=""))
        node  bytes
        0     1,000
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in cells)

    return "\n".join(f"{indent}{line(row)}".rstrip() for row in rows)

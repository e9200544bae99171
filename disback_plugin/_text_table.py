"""Short tables for people: aligned columns in a terminal, HTML in a notebook."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape


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


def html_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first one of names, as an HTML table under a title.

    Example:
        >>> html_table("a < b", [("node",), ("0",)])
        '<p>a &lt; b</p><table><thead><tr><th>node</th></tr></thead><tbody><tr><td>0</td></tr></tbody></table>'
    """
    head, *body = rows
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f"<p>{escape(title)}</p><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>"

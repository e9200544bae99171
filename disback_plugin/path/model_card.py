"""What people see of a path: its model card, README.md in its folder, and its nodes as a short table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from disback_plugin.path.manifest import FORMAT, Manifest

__all__ = ["ROWS", "aligned", "card", "html", "percent", "short"]

# A longer table is shown by its beginning and end.
ROWS = 12


def card(manifest: Manifest) -> str:
    """Return the model card: teacher, nodes, codecs and errors, and how to use the path."""
    rows = "\n".join(
        f"| {n.index} | {n.iteration} | {n.codec} | {n.bytes:,} | {n.delta_norm:.4g} | {percent(n.codec_error)} | "
        f"{percent(n.weight_error)} | `{n.checksum[:12]}` |"
        for n in manifest.nodes
    )
    return _CARD.format(
        teacher=manifest.teacher.id or "unnamed",
        fingerprint=manifest.teacher.fingerprint,
        generator=manifest.generator or "unknown",
        iterations=manifest.iterations,
        codec=manifest.recording.codec,
        kept=""
        if manifest.recording.keep_teacher
        else "; it is not in here, the teacher at hand has to be it bit for bit",
        version=FORMAT,
        rows=rows,
    )


def percent(share: float | None) -> str:
    """Return a share as people read it.

    Example:
        >>> percent(0.0012), percent(None)
        ('0.12 %', 'not measured')
    """
    return "not measured" if share is None else f"{100 * share:.2g} %"


def short(manifest: Manifest) -> list[tuple[str, ...]]:
    """Return a row for each node, under a row of names; of a long path the first and the last ones.

    Example:
        >>> from disback_plugin.path.manifest import Recording, Teacher
        >>> print(aligned(short(Manifest(Teacher("", "", bytes=1_000), Recording(4, 2)))))
          node  iteration  codec    bytes  step  error in scores
          0     0          teacher  1,000
    """
    head = ("node", "iteration", "codec", "bytes", "step", "error in scores")
    teacher = ("0", "0", "teacher", f"{manifest.teacher.bytes:,}", "", "")
    nodes = [
        (str(n.index), str(n.iteration), n.codec, f"{n.bytes:,}", f"{n.delta_norm:.4g}", percent(n.codec_error))
        for n in manifest.nodes
    ]
    if len(nodes) > ROWS:
        nodes[ROWS // 2 : -ROWS // 2] = [("...", f"{len(nodes) - ROWS} more", "", "", "", "")]
    return [head, teacher, *nodes]


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as lines of columns, indented."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def html(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows, the first one of names, as a table of HTML, for a notebook.

    Example:
        >>> html("a < b", [("node",), ("0",)])
        '<p>a &lt; b</p><table><thead><tr><th>node</th></tr></thead><tbody><tr><td>0</td></tr></tbody></table>'
    """
    head, *body = rows
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f"<p>{escape(title)}</p><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>"


_CARD = """---
library_name: disback
tags: [disback, score-distillation, diffusion-distillation]
---
# A degradation path

Weights of a score network on its way from the teacher (node 0) to the distribution of an initial student generator,
recorded for Distribution Backtracking Distillation ([arXiv 2408.15991](https://arxiv.org/abs/2408.15991)).

* teacher: {teacher}, fingerprint `{fingerprint}`{kept}
* initial generator: fingerprint `{generator}`
* recorded in {iterations} iterations, codec `{codec}`, format {version}

| node | iteration | codec | bytes | distance to the node before | error in scores | error in weights | checksum |
|---|---|---|---|---|---|---|---|
{rows}

Errors are those of the codec over the step from the node before: of the score network's output on the student's
samples, and of the weights.

```python
import disback_plugin as disback

path = disback.DegradationPath.from_pretrained("this repository or folder")
scheduler = disback.TrajectoryScheduler(path, teacher, fake_score, schedule="auto")
```
"""

"""The model card of a path, README.md in its folder."""

from __future__ import annotations

from disback_plugin.manifest import FORMAT, Manifest

__all__ = ["card", "percent"]


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

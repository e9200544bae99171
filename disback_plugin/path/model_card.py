"""The nodes of a path for people: its model card, README.md in its folder, and a short table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from disback_plugin._text_table import aligned, html_table
from disback_plugin.path.manifest import FORMAT, Manifest

__all__ = ["aligned", "html_table", "model_card", "node_table", "percent"]

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
# A longer table is shown by its beginning and end.
ROWS = 12


def model_card(manifest: Manifest) -> str:
    """Return the model card: teacher, nodes, codec and errors, and how to use the path."""
    data = ModelCardData(library_name="disback", tags=["disback", "score-distillation", "diffusion-distillation"])
    values: dict[str, Any] = {"manifest": manifest, "version": FORMAT, "percent": percent}
    return f"{ModelCard.from_template(data, template_path=str(TEMPLATE), **values)}\n"


def percent(share: float) -> str:
    """Return a share as people read it.

    Example:
        >>> percent(0.0012)
        '0.12 %'
    """
    return f"{100 * share:.2g} %"


def node_table(manifest: Manifest) -> list[tuple[str, ...]]:
    """Return a row for each node, below a row of names; of a long path the first and the last ones.

    Example:
        >>> from disback_plugin.path.manifest import Recording, Teacher
        >>> print(aligned(node_table(Manifest(Teacher("", "", bytes=1_000), Recording(4, 2)))))
          node  iteration  codec    bytes  step  error in weights
          0     0          teacher  1,000
    """
    head = ("node", "iteration", "codec", "bytes", "step", "error in weights")
    teacher = ("0", "0", "teacher", f"{manifest.teacher.bytes:,}", "", "")
    nodes = [
        (str(n.index), str(n.iteration), n.codec, f"{n.bytes:,}", f"{n.delta_norm:.4g}", percent(n.weight_error))
        for n in manifest.nodes
    ]
    if len(nodes) > ROWS:
        nodes[ROWS // 2 : -ROWS // 2] = [("...", f"{len(nodes) - ROWS} more", "", "", "", "")]
    return [head, teacher, *nodes]

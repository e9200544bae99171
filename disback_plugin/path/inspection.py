"""What a path holds, node by node: sizes, errors, and its shape in weight space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.delta import Decoded
from disback_plugin.path.model_card import percent
from disback_plugin.weights.tensor_meta import pieces

__all__ = ["Row", "inspect", "table"]


@dataclass(frozen=True)
class Row:
    """One node of a path.

    Attributes:
        node: i; 0 is the teacher.
        iteration: Updates of s' behind it.
        bytes: Size of its file; 0 for a teacher that the path does not hold.
        ratio: Size of the network in float32 over that of the file; None without a file.
        codec: How it is stored.
        codec_error: Change of the score output that the codec made, over the step from node i - 1; None if unknown.
        weight_error: The same of the weights.
        distance: |theta_i - theta_0|, Euclidean, over all floating tensors; None without the teacher.
        cosine: Between theta_i - theta_0 and the chord theta_N - theta_0; None where one of them is zero or unknown.
        sha256: Of its file.
    """

    node: int
    iteration: int
    bytes: int
    ratio: float | None
    codec: str
    codec_error: float | None
    weight_error: float
    distance: float | None
    cosine: float | None
    sha256: str


def inspect(path: DegradationPath) -> list[Row]:
    """Verify a path, and return a row for each of its nodes.

    Args:
        path: Finished or not.

    Raises:
        PathError: If it is broken.

    Example:
        >>> import tempfile, torch
        >>> from disback_plugin.path.manifest import Recording
        >>> folder, plan = tempfile.mkdtemp(), Recording(iterations=1, every=1)
        >>> path = DegradationPath.create(folder, {"w": torch.zeros(2)}, plan)
        >>> path.append({"w": torch.tensor([3.0, 4.0])}, iteration=1)
        >>> [round(row.distance, 1) for row in inspect(path)]
        [0.0, 5.0]
    """
    path.verify()
    manifest = path.manifest
    shape = _shape(path) if manifest.recording.keep_teacher else _Unknown(len(path))
    teacher = manifest.teacher
    ratio = 4 * shape.elements / teacher.bytes if teacher.bytes else None
    rows = [Row(0, 0, teacher.bytes, ratio, "teacher", 0.0, 0.0, *shape.of(0), teacher.sha256)]
    for n in manifest.nodes:
        ratio = 4 * shape.elements / n.bytes if shape.elements else None
        errors = n.codec_error, n.weight_error
        rows.append(Row(n.index, n.iteration, n.bytes, ratio, n.codec, *errors, *shape.of(n.index), n.sha256))
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as aligned text.

    Example:
        >>> row = Row(1, 50, 1_000, 3.94, "int8", 0.0012, 0.004, 2.5, 1.0, "abcdef0123456789")
        >>> print(table([row]).replace("  ", " "))  # doctest: +NORMALIZE_WHITESPACE
        node iteration bytes ratio codec error in scores in weights |theta_i - theta_0| cosine to the chord sha256
        1 50 1,000 3.94 int8 0.12 % 0.4 % 2.5 1.000 abcdef012345
    """
    head = ["node", "iteration", "bytes", "ratio", "codec", "error in scores", "in weights"]
    head += ["|theta_i - theta_0|", "cosine to the chord", "sha256"]
    texts = [
        [
            str(row.node),
            str(row.iteration),
            f"{row.bytes:,}",
            _text(row.ratio, ".2f"),
            row.codec,
            percent(row.codec_error),
            percent(row.weight_error),
            _text(row.distance, ".4g"),
            _text(row.cosine, ".3f"),
            row.sha256[:12] or "-",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (head, *texts)) for column in range(len(head))]
    to_the_left = {head.index(name) for name in ("node", "codec", "sha256")}

    def line(cells: list[str]) -> str:
        padded = zip(range(len(cells)), cells, widths, strict=True)
        return "  ".join(c.ljust(w) if i in to_the_left else c.rjust(w) for i, c, w in padded).rstrip()

    return "\n".join(line(cells) for cells in (head, *texts))


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


@dataclass(frozen=True)
class _Shape:
    """Inner products of d_i = theta_i - theta_0: with itself, and with the chord d_N."""

    elements: int
    squares: list[float]
    products: list[float]

    def of(self, node: int) -> tuple[float | None, float | None]:
        """Return distance and cosine of a node."""
        lengths = self.squares[node] * self.squares[-1]
        return math.sqrt(self.squares[node]), self.products[node] / math.sqrt(lengths) if lengths > 0 else None


@dataclass(frozen=True)
class _Unknown:
    """The shape of a path without its teacher."""

    nodes: int
    elements: int = 0

    def of(self, node: int) -> tuple[float | None, float | None]:
        """Return None twice."""
        return None, None


def _shape(path: DegradationPath) -> _Shape:
    last = path.source(len(path) - 1)
    assert isinstance(last, Decoded)
    aliases = last.deltas[-1].aliases if last.deltas else {}
    own = {name: layout for name, layout in last.layout().items() if name not in aliases}
    squares, products = ([0.0] * len(path) for _ in range(2))
    for name, layout in tqdm(own.items(), desc="inspecting", disable=None):
        if layout.dtype.is_floating_point:
            for start, stop in pieces(layout.shape.numel()):
                values = [value.to(torch.float64, copy=True) for value in last.trace(name, start, stop)]
                d = [_difference(value, values[0]) for value in values]
                squares = [total + float(d_i @ d_i) for total, d_i in zip(squares, d, strict=True)]
                products = [total + float(d_i @ d[-1]) for total, d_i in zip(products, d, strict=True)]
    return _Shape(sum(layout.shape.numel() for layout in own.values()), squares, products)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    # Equal elements are at distance 0, be they infinite as in an attention mask.
    return torch.where(a == b, 0.0, a - b)

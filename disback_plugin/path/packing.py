"""Integers compressed with zstd: one frame a piece, so that any piece is read on its own.

Bytes of equal weight stand together: the least significant ones of a difference are noise and the most significant
nearly all zero; apart they compress, mixed they do not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import zstandard
from torch import Tensor

from disback_plugin.errors import COPY_AGAIN, PathError
from disback_plugin.weights.tensor_meta import PIECE, pieces, room

__all__ = ["pack", "packed_sizes", "unpack"]

# Of zstd. Higher ones find nothing more in noise.
LEVEL = 1


def pack(words: Tensor) -> dict[str, Tensor]:
    """Compress integers, one frame a piece, the bytes of equal weight together."""
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
    planes = words.numpy().view(np.uint8).reshape(len(words), words.element_size()).T
    frames = [compressor.compress(planes[:, a:b].tobytes()) for a, b in pieces(len(words))]
    return {
        "frames": torch.tensor([len(frame) for frame in frames], dtype=torch.int64, device="cpu"),
        "bytes": torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8) if frames else room(0, torch.uint8),
    }


def packed_sizes(elements: int) -> dict[str, tuple[torch.dtype, int | None]]:
    """Return dtype and length of what `pack` makes of so many integers; None where the length depends on them."""
    return {"frames": (torch.int64, max(-(-elements // PIECE), 1)), "bytes": (torch.uint8, None)}


def unpack(parts: Mapping[str, Tensor], start: int, elements: int, dtype: torch.dtype) -> Tensor:
    """Return the `elements` integers of the piece that begins at `start`."""
    if not elements:
        return room(0, dtype)
    frame = start // PIECE
    end = int(parts["frames"][: frame + 1].sum())
    compressed = parts["bytes"][end - int(parts["frames"][frame]) : end].numpy().data
    size = elements * dtype.itemsize
    try:
        # What a frame says of its size is looked at before it is believed: it could ask for all memory.
        declared = zstandard.frame_content_size(compressed)
        raw = zstandard.ZstdDecompressor().decompress(compressed) if declared == size else b""
    except zstandard.ZstdError as error:
        raise PathError(f"a compressed piece that does not read ({error})", expected="zstd", cure=COPY_AGAIN) from error
    if len(raw) != size:
        raise PathError(f"a compressed piece of {declared} bytes", expected=f"{size} bytes", cure=COPY_AGAIN)
    words = np.empty((elements, dtype.itemsize), dtype=np.uint8)
    for place, plane in enumerate(np.frombuffer(raw, dtype=np.uint8).reshape(dtype.itemsize, elements)):
        words[:, place] = plane  # column by column: a transposed copy takes three times as long
    return torch.from_numpy(words).view(dtype).view(-1)

"""Prompts, and what the text encoders make of them: computed once, kept on disk, read a row at a time.

`FOLDER/00000.safetensors` and so on hold the conditions of `ROWS` prompts each, `null.safetensors` those of no prompt;
`embeddings.json`, written last, says of which prompts and teacher. Rows are read from the mapped files, so that a
million prompts take no memory.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from disback_adapters.lcm_lora import pipelines
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from disback_plugin.errors import OptionError

__all__ = ["Embeddings", "described", "encode", "prompts_of"]

ROWS = 1_000
BATCH = 50
KNOWN = "embeddings.json"


def prompts_of(source: str | Sequence[str], column: str = "text") -> list[str]:
    """Return prompts from a list, a text file with one a line, or a column of a dataset on the hub or in a folder.

    Raises:
        OptionError: If there are none, or `datasets` is not installed for a dataset.

    Example:
        >>> prompts_of(["a red cube", ""])
        ['a red cube']
    """
    if not isinstance(source, str):
        lines = list(source)
    elif Path(source).is_file():
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    else:
        try:
            from datasets import load_dataset
        except ImportError:
            raise OptionError(
                f"no file {source!r}",
                expected="a text file with a prompt a line",
                cure="correct the name, or `pip install datasets` if it is the id of a dataset",
            ) from None
        lines = load_dataset(source, split="train")[column]
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise OptionError(f"no prompt in {source!r}", expected="one a line", cure="correct the file")
    return found


def encode(pipeline: Any, names: Sequence[str], prompts: list[str], pixels: int) -> tuple[dict[str, Tensor], ...]:
    """Return the conditions of prompts, and those of no prompt as the pipeline's own guidance has them.

    Args:
        pipeline: With its text encoders.
        names: What the denoiser wants (`Denoiser.conditions`).
        prompts: B prompts.
        pixels: Height and width of the images, for SDXL's time ids.

    Returns:
        Two mappings from each name to a tensor of shape (B, ...).
    """
    wanted = inspect.signature(pipeline.encode_prompt).parameters
    texts = {name: prompts for name in ("prompt", "prompt_2", "prompt_3") if name in wanted}
    with torch.no_grad():
        made = pipeline.encode_prompt(
            **texts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).expand(len(prompts), -1)
    both = []
    for own in (0, 1):
        found = {"encoder_hidden_states": made[own]}
        if len(made) > 2:
            found |= dict.fromkeys(("text_embeds", "pooled_projections"), made[own + 2])
        found["time_ids"] = sizes.to(made[own])
        missing = [name for name in names if name not in found]
        if missing:
            raise OptionError(
                f"a {type(pipeline).__name__} that makes no {', '.join(missing)}, which its denoiser needs",
                expected="SDXL's two text encoders and their pooled embedding"
                if "text_embeds" in missing
                else "a pipeline of the denoiser's own kind",
                cure="load the teacher as the pipeline it was published as, such as StableDiffusionXLPipeline",
            )
        both.append({name: found[name].contiguous().cpu() for name in names})
    return tuple(both)


class Embeddings:
    """The cached conditions of prompts.

    Args:
        folder: Where they are.

    Attributes:
        count: How many prompts.
        null: The conditions of no prompt, each of shape (1, ...).
    """

    def __init__(self, folder: Path) -> None:
        self.count: int = json.loads((folder / KNOWN).read_text())["count"]
        self._files = [safe_open(_shard(folder, at), framework="pt") for at in range(0, self.count, ROWS)]
        self.null: dict[str, Tensor] = load_file(folder / "null.safetensors")

    @staticmethod
    def are_of(folder: Path, known: dict[str, Any]) -> bool:
        """Return whether a folder holds them, complete, as `described`."""
        file = folder / KNOWN
        return file.exists() and json.loads(file.read_text()) == known

    @staticmethod
    def make(folder: Path, pipeline: Any, prompts: list[str], pixels: int, known: dict[str, Any]) -> None:
        """Compute and write them."""
        names = pipelines.denoiser(pipeline).conditions
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KNOWN).unlink(missing_ok=True)
        null = encode(pipeline, names, [""], pixels)[1]
        for start in range(0, len(prompts), ROWS):
            rows = prompts[start : start + ROWS]
            parts = [encode(pipeline, names, rows[at : at + BATCH], pixels)[0] for at in range(0, len(rows), BATCH)]
            save_file({name: torch.cat([part[name] for part in parts]) for name in names}, _shard(folder, start))
        save_file(null, folder / "null.safetensors")
        (folder / KNOWN).write_text(json.dumps(known))  # last: without it nothing counts

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the conditions of some prompts, by their place in the list, each of shape (B, ...)."""
        at = [(self._files[index // ROWS], index % ROWS) for index in indices]
        return {name: torch.cat([file.get_slice(name)[row : row + 1] for file, row in at]) for name in self.null}


def described(teacher: str, prompts: list[str], resolution: int | None, precision: str) -> dict[str, Any]:
    """Return what tells embeddings apart, as JSON holds it."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return {
        "teacher": teacher,
        "prompts": digest,
        "count": len(prompts),
        "resolution": resolution,
        "precision": precision,
    }


def _shard(folder: Path, start: int) -> Path:
    return folder / f"{start // ROWS:05d}.safetensors"

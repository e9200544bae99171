"""Compute memory and disk space for distilling SD 1.5 and SDXL: `python benchmarks/text_to_image_memory.py`.

Networks are built on the meta device from the published configurations, so that numbers of weights are exact and
nothing is downloaded. Weights that are trained count 4 bytes and 8 more in Adam, frozen ones 2 (--mixed_precision bf16,
DMD2's --use_fp16), and 4 if nodes are written into them; nodes are 1.03 bytes a weight (`codecs.md`, int8), the
teacher of the path 4. Gradients and activations are not counted. The numbers of the two scripts follow from their code:
DMD2 at 8d8fa55, main/sd_guidance.py:45, :53 and main/sd_unified_model.py:39, and the official DisBack at d015b5e,
the same, which saves all of the guidance model as a node (main/degradation.py:301).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from disback_adapters.lcm_lora.roles import ATTENTION, STUDENT
from peft import LoraConfig

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS = {"SD 1.5": SD15, "SDXL": SDXL}
RANK, NODES, INT8 = 64, 4, 4 / 3.9


@dataclass(frozen=True)
class Held:
    """Weights in memory, and bytes of the nodes on disk."""

    networks: str
    frozen: int
    trained: int
    path: float
    width: int = 2

    @property
    def bytes(self) -> int:
        return self.width * self.frozen + 12 * self.trained


def weights(config: dict[str, object], layers: tuple[str, ...] = ()) -> int:
    """Return how many weights a UNet has, or a LoRA on some of its layers."""
    with torch.device("meta"), warnings.catch_warnings():
        unet = UNet2DConditionModel(**config)
        if not layers:
            return sum(weight.numel() for weight in unet.parameters())
        unet.add_adapter(LoraConfig(r=RANK, target_modules=list(layers)), adapter_name="student")
    return sum(weight.numel() for name, weight in unet.named_parameters() if "lora_" in name)


def rows(config: dict[str, object]) -> dict[str, Held]:
    """Return the weights and nodes of each way of training, for one UNet."""
    whole, student, score = weights(config), weights(config, STUDENT["unet"]), weights(config, ATTENTION)
    node = INT8 * NODES + 4
    return {
        "`student`, s_phi as LoRA": Held("1 and three adapters", whole + score, student + score, node * score),
        "`student`, s_phi a full copy": Held("3", 2 * whole, whole + student, node * whole, 4),
        "`student`, everything full": Held("3", whole, 2 * whole, node * whole, 4),
        "DMD2's script": Held("3", whole, 2 * whole, 0),
        # Each node file holds teacher (bfloat16) and fake score (float32), and there are ten.
        "official DisBack": Held("3", whole, 2 * whole, 10 * 6 * whole),
    }


def table() -> str:
    """Return the README's table."""
    lines = [
        "| | | networks | weights, of them trained | weights and Adam | path on disk |",
        "|---|---|---|---|---|---|",
    ]
    for model, config in CONFIGS.items():
        for name, held in rows(config).items():
            path = f"{held.path / 1e9:.2f} GB" if held.path else "none"
            total, trained = (held.frozen + held.trained) / 1e6, held.trained / 1e6
            cells = (
                model,
                name,
                held.networks,
                f"{total:,.0f} M, {trained:,.0f} M",
                f"{held.bytes / 1e9:.1f} GB",
                path,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

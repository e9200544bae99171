"""Sample one image a prompt of a one-step LoRA student into a folder, for `fidelity` (torch-fidelity).

python benchmarks/paper/sample.py --teacher DIR_OR_HUB --lora OUT --prompts FILE --out IMAGES
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--lora", type=Path, required=True, help="--output of `disback_adapters.lcm_lora student`")
    parser.add_argument("--prompts", type=Path, required=True, help="one a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timestep", type=int, default=999, help="that of the training; 399 for SDXL")
    parser.add_argument("--count", type=int, default=30_000)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args(arguments)
    from diffusers import DiffusionPipeline, LCMScheduler

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(options.teacher)
    pipeline.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    pipeline.scheduler = LCMScheduler.from_pretrained(options.lora, subfolder="scheduler")
    pipeline.load_lora_weights(options.lora)
    pipeline.set_progress_bar_config(disable=True)
    prompts = options.prompts.read_text().splitlines()[: options.count]
    options.out.mkdir(parents=True, exist_ok=True)
    stream = torch.Generator(device).manual_seed(0)
    step = {"timesteps": [options.timestep], "guidance_scale": 1.0, "generator": stream}
    for first in range(0, len(prompts), options.batch):
        for i, image in enumerate(pipeline(prompts[first : first + options.batch], **step).images):
            image.save(options.out / f"{first + i:06d}.png")


if __name__ == "__main__":
    main()

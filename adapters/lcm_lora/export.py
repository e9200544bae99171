"""What people use: the student's LoRA or network as diffusers saves it, the scheduler, a card; and grids of samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.utils import make_image_grid
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import get_peft_model_state_dict

from disback_plugin import noise

if TYPE_CHECKING:
    from disback_adapters.lcm_lora.training import Trainer
    from PIL.Image import Image

__all__ = ["export", "grid", "samples"]

PUBLISHED = ("README.md", "*.safetensors", "scheduler/*", "unet/*", "transformer/*")
PRIVATE = ("checkpoint-*", "embeddings/*", "path/*", "samples/*")

CARD = """
# One-step student of {teacher}

Distilled with [DisBack](https://arxiv.org/abs/2408.15991), by `disback_adapters.lcm_lora` of disback-plugin.

```python
{code}
```

| to sample with it | |
|---|---|
| scheduler | {scheduler} |
| steps | one, at timestep {timestep} |
| `guidance_scale` | 1.0: the teacher's guidance of {guidance:g} is distilled in |

Trained for {steps} updates of batch {batch_size} with the loss `{loss}`, s_phi as `{fake_score}`, {disback}.
"""


def export(trainer: Trainer) -> None:
    """Write weights, scheduler and card into the output folder, and publish them if asked for."""
    options, output, role = trainer.options, trainer.output, trainer.cast.student.role
    component = role.denoiser.component
    if role.adapter is not None:
        weights = get_peft_model_state_dict(role.network, adapter_name=role.adapter)
        trainer.pipeline.save_lora_weights(
            output,
            **{
                f"{component}_lora_layers": weights,
                f"{component}_lora_adapter_metadata": role.network.peft_config[role.adapter].to_dict(),
            },
        )
    else:
        role.network.save_pretrained(output / component)
    trainer.cast.student.scheduler.save_pretrained(output / "scheduler")
    _card(trainer).save(output / "README.md")
    if options.push_to_hub:
        api = HfApi()
        repository = api.create_repo(options.hub_id or output.name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository, folder_path=output, allow_patterns=PUBLISHED, ignore_patterns=list(PRIVATE)
        )


def samples(trainer: Trainer, rows: list[int], *, seed: int) -> list[Image]:
    """Return one-step samples of some prompts, by their place in the list; no global random stream is used.

    Args:
        trainer: The run.
        rows: Places of the prompts.
        seed: Of the noise.
    """
    device, pipeline = trainer.accelerator.device, trainer.pipeline
    stream = torch.Generator().manual_seed(seed)
    z = torch.randn((len(rows), *trainer.updates.shape[1:]), generator=stream).to(device)
    conditions = {name: value.to(device) for name, value in trainer.embeddings.rows(rows).items()}
    with torch.no_grad(), trainer.accelerator.autocast():
        x = trainer.cast.student(z, conditions)
        vae = getattr(pipeline, "vae", None)
        if vae is not None:
            vae.to(device)
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            x = vae.decode(x.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
            vae.to("cpu")  # training does not need it
    images: list[Image] = pipeline.image_processor.postprocess(x.float().cpu(), output_type="pil")
    return images


def grid(trainer: Trainer, updates: int) -> None:
    """Write a grid of samples, of the first prompts and the same noise each time, and send it to the trackers."""
    count = min(trainer.options.sample_count, trainer.embeddings.count)
    picture = make_image_grid(samples(trainer, list(range(count)), seed=trainer.options.seed), rows=1, cols=count)
    folder = trainer.output / "samples"
    folder.mkdir(exist_ok=True)
    picture.save(folder / f"{updates:06d}.png")
    images = np.asarray(picture.convert("RGB"))[None]
    for tracker in trainer.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": images}, step=updates, **more)


def _card(trainer: Trainer) -> ModelCard:
    options, student = trainer.options, trainer.cast.student
    flow, component = isinstance(student.role.denoiser.noise, noise.RectifiedFlow), student.role.denoiser.component
    scheduler, timestep = type(student.scheduler).__name__, f"{float(student.time):g}"
    steps, here = "num_inference_steps=1" if flow else f"timesteps=[{timestep}]", options.hub_id or "OUTPUT"
    kind = type(getattr(trainer.pipeline, component)).__name__
    lora = student.role.adapter is not None
    code = [
        f"from diffusers import DiffusionPipeline, {scheduler}" + ("" if lora else f", {kind}"),
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{options.teacher}")'
        if lora
        else f'pipeline = DiffusionPipeline.from_pretrained("{options.teacher}", '
        f'{component}={kind}.from_pretrained("{here}", subfolder="{component}"))',
        f'pipeline.scheduler = {scheduler}.from_pretrained("{here}", subfolder="scheduler")',
        *([f'pipeline.load_lora_weights("{here}")'] if lora else []),
        f"image = pipeline(PROMPT, {steps}, guidance_scale=1.0).images[0]",
    ]
    text = CARD.format(
        **vars(options)
        | {"disback": _told(options.recording), "timestep": timestep, "scheduler": f"`{scheduler}`"}
        | {"code": "\n".join(code)},
    )
    data = ModelCardData(
        library_name="diffusers",
        base_model=None if Path(options.teacher).exists() else options.teacher,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "disback", *(["lora", "lcm-lora"] if lora else [])],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _told(recording: dict[str, object]) -> str:
    if recording.get("record") == 0:
        return "without DisBack"
    return f"the teacher walking back by the schedule `{recording.get('schedule', 'auto')}`"

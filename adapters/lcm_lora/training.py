"""Train: the loop of the two updates with DisBack attached by one statement, checkpoints, samples and the export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from disback_adapters.lcm_lora.options import Options
from disback_adapters.lcm_lora.pipelines import load
from disback_adapters.lcm_lora.updates import Updates, assign_roles
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from disback_plugin import Handle, attach, noise
from disback_plugin.errors import OptionError
from disback_plugin.plugins import Trackers

__all__ = ["Trainer", "train"]

LOG_EVERY = 10
STATE = "disback.json"
PUBLISHED = ["README.md", "*.safetensors", "scheduler/*", "unet/*", "transformer/*"]
PRIVATE = ["checkpoint-*", "embeddings/*", "path/*", "samples/*"]


def train(options: Options) -> Trainer:
    """Distil a one-step student; the output folder then holds what `DiffusionPipeline` loads.

    Raises:
        DisbackError: If something does not fit, before the first step.
    """
    trainer = Trainer(options)
    trainer.run()
    return trainer


class Trainer:
    """Hold everything of a run.

    Args:
        options: Options of the run.

    Raises:
        DisbackError: If something does not fit.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.output = options, Path(options.output)
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision, log_with=options.report_to, project_dir=options.output
        )
        set_seed(options.seed)  # the same weights on every process
        with self.accelerator.main_process_first():  # the other processes find the embeddings on disk
            self.pipeline, denoiser, self.embeddings, pixels = load(options, self.accelerator.device)
        self.roles = assign_roles(options, self.pipeline, denoiser)
        size = pixels // self.pipeline.vae_scale_factor
        self.updates = Updates(options, self.accelerator, self.roles, self.embeddings, size)
        self.ema = EMAModel(self.updates.weights, decay=options.ema_decay) if options.ema_decay else None
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        set_seed(options.seed, device_specific=True)

    def run(self) -> None:
        """Train to the end, and export."""
        options, state = self.options, self.load_checkpoint()
        if options.report_to:
            self.accelerator.init_trackers("disback-lcm-lora")
        bar = tqdm(total=options.steps, disable=not self.accelerator.is_main_process or None)
        with self._attach(state) as handle, bar:
            while handle.generator_updates < options.steps:
                for _ in range(options.fake_score_updates):
                    fake_score_loss = self.updates.update_fake_score()
                if handle.phase == "recording":
                    self.updates.optimizer.step()  # without gradients, which would be computed for nothing
                    bar.set_postfix_str("recording", refresh=False)
                    continue
                loss = self.updates.update_generator()
                self.after_update(handle, {"loss": loss, "fake_score_loss": fake_score_loss})
                bar.update(handle.generator_updates - bar.n)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with self.averaged():
                self.export()
        self.accelerator.end_training()

    def _attach(self, state: dict[str, Any] | None) -> Handle:
        recording = self.options.recording
        tracked = self.accelerator.is_main_process and self.accelerator.trackers
        return attach(
            teacher=self.roles.teacher.weights,
            fake_score=self.roles.fake_score.weights,
            generator_optimizer=self.updates.optimizer,
            fake_score_optimizer=self.updates.fake_score_optimizer,
            path=None if recording.get("record") == 0 else self.options.path or self.output / "path",
            state=state,
            plugins=(Trackers(self.accelerator),) if tracked else (),
            **recording,
        )

    def after_update(self, handle: Handle, values: dict[str, Tensor]) -> None:
        """Average, log, sample and save, as far as each is due after an update of the generator."""
        options, updates = self.options, handle.generator_updates
        if self.ema is not None:
            self.ema.step(self.updates.weights)
        if updates % LOG_EVERY == 0:
            self.accelerator.log({name: value.item() for name, value in values.items()}, step=updates)
        if options.sample_every and updates % options.sample_every == 0 and self.accelerator.is_main_process:
            with self.averaged():
                self.save_grid(updates)
        if options.checkpoint_every and updates % options.checkpoint_every == 0:
            self.save_checkpoint(handle)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the student the average of its weights inside the context, if there is one."""
        if self.ema is None:
            yield
            return
        weights = self.updates.weights
        self.ema.store(weights)
        self.ema.copy_to(weights)
        try:
            yield
        finally:
            self.ema.restore(weights)

    # -- checkpoints: accelerate's own, and beside them the trained weights and the state of the handle ---------------

    def save_checkpoint(self, handle: Handle) -> None:
        """Save a checkpoint. Every process calls this."""
        folder = self.output / f"checkpoint-{handle.generator_updates}"
        self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            for role in ("student", "fake_score"):
                weights = getattr(self.roles, role).weights.state_dict()
                save_file({name: w.contiguous() for name, w in weights.items()}, folder / f"{role}.safetensors")
            (folder / STATE).write_text(json.dumps(handle.state_dict()))  # last: it marks a complete checkpoint
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Load the checkpoint that `options.resume` names; return the handle's state in it, or None.

        Raises:
            OptionError: If there is no complete checkpoint.
            MismatchError: If the checkpoint is of another teacher, or of LoRA adapters of another rank.
        """
        resume = self.options.resume
        if resume is None:
            return None
        folder = Path(resume)
        if resume == "latest":
            complete = [file.parent for file in self.output.glob(f"checkpoint-*/{STATE}")]
            folder = max(complete, key=lambda each: int(each.name.partition("-")[2]), default=self.output)
        if not (folder / STATE).exists():
            raise OptionError(
                f"--resume {resume}, and no {STATE} in {folder}",
                expected="a folder that --checkpoint_every wrote",
                cure="correct the name, or omit --resume",
            )
        for role in ("student", "fake_score"):
            getattr(self.roles, role).weights.load_state_dict(load_file(folder / f"{role}.safetensors"))
        self.accelerator.load_state(str(folder))
        return json.loads((folder / STATE).read_text())

    # -- samples, and the export --------------------------------------------------------------------------------------

    def save_grid(self, updates: int) -> None:
        """Write a grid of one-step samples and send it to the trackers.

        The prompts are the first ones and the noise is the same each time; the global random streams are not used.
        """
        options, device, vae = self.options, self.accelerator.device, getattr(self.pipeline, "vae", None)
        count = min(options.sample_count, self.embeddings.count)
        z = torch.randn((count, *self.updates.shape[1:]), generator=torch.Generator().manual_seed(options.seed))
        conditions = {name: value.to(device) for name, value in self.embeddings.rows(range(count)).items()}
        with torch.no_grad(), self.accelerator.autocast():
            x = self.roles.student.generate(z.to(device), conditions)
            if vae is not None:
                vae.to(device)
                shift = getattr(vae.config, "shift_factor", None) or 0.0
                x = vae.decode(x.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
                vae.to("cpu")  # training does not need it
        images = self.pipeline.image_processor.postprocess(x.float().cpu(), output_type="pil")
        picture = make_image_grid(images, rows=1, cols=count)
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{updates:06d}.png")
        images = np.asarray(picture.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": images}, step=updates, **more)

    def export(self) -> None:
        """Write weights, scheduler and card into the output folder, and publish them if asked."""
        options, output, student = self.options, self.output, self.roles.student
        component, adapter, network = student.denoiser.component, student.lora_adapter, student.network
        if adapter is None:
            network.save_pretrained(output / component)
        else:
            layers = {
                f"{component}_lora_layers": get_peft_model_state_dict(network, adapter_name=adapter),
                f"{component}_lora_adapter_metadata": network.peft_config[adapter].to_dict(),
            }
            self.pipeline.save_lora_weights(output, **layers)
        student.scheduler.save_pretrained(output / "scheduler")
        self._card().save(output / "README.md")
        if options.push_to_hub:
            api = HfApi()
            repository = api.create_repo(options.hub_id or output.name, exist_ok=True).repo_id
            api.upload_folder(repo_id=repository, folder_path=output, allow_patterns=PUBLISHED, ignore_patterns=PRIVATE)

    def _card(self) -> ModelCard:
        options, student = self.options, self.roles.student
        data = ModelCardData(
            library_name="diffusers",
            base_model=None if Path(options.teacher).exists() else options.teacher,
            pipeline_tag="text-to-image",
            tags=["text-to-image", "diffusers", "disback", *(["lora", "lcm-lora"] if student.lora_adapter else [])],
        )
        return ModelCard.from_template(
            data,
            template_path=Path(__file__).with_name("card.md"),
            options=options,
            student=student,
            flow=isinstance(student.denoiser.noise, noise.RectifiedFlow),
            scheduler=type(student.scheduler).__name__,
            network=type(student.network).__name__,
        )

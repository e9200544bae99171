"""Train a one-step student: the updates of the fake score (Eq. 7) and of the generator (Eq. 8), and the loop around.

A student is measured while it trains: the Frechet distance of its samples from the teacher's, for prompts held out. The
features are a timm model's, so that the distance is NOT the FID. The references are samples of the original teacher
under its guidance, in many steps: no data set is needed, and the teacher is what the student is distilled from.

DisBack is attached by one statement. Gradients are averaged over processes here and not by DDP, which does not support
several roles in one network.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from disback_adapters.lcm_lora.pipelines import Denoiser, load
from disback_adapters.lcm_lora.roles import LOSSES, SUMMED, Options, assign_roles, noised
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import get_peft_model_state_dict
from torch import Tensor
from torch.optim import Adam
from torchvision.utils import make_grid, save_image

from disback_plugin import Handle, attach, kernels, metrics, noise
from disback_plugin.errors import OptionError
from disback_plugin.plugins import Trackers

LOG_EVERY = 10
# Largest norm of the gradient of a loss that is a mean over elements, as in DMD2 (main/train_sd.py:366-380).
CLIP = 10.0
# Times at which the two scores are compared, as shares of the longest one, as in DMD2 (main/sd_guidance.py:179).
COMPARED = (0.02, 0.98)
TEACHER_STEPS = 25  # of the sampler of the references
PARTIAL = "checkpoint.partial"
PUBLISHED = ["README.md", "pytorch_lora_weights.safetensors", "scheduler/*", "unet/*", "transformer/*"]


class Trainer:
    """Distil a one-step student; after `run` the output folder holds what `DiffusionPipeline` loads.

    Args:
        options: Options of the run.

    Raises:
        DisbackError: If something does not fit, before the first step.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.output = options, Path(options.output)
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision, log_with=options.report_to, project_dir=options.output
        )
        set_seed(options.seed)  # the same weights on every process
        with self.accelerator.main_process_first():  # the other processes find the embeddings on disk
            shutil.rmtree(self.output / PARTIAL, ignore_errors=True)
            self.pipeline, denoiser, self.embeddings, pixels = load(options, self.accelerator.device)
        self.teacher, self.fake_score, self.student = assign_roles(options, self.pipeline, denoiser)
        size = pixels // self.pipeline.vae_scale_factor
        self.shape = (options.batch_size, denoiser.channels, size, size)
        held_out = options.evaluate_count if options.evaluate else 0
        self.prompts = self.embeddings.count - held_out  # those that the student is trained on, the first ones
        if self.prompts < 1:
            found = f"--evaluate_count {held_out} of {self.embeddings.count} prompts"
            raise OptionError(found, expected="prompts to train on, too", cure="add prompts, or lower --evaluate_count")
        self.weights = self.student.trainable()
        self.optimizer, self.fake_score_optimizer = self.accelerator.prepare(
            Adam(self.weights, lr=options.learning_rate),
            Adam(self.fake_score.trainable(), lr=options.fake_score_learning_rate),
        )
        self.accelerator.register_for_checkpointing(self.student.weights, self.fake_score.weights)
        self.ema = EMAModel(self.weights, decay=options.ema_decay) if options.ema_decay else None
        if self.ema is not None:
            self.accelerator.register_for_checkpointing(self.ema)
        set_seed(options.seed, device_specific=True)

    def run(self) -> None:
        """Train to the end, and export."""
        options, accelerator, checkpoint = self.options, self.accelerator, self.checkpoint()
        recording = options.recording
        if options.report_to:
            accelerator.init_trackers("disback-lcm-lora")
        bar = tqdm(total=options.steps, disable=not accelerator.is_main_process or None)
        attached = attach(
            teacher=self.teacher.weights,
            fake_score=self.fake_score.weights,
            generator_optimizer=self.optimizer,
            fake_score_optimizer=self.fake_score_optimizer,
            path=None if recording.get("record") == 0 else options.path or self.output / "path",
            evaluate=frechet_distance(self, options.evaluate.partition(":")[2]) if options.evaluate else None,
            evaluate_every=options.evaluate_every,
            plugins=(Trackers(accelerator),) if accelerator.is_main_process and accelerator.trackers else (),
            **recording,
        )
        with attached as handle, bar:
            accelerator.register_for_checkpointing(handle)
            if checkpoint is not None:
                accelerator.load_state(str(checkpoint))  # the state of the handle is loaded last
                if self.ema is not None:
                    self.ema.to(accelerator.device)
            while handle.generator_updates < options.steps:
                for _ in range(options.fake_score_updates):
                    fake_score_loss = self.update_fake_score()
                if handle.phase == "recording":
                    self.optimizer.step()  # without gradients, which would be computed for nothing
                    bar.set_postfix_str("recording", refresh=False)
                    continue
                loss = self.update_generator()
                self.after_update(handle, {"loss": loss, "fake_score_loss": fake_score_loss})
                bar.update(handle.generator_updates - bar.n)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with self.averaged():
                self.export()
        accelerator.end_training()

    # -- the two updates ----------------------------------------------------------------------------------------------

    def update_fake_score(self) -> Tensor:
        """Fit s_phi to samples of the present student; return the loss, shape ()."""
        with torch.no_grad():
            x, conditions = self._sample()
        x_t, t, eps, at_t = noised(self.teacher.noise, x)
        with self.accelerator.autocast():
            output = self.fake_score(x_t, t, conditions)
        loss = kernels.denoising(output, x, eps, prediction=self.teacher.prediction, **at_t)
        self._step(loss, self.fake_score, self.fake_score_optimizer)
        return loss.detach()

    def update_generator(self) -> Tensor:
        """Move the student along the score difference; return the loss, shape (), which measures no progress."""
        name = self.options.loss
        x, conditions = self._sample()
        x_t, t, eps, at_t = noised(self.teacher.noise, x.detach(), *COMPARED)
        options = {"prediction": self.teacher.prediction, "weight": LOSSES[name](**at_t)} | at_t
        options |= {"eps": eps} if name == "dmd" else {}
        with torch.no_grad(), self.accelerator.autocast():
            fake = self.fake_score(x_t, t, conditions)
            real, guidance = self.run_teacher(x_t, t, conditions)
        loss = getattr(kernels, name)(x, real, fake, guidance=guidance, **options)
        clip = CLIP * (x[0].numel() if name in SUMMED else 1)
        self._step(loss, self.student, self.optimizer, clip)
        return loss.detach()

    def run_teacher(self, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> tuple[Tensor, float | None]:
        """Return the teacher's output and None, or its output on the doubled batch and the scale of its guidance."""
        guidance, null = self.options.guidance, self.embeddings.null
        if guidance == 1:
            return self.teacher(x_t, t, conditions), None
        # Both branches in one batch, that of no prompt first.
        both = {name: torch.cat([null[name].to(own).expand_as(own), own]) for name, own in conditions.items()}
        return self.teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both), guidance

    def _step(self, loss: Tensor, role: Denoiser, optimizer: Any, clip: float = CLIP) -> None:
        weights = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        with role.activated():  # gradient checkpointing runs the forward again
            self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:
            for weight in weights:
                if weight.grad is not None:
                    weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")
        self.accelerator.clip_grad_norm_(weights, clip)
        optimizer.step()

    def _sample(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return samples of the student for random prompts, and their conditions."""
        # All numbers are drawn from the global streams, which a checkpoint holds.
        conditions = self.conditions(torch.randint(self.prompts, self.shape[:1]).tolist())
        z = torch.randn(self.shape, device=self.accelerator.device)
        with self.accelerator.autocast():
            return self.student.generate(z, conditions), conditions

    def conditions(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        """Return the conditions of the prompts at these indices, on the device."""
        rows = self.embeddings.rows(prompts)
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in rows.items()}

    def same_noise(self, count: int) -> Tensor:
        """Return unit noise for so many samples, the same at each call, without the global random streams."""
        stream = torch.Generator().manual_seed(self.options.seed)
        return torch.randn((count, *self.shape[1:]), generator=stream).to(self.accelerator.device)

    # -- after an update ----------------------------------------------------------------------------------------------

    def after_update(self, handle: Handle, values: dict[str, Tensor]) -> None:
        """Average, log, sample and save, as far as each is due after an update of the generator."""
        options, updates = self.options, handle.generator_updates
        if self.ema is not None:
            self.ema.step(self.weights)
        if updates % LOG_EVERY == 0:
            self.accelerator.log({name: value.item() for name, value in values.items()}, step=updates)
        if options.sample_every and updates % options.sample_every == 0 and self.accelerator.is_main_process:
            with self.averaged():
                self.save_grid(updates)
        if options.checkpoint_every and updates % options.checkpoint_every == 0:
            self.save_checkpoint(updates)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the student the average of its weights inside the context, if there is one."""
        if self.ema is not None:
            self.ema.store(self.weights)
            self.ema.copy_to(self.weights)
        yield
        if self.ema is not None:
            self.ema.restore(self.weights)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, updates: int) -> None:
        """Save a checkpoint, whole or not at all. Every process calls this."""
        partial, folder = self.output / PARTIAL, self.output / f"checkpoint-{updates}"
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> str | Path | None:
        """Return the folder of the checkpoint that `options.resume` names; raise OptionError if there is none."""
        folder = self.options.resume
        if folder == "latest":
            saved = self.output.glob("checkpoint-*")
            folder = max(saved, key=lambda each: int(each.name.partition("-")[2]), default=folder)
        if folder is not None and not Path(folder).is_dir():
            expected = "a folder that --checkpoint_every wrote"
            raise OptionError(f"--resume {folder}", expected=expected, cure="correct the name, or omit --resume")
        return folder

    # -- samples, and the export --------------------------------------------------------------------------------------

    def save_grid(self, updates: int) -> None:
        """Write a grid of one-step samples and send it to the trackers: of the first prompts, with the same noise."""
        count = min(self.options.sample_count, self.embeddings.count)
        with torch.no_grad(), self.accelerator.autocast():
            images = self.decode(self.student.generate(self.same_noise(count), self.conditions(range(count))))
        grid = make_grid(images.cpu(), nrow=count, normalize=True, value_range=(-1, 1))
        (self.output / "samples").mkdir(exist_ok=True)
        save_image(grid, self.output / "samples" / f"{updates:06d}.png")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"samples": grid[None]}, step=updates)

    def decode(self, x: Tensor) -> Tensor:
        """Return the images of samples, shape (B, C, H, W), in float32."""
        vae = getattr(self.pipeline, "vae", None)
        if vae is not None:
            vae.to(x.device)
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            x = vae.decode(x.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
            vae.to("cpu")  # training does not need it
        return x.float()

    def export(self) -> None:
        """Write weights, scheduler and card into the output folder, and publish them if asked."""
        options, output, student = self.options, self.output, self.student
        component, adapter, network = student.component, student.lora_adapter, student.network
        if adapter is None:
            network.save_pretrained(output / component)
        else:
            weights, config = get_peft_model_state_dict(network, adapter_name=adapter), network.peft_config[adapter]
            layers = {f"{component}_lora_layers": weights, f"{component}_lora_adapter_metadata": config.to_dict()}
            self.pipeline.save_lora_weights(output, **layers)
        student.scheduler.save_pretrained(output / "scheduler")
        data = ModelCardData(
            library_name="diffusers",
            base_model=None if Path(options.teacher).exists() else options.teacher,
            pipeline_tag="text-to-image",
            tags=["text-to-image", "diffusers", "disback"] + (["lora", "lcm-lora"] if adapter else []),
        )
        template = Path(__file__).with_name("card.md")
        card = ModelCard.from_template(data, template_path=template, options=options, student=student)
        card.save(output / "README.md")
        if options.push_to_hub:
            api = HfApi()
            repository = api.create_repo(options.hub_id or output.name, exist_ok=True).repo_id
            api.upload_folder(repo_id=repository, folder_path=output, allow_patterns=PUBLISHED)


# -- evaluation -------------------------------------------------------------------------------------------------------


def frechet_distance(trainer: Trainer, model: str) -> Callable[[], dict[str, float]]:
    """Return a function for `attach(evaluate=)`, which draws the same noise for the same prompts at each call.

    Args:
        trainer: The trainer; the last `evaluate_count` of its prompts are the held-out ones.
        model: Name of the timm model, whose weights are downloaded.

    Raises:
        OptionError: If timm has no such model.
    """
    size, first, count = trainer.options.batch_size, trainer.prompts, trainer.options.evaluate_count
    features = metrics.features(model, device=trainer.accelerator.device)
    batches = [*zip(trainer.same_noise(count).split(size), torch.arange(first, first + count).split(size), strict=True)]

    def extract(generate: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Tensor:
        found = []
        with torch.no_grad(), trainer.accelerator.autocast():
            for z, prompts in batches:
                x = generate(z, trainer.conditions(prompts.tolist()))
                found.append(features(trainer.decode(x).clamp(-1, 1)))
        return torch.cat(found)

    references = cache(partial(extract, partial(teacher_samples, trainer)))

    def evaluate() -> dict[str, float]:
        if not trainer.accelerator.is_main_process:
            return {}
        expected = references()
        with trainer.averaged():
            return {"distance_frechet": metrics.frechet_distance(extract(trainer.student.generate), expected)}

    return evaluate


def teacher_samples(trainer: Trainer, z: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """Return the teacher's samples from unit noise z under its guidance: DDIM, or Euler for flow matching."""
    teacher, config = trainer.teacher, trainer.pipeline.scheduler.config
    if isinstance(teacher.noise, noise.RectifiedFlow):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, use_dynamic_shifting=False)
    else:
        scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.set_timesteps(TEACHER_STEPS, device=z.device)
    x = z
    for time in scheduler.timesteps:
        output, guidance = trainer.run_teacher(x, (time / teacher.time_scale).expand(len(x)), conditions)
        if guidance is not None:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        x = scheduler.step(output, time, x, return_dict=False)[0]
    return x

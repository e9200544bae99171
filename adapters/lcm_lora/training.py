"""The trainer: a loop of the two updates, with DisBack attached by one statement, and what surrounds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from diffusers.training_utils import EMAModel
from disback_adapters.lcm_lora import checkpoints, loading, networks
from disback_adapters.lcm_lora.export import export, grid
from disback_adapters.lcm_lora.options import Options
from disback_adapters.lcm_lora.prompts import Embeddings, described, prompts_of
from disback_adapters.lcm_lora.updates import Updates

from disback_plugin import Handle, attach
from disback_plugin.plugins import Trackers

__all__ = ["Trainer", "train"]

LOG_EVERY = 10


def train(options: Options) -> Trainer:
    """Distil a one-step student; the output folder then holds what `DiffusionPipeline` loads.

    Raises:
        DisbackError: If something does not fit, before the first step.
    """
    trainer = Trainer(options)
    trainer.run()
    return trainer


class Trainer:
    """Everything that a run holds.

    Args:
        options: The user's.

    Raises:
        DisbackError: If something does not fit.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.output = options, Path(options.output)
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision, log_with=options.report_to, project_dir=options.output
        )
        set_seed(options.seed)  # the same weights on every process
        prompts = prompts_of(options.prompts, options.prompt_column)
        self.pipeline, self.embeddings, self.pixels = _loaded(options, prompts, self.accelerator)
        self.cast = networks.cast(options, self.pipeline)
        size = self.pixels // self.pipeline.vae_scale_factor
        self.updates = Updates(options, self.accelerator, self.cast, self.embeddings, size)
        self.ema = EMAModel(self.updates.weights, decay=options.ema_decay) if options.ema_decay else None
        checkpoints.register(self)
        set_seed(options.seed, device_specific=True)

    def run(self) -> None:
        """Train to the end, and export."""
        options = self.options
        if options.report_to:
            self.accelerator.init_trackers("disback-lcm-lora")
        state = checkpoints.load(self)
        total = tqdm(total=options.steps, disable=not self.accelerator.is_main_process or None)
        with self._attached(state) as handle, total as bar:
            while handle.generator_updates < options.steps:
                for _ in range(options.fake_score_updates):
                    fake_score_loss = self.updates.update_fake_score()
                if handle.phase == "recording":
                    self.updates.step_nothing()
                    bar.set_postfix_str("recording", refresh=False)
                    continue
                loss = self.updates.update_generator()
                self.after_update(handle, {"loss": loss, "fake_score_loss": fake_score_loss})
                bar.update(handle.generator_updates - bar.n)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with self.averaged():
                export(self)
        self.accelerator.end_training()

    def _attached(self, state: dict[str, Any] | None) -> Handle:
        recording = self.options.recording
        tracked = self.accelerator.is_main_process and self.accelerator.trackers
        return attach(
            teacher=self.cast.teacher.weights,
            fake_score=self.cast.fake_score.weights,
            generator_optimizer=self.updates.optimizer,
            fake_score_optimizer=self.updates.fake_score_optimizer,
            path=None if recording.get("record") == 0 else self.options.path or self.output / "path",
            state=state,
            plugins=(Trackers(self.accelerator),) if tracked else (),
            **recording,
        )

    def after_update(self, handle: Handle, values: dict[str, torch.Tensor]) -> None:
        """Average, log, sample and save, as far as it is due after an update of the generator."""
        options, updates = self.options, handle.generator_updates
        if self.ema is not None:
            self.ema.step(self.updates.weights)
        if updates % LOG_EVERY == 0:
            self.accelerator.log({name: value.item() for name, value in values.items()}, step=updates)
        if options.sample_every and updates % options.sample_every == 0 and self.accelerator.is_main_process:
            with self.averaged():
                grid(self, updates)
        if options.checkpoint_every and updates % options.checkpoint_every == 0:
            checkpoints.save(self, handle)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the average of the student's weights inside, if there is one."""
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


def _loaded(options: Options, prompts: list[str], accelerator: Accelerator) -> tuple[Any, Embeddings, int]:
    """Return the pipeline without its text encoders, the prompts' conditions, and the images' size in pixels."""
    folder = Path(options.output) / "embeddings"
    known = described(options.teacher, prompts, options.resolution, options.mixed_precision)
    with accelerator.main_process_first():  # the others find them on disk
        there = Embeddings.are_of(folder, known)
        pipeline = loading.load(options, with_text=not there, device=accelerator.device)
        pixels = loading.pixels_of(pipeline, options.resolution)
        if not there:
            Embeddings.make(folder, pipeline, prompts, pixels, known)
            loading.forget_text(pipeline)
    return pipeline, Embeddings(folder), pixels

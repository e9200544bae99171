"""Train a one-step student: options, the loop with DisBack attached by one statement, checkpoints, samples, export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from diffusers.training_utils import EMAModel
from disback_adapters.lcm_lora.pipelines import load
from disback_adapters.lcm_lora.updates import LOSSES, Updates, assign_roles
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import get_peft_model_state_dict
from torch import Tensor
from torchvision.utils import make_grid, save_image
from transformers import HfArgumentParser

from disback_plugin import Handle, attach, schedules
from disback_plugin.errors import OptionError
from disback_plugin.plugins import Trackers

LOG_EVERY = 10
PARTIAL = "checkpoint.partial"
PUBLISHED = ["README.md", "pytorch_lora_weights.safetensors", "scheduler/*", "unet/*", "transformer/*"]


def _option(help: str, default: Any = MISSING, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """Hold the arguments of the trainer, which have the same names on the command line.

    Raises:
        OptionError: If a recipe is given with one of the options that it sets, or a LoRA for a student that has none.

    Example:
        >>> Options(teacher="sd15", prompts="prompts.txt", output="out", recipe="sdxl").recording["record"]
        1000
    """

    teacher: str = _option("folder or hub id of the teacher's pipeline")
    prompts: str = _option("text file with one prompt a line")  # from Python a list of prompts too
    output: str = _option("folder for weights, card, path, embeddings and checkpoints")
    student: str = _option("train a LoRA of the student, or all of its weights", "lora", ("lora", "full"))
    student_lora: str | None = _option("a LoRA to start from, as latent-consistency/lcm-lora-sdv1-5", None)
    fake_score: str = _option("s_phi and nodes as LoRA on the teacher, or as full copies", "lora", ("lora", "full"))
    fake_score_layers: str = _option("layers of s_phi's LoRA; all are the student's", "attention", ("attention", "all"))
    prediction: str | None = _option("the prediction that the teacher's scheduler must state, to be checked", None)
    rank: int = _option("rank of every LoRA", 64)
    timestep: int | None = _option("timestep of the one step; 399 for SDXL (the paper's), else the first", None)
    resolution: int | None = _option("height and width of the images in pixels; the teacher's own unless given", None)
    guidance: float = _option("scale of the teacher's classifier-free guidance; 1 is none", 7.5)
    loss: str = _option("generator loss: Eq. 8 with the weights of its authors", "diff_instruct", tuple(LOSSES))
    steps: int = _option("updates of the generator, recording not counted", 10_000)
    fake_score_updates: int = _option("updates of s_phi for each of the generator", 1)
    batch_size: int = _option("samples of an update, on each process", 4)
    learning_rate: float = _option("learning rate of the generator's Adam", 1e-4)
    fake_score_learning_rate: float = _option("learning rate of s_phi's Adam", 1e-4)
    ema_decay: float = _option("decay of the average of the student's weights that is exported; 0 is none", 0.0)
    record: int | None = _option("recording iterations at most; 0 for no DisBack (200)", None)
    every: int | None = _option("recording iterations between two nodes (50)", None)
    schedule: str | None = _option("auto, warm, ramp:K, fixed:b,c,... (auto)", None)
    recipe: str | None = _option("instead of these three: a setting of the paper, sdxl or lcm-lora", None)
    path: str | None = _option("folder of the path; OUTPUT/path unless given", None)
    mixed_precision: str = _option("precision of frozen weights and forwards", "no", ("no", "bf16"))
    gradient_checkpointing: bool = _option("trade time for memory", False)
    checkpoint_every: int = _option("generator updates between two checkpoints; 0 for none", 0)
    resume: str | None = _option("folder of a checkpoint, or latest", None)
    sample_every: int = _option("generator updates between two grids of samples; 0 for none", 0)
    sample_count: int = _option("samples in a grid, of the first prompts", 4)
    report_to: str | None = _option("a tracker of accelerate: tensorboard, wandb, ...", None)
    seed: int = _option("seed of weights, prompts and noise", 0)
    push_to_hub: bool = _option("publish the output folder's weights and card", False)
    hub_id: str | None = _option("repository to publish to; the output folder's name unless given", None)

    def __post_init__(self) -> None:
        _ = self.recording
        if self.student == "full" and self.student_lora is not None:
            raise OptionError("--student full and --student_lora", expected="one of them", cure="omit one")

    @property
    def recording(self) -> dict[str, Any]:
        """Return the arguments `record`, `every` and `schedule` of `attach` that were given, or those of the recipe."""
        values = {name: getattr(self, name) for name in ("record", "every", "schedule")}
        given = {name: value for name, value in values.items() if value is not None}
        if self.recipe is None:
            return given
        if given:
            found = f"--recipe {self.recipe} and {', '.join(f'--{name}' for name in given)}"
            raise OptionError(found, expected="a recipe, which sets all three, or these", cure="omit one")
        return schedules.recipe(self.recipe).options


def read(arguments: Sequence[str]) -> Options:
    """Return the options of a command line.

    Example:
        >>> read(["--teacher", "sd15", "--prompts", "prompts.txt", "--output", "out", "--rank", "8"]).rank
        8
    """
    parser = HfArgumentParser(Options, prog="python -m disback_adapters.lcm_lora student", allow_abbrev=False)
    return Options(**vars(parser.parse_args(arguments)))


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
            shutil.rmtree(self.output / PARTIAL, ignore_errors=True)
            self.pipeline, denoiser, self.embeddings, pixels = load(options, self.accelerator.device)
        self.roles = assign_roles(options, self.pipeline, denoiser)
        size = pixels // self.pipeline.vae_scale_factor
        self.updates = Updates(options, self.accelerator, self.roles, self.embeddings, size)
        self.accelerator.register_for_checkpointing(self.roles.student.weights, self.roles.fake_score.weights)
        self.ema = EMAModel(self.updates.weights, decay=options.ema_decay) if options.ema_decay else None
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
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
            teacher=self.roles.teacher.weights,
            fake_score=self.roles.fake_score.weights,
            generator_optimizer=self.updates.optimizer,
            fake_score_optimizer=self.updates.fake_score_optimizer,
            path=None if recording.get("record") == 0 else options.path or self.output / "path",
            plugins=(Trackers(accelerator),) if accelerator.is_main_process and accelerator.trackers else (),
            **recording,
        )
        with attached as handle, bar:
            accelerator.register_for_checkpointing(handle)
            if checkpoint is not None:
                accelerator.load_state(str(checkpoint))  # the state of the handle is loaded last
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
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with self.averaged():
                self.export()
        accelerator.end_training()

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
            self.save_checkpoint(updates)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the student the average of its weights inside the context, if there is one."""
        if self.ema is not None:
            self.ema.store(self.updates.weights)
            self.ema.copy_to(self.updates.weights)
        yield
        if self.ema is not None:
            self.ema.restore(self.updates.weights)

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
        grid = make_grid(x.float().cpu(), nrow=count, normalize=True, value_range=(-1, 1))
        (self.output / "samples").mkdir(exist_ok=True)
        save_image(grid, self.output / "samples" / f"{updates:06d}.png")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"samples": grid[None]}, step=updates)

    def export(self) -> None:
        """Write weights, scheduler and card into the output folder, and publish them if asked."""
        options, output, student = self.options, self.output, self.roles.student
        component, adapter, network = student.denoiser.component, student.lora_adapter, student.network
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

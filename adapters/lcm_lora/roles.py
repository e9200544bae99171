"""Define the options of the trainer, and the three roles that they describe: teacher, fake score and student.

| student | fake score | networks in memory                                                                    |
|---------|------------|---------------------------------------------------------------------------------------|
| lora    | lora       | one, with three LoRA adapters: the teacher's nodes, s_phi, the student                |
| full    | lora       | two: the teacher's with two LoRA adapters, and the student                            |
| lora    | full       | three: teacher, s_phi, and the student's base, since nodes are written into the teacher |
| full    | full       | three                                                                                 |
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
from disback_adapters.lcm_lora.pipelines import Denoiser
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from torch import Tensor
from transformers import HfArgumentParser

from disback_plugin import ScoreNetwork, lora, noise, schedules
from disback_plugin.errors import OptionError

# Generator losses of disback_plugin.kernels, and the weight w(t) of their authors as a function of alpha_t and sigma_t.
LOSSES = {
    "diff_instruct": lambda alpha, sigma: (sigma / alpha) ** 2,
    "vsd": lambda alpha, sigma: sigma**2,
    "dmd": lambda alpha, sigma: 1.0,
}
# Those that sum over a sample's elements, where the others take the mean.
SUMMED = ("diff_instruct", "vsd")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The LoRA of s_phi and the nodes is on the attention alone, as in ProlificDreamer; the student's is as in diffusers'
# LCM scripts (train_lcm_distill_lora_sd_wds.py:1001), and on both streams of a transformer.
STUDENT = {
    "unet": (
        *ATTENTION,
        *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
        *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    ),
    "transformer": (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
}
SDXL_TIMESTEP = 399


def _option(help: str, default: Any = MISSING, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """Hold the arguments of the trainer, which have the same names on the command line.

    Raises:
        OptionError: If a recipe is given with one of the options that it sets, or a LoRA for a student that has none,
            or if the evaluation is not known.

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
    evaluate: str | None = _option("frechet:TIMM_MODEL, a distance from the teacher's samples", None)
    evaluate_every: int = _option("generator updates between two evaluations", 1_000)
    evaluate_count: int = _option("the last prompts, held out of the training for --evaluate", 256)
    report_to: str | None = _option("a tracker of accelerate: tensorboard, wandb, ...", None)
    seed: int = _option("seed of weights, prompts and noise", 0)
    push_to_hub: bool = _option("publish the output folder's weights and card", False)
    hub_id: str | None = _option("repository to publish to; the output folder's name unless given", None)

    def __post_init__(self) -> None:
        _ = self.recording
        kind, _, model = (self.evaluate or "").partition(":")
        if self.evaluate is not None and (kind != "frechet" or not model or self.evaluate_count < 2):
            found = f"--evaluate {self.evaluate} --evaluate_count {self.evaluate_count}"
            raise OptionError(found, expected="frechet:TIMM_MODEL on 2 prompts or more", cure="name a model of timm")
        if self.student == "full" and self.student_lora is not None:
            raise OptionError("--student full and --student_lora", expected="one of them", cure="omit one")
        if self.push_to_hub:
            name = self.hub_id or Path(self.output).name
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                cure = "pass --hub_id USER/NAME"
                raise OptionError(f"the hub name {name!r}", expected="letters, digits, - _ .", cure=cure) from error

    @property
    def recording(self) -> dict[str, Any]:
        """Return the arguments `record`, `every` and `schedule` of `attach` that were given, or those of the recipe."""
        return schedules.recording_options(self)


def read(arguments: Sequence[str]) -> Options:
    """Return the options of a command line.

    Example:
        >>> read(["--teacher", "sd15", "--prompts", "prompts.txt", "--output", "out", "--rank", "8"]).rank
        8
    """
    parser = HfArgumentParser(Options, prog="python -m disback_adapters.lcm_lora student", allow_abbrev=False)
    return Options(**vars(parser.parse_args(arguments)))


@dataclass(frozen=True)
class Student(Denoiser):
    """The one-step generator: x = one step, from noise, of the scheduler that samples with it later.

    For LCMScheduler that is x = c_skip(t) z + c_out(t) x_0(z, t), LCM's own parametrisation (arXiv 2310.04378, Eq. 9),
    and for flow matching x = z - v(z, 1).
    """

    scheduler: Any = None

    def generate(self, z: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return samples x, of the shape of the unit noise z."""
        scheduler = copy.copy(self.scheduler)  # a scheduler counts its steps
        time = scheduler.timesteps[0]
        t = (time / self.time_scale).expand(len(z)).to(z.device)
        return scheduler.step(self(z, t, conditions), time, z, return_dict=False)[0]


def assign_roles(options: Options, pipeline: Any, denoiser: Denoiser) -> tuple[Denoiser, Denoiser, Student]:
    """Return teacher, fake score and student with their networks and LoRA adapters; the pipeline gets the student's.

    Raises:
        OptionError: If a rank does not fit.
    """
    base, component = denoiser.network, denoiser.component
    shared = options.fake_score == options.student == "lora"
    network = base if shared else copy.deepcopy(base)
    setattr(pipeline, component, network)
    if options.student_lora is not None:
        pipeline.load_lora_weights(options.student_lora, adapter_name="student")
        rank = network.peft_config["student"].r
        if rank != options.rank:
            found = f"--rank {options.rank} and a LoRA of rank {rank} in {options.student_lora}"
            raise OptionError(found, expected="the same rank", cure=f"pass --rank {rank}")
    elif options.student == "lora":
        _add_lora(network, "student", options.rank, STUDENT[component])
    if options.fake_score == "full":
        teacher, fake_score = denoiser, replace(denoiser, network=copy.deepcopy(base))
    else:
        layers = ATTENTION if options.fake_score_layers == "attention" else STUDENT[component]
        _add_lora(base, "fake_score", options.rank, layers)
        lora.add_teacher(base, like="fake_score")
        teacher, fake_score = (replace(denoiser, lora_adapter=name) for name in ("teacher", "fake_score"))
    adapter = "student" if options.student == "lora" else None
    own = {"network": network, "lora_adapter": adapter, "scheduler": _scheduler(options, pipeline, denoiser)}
    student = Student(**vars(denoiser) | own)
    if options.gradient_checkpointing:
        for role in (fake_score, student):
            role.network.enable_gradient_checkpointing()
    return teacher, fake_score, student


def _add_lora(network: Any, name: str, rank: int, targets: tuple[str, ...]) -> None:
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), adapter_name=name)
    # A is (rank, in, ...) and B (out, rank, ...); a product of higher rank than its layer is no low-rank adaptation.
    matrices = [weight for _, weight in ScoreNetwork(network, lora_adapter=name).named_tensors() if weight.ndim > 1]
    least = min(weight.numel() // rank for weight in matrices)
    if rank > least:
        found = f"--rank {rank} for layers of as few as {least} features"
        raise OptionError(found, expected=f"at most {least}", cure=f"pass --rank {least} or less")


def _scheduler(options: Options, pipeline: Any, denoiser: Denoiser) -> Any:
    """Return the scheduler of inference, set to one step."""
    config, steps = pipeline.scheduler.config, {"num_inference_steps": 1}
    if isinstance(denoiser.noise, noise.RectifiedFlow):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, use_dynamic_shifting=False)
    else:
        scheduler = LCMScheduler.from_config(config)
        if timestep := options.timestep or (SDXL_TIMESTEP if "time_ids" in denoiser.conditions else None):
            steps = {"timesteps": [timestep]}
    scheduler.set_timesteps(**steps)
    scheduler.set_begin_index(0)
    return scheduler


def noised(
    schedule: noise.Discrete | noise.RectifiedFlow,
    x: Tensor,
    low: float = 0.0,
    high: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return x_t, t, eps, and alpha_t and sigma_t by name; t is uniform between two shares of the longest time."""
    draw = {"size": x.shape[:1], "device": x.device, "generator": generator}
    if isinstance(schedule, noise.RectifiedFlow):
        t = low + (high - low) * torch.rand(**draw)
    else:
        steps = len(schedule.alphas_cumprod)
        t = torch.randint(int(low * steps), min(int(high * steps) + 1, steps), **draw)  # both ends, as DMD2
    alpha, sigma = (noise.expand(value, x) for value in schedule(t))
    eps = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return noise.add_noise(x, eps, alpha=alpha, sigma=sigma), t, eps, {"alpha": alpha, "sigma": sigma}

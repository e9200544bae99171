"""Who is who: teacher, fake score and student, each a whole network or an adapter of a network that others use too.

| student | fake score | networks in memory                                                               |
|---------|------------|----------------------------------------------------------------------------------|
| lora    | lora       | one, with three adapters: the teacher's nodes, s_phi, the student                |
| full    | lora       | two: the teacher's with two adapters, and the student                            |
| lora    | full       | three: teacher, s_phi, and the student's, since nodes are written into the teacher |
| full    | full       | three                                                                            |
"""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
from disback_adapters.lcm_lora import pipelines
from disback_adapters.lcm_lora.options import Options
from peft import LoraConfig
from torch import Tensor, nn

from disback_plugin import ScoreNetwork, lora, noise
from disback_plugin.errors import OptionError

__all__ = ["Cast", "Role", "Student", "cast"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# s_phi's and the nodes' LoRA is on the attention alone, as in ProlificDreamer; the student's as in diffusers' LCM
# scripts (train_lcm_distill_lora_sd_wds.py:1001), and on both streams of a transformer.
STUDENT = {
    "unet": (
        *ATTENTION,
        *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
        *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    ),
    "transformer": (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
}
SDXL_TIMESTEP = 399


@dataclass(frozen=True)
class Role:
    """One of the three: a network, or an adapter of one, as a function of x_t, t and conditions."""

    denoiser: pipelines.Denoiser
    network: nn.Module
    adapter: str | None = None

    @property
    def weights(self) -> ScoreNetwork:
        """What `attach` gets, and what a checkpoint holds."""
        return ScoreNetwork(self.network, lora_adapter=self.adapter)

    def running(self) -> AbstractContextManager[None]:
        """Let the network be this role inside."""
        return nullcontext() if self.adapter is None else lora.under(self.network, self.adapter)

    def __call__(self, x_t: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Return the prediction at x_t, in float32."""
        with self.running():
            return self.denoiser(x_t, t, conditions, network=self.network).float()

    def trainable(self) -> list[nn.Parameter]:
        """Return what an optimizer steps, in float32 whatever the rest is in."""
        found = [weight for _, weight in self.weights.named_tensors() if isinstance(weight, nn.Parameter)]
        for weight in found:
            weight.data = weight.data.float()
            weight.requires_grad_(True)  # peft freezes what is not active
        return found


class Student:
    """The one-step generator: x = one step of the scheduler that will be used for inference, from noise.

    For LCMScheduler that is x = c_skip(t) z + c_out(t) x_0(z, t), LCM's own parametrisation (arXiv 2310.04378, Eq. 9),
    and for flow matching x = z - v(z, 1).
    """

    def __init__(self, role: Role, scheduler: Any, timestep: int | None) -> None:
        self.role = role
        if isinstance(scheduler, LCMScheduler):
            arguments = {"num_inference_steps": 1} if timestep is None else {"timesteps": [timestep]}
        else:
            arguments = {"num_inference_steps": 1}
        scheduler.set_timesteps(**arguments)
        scheduler.set_begin_index(0)
        self.scheduler = scheduler
        self.time = scheduler.timesteps[0]

    def __call__(self, z: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Return samples x, of the shape of the unit noise z."""
        t = (self.time / self.role.denoiser.time_scale).expand(len(z)).to(z.device)
        output = self.role(z, t, conditions)
        # A copy, because a scheduler counts its steps.
        return copy.copy(self.scheduler).step(output, self.time, z, return_dict=False)[0]


@dataclass(frozen=True)
class Cast:
    """The three roles, and what is to know of them."""

    teacher: Role
    fake_score: Role
    student: Student


def cast(options: Options, pipeline: Any) -> Cast:
    """Give the roles to networks.

    Raises:
        OptionError: If a rank does not fit.
    """
    found = pipelines.denoiser(pipeline)
    base = found.network
    shared = options.fake_score == options.student == "lora"
    network = base if shared else copy.deepcopy(base)
    student = _student(options, pipeline, found, network)
    if options.fake_score == "full":
        fake_score, teacher = Role(found, copy.deepcopy(base)), Role(found, base)
    else:
        layers = ATTENTION if options.fake_score_layers == "attention" else STUDENT[found.component]
        _add_lora(base, "fake_score", options.rank, layers)
        lora.add_teacher(base, like="fake_score")
        fake_score, teacher = Role(found, base, "fake_score"), Role(found, base, "teacher")
    if options.gradient_checkpointing:
        for role in (fake_score, student):
            role.network.enable_gradient_checkpointing()
    scheduler = _scheduler(pipeline)
    timestep = options.timestep
    if timestep is None and "time_ids" in found.conditions:
        timestep = SDXL_TIMESTEP
    return Cast(teacher, fake_score, Student(student, scheduler, timestep))


def _student(options: Options, pipeline: Any, found: pipelines.Denoiser, network: nn.Module) -> Role:
    if options.student == "full":
        if options.student_lora is not None:
            raise OptionError("--student full and --student_lora", expected="one of them", cure="leave one out")
        setattr(pipeline, found.component, network)
        return Role(found, network)
    setattr(pipeline, found.component, network)
    if options.student_lora is None:
        _add_lora(network, "student", options.rank, STUDENT[found.component])
    else:
        pipeline.load_lora_weights(options.student_lora, adapter_name="student")
        rank = network.peft_config["student"].r
        if rank != options.rank:
            raise OptionError(
                f"--rank {options.rank} and a LoRA of rank {rank} in {options.student_lora}",
                expected="the same",
                cure=f"pass --rank {rank}",
            )
    return Role(found, network, "student")


def _add_lora(network: Any, name: str, rank: int, targets: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), adapter_name=name)
    # A is (rank, in, ...) and B (out, rank, ...); a product of higher rank than its layer is a waste, and no LoRA.
    matrices = [weight for _, weight in ScoreNetwork(network, lora_adapter=name).named_tensors() if weight.ndim > 1]
    least = min(weight.numel() // rank for weight in matrices)
    if rank > least:
        raise OptionError(
            f"--rank {rank} for layers of as few as {least} features",
            expected=f"at most {least}",
            cure=f"pass --rank {least} or less",
        )


def _scheduler(pipeline: Any) -> Any:
    """Return the scheduler that inference uses as well."""
    if isinstance(noise.from_diffusers(pipeline.scheduler), noise.RectifiedFlow):
        return FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, use_dynamic_shifting=False)
    return LCMScheduler.from_config(pipeline.scheduler.config)

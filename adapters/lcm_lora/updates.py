"""Update the fake score (Eq. 7) and the generator (Eq. 8). This module knows no DisBack.

| student | fake score | networks in memory                                                                    |
|---------|------------|---------------------------------------------------------------------------------------|
| lora    | lora       | one, with three LoRA adapters: the teacher's nodes, s_phi, the student                |
| full    | lora       | two: the teacher's with two LoRA adapters, and the student                            |
| lora    | full       | three: teacher, s_phi, and the student's base, since nodes are written into the teacher |
| full    | full       | three                                                                                 |

Gradients are averaged over processes here and not by DDP, which does not support several roles in one network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
from disback_adapters.lcm_lora.pipelines import Denoiser, Embeddings
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Adam

from disback_plugin import ScoreNetwork, kernels, lora, noise
from disback_plugin.errors import OptionError

if TYPE_CHECKING:
    from disback_adapters.lcm_lora.training import Options

# Generator losses of disback_plugin.kernels, and the weight w(t) of their authors as a function of alpha_t and sigma_t.
LOSSES = {
    "diff_instruct": lambda alpha, sigma: (sigma / alpha) ** 2,
    "vsd": lambda alpha, sigma: sigma**2,
    "dmd": lambda alpha, sigma: 1.0,
}

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
CLIP = 10.0  # of a gradient's norm, as in DMD2 (main/train_sd.py:366-380)
# Times at which the two scores are compared, as shares of the longest one, as in DMD2 (main/sd_guidance.py:179).
COMPARED = (0.02, 0.98)


@dataclass(frozen=True)
class Role:
    """Teacher, fake score or student: a network, or a LoRA adapter of one, as a function of x_t, t and conditions."""

    denoiser: Denoiser
    network: nn.Module
    lora_adapter: str | None = None

    @property
    def weights(self) -> ScoreNetwork:
        """Return the weights for `attach` and for a checkpoint."""
        return ScoreNetwork(self.network, lora_adapter=self.lora_adapter)

    def running(self) -> AbstractContextManager[None]:
        """Activate the role's LoRA adapter inside the context."""
        return nullcontext() if self.lora_adapter is None else lora.use_adapter(self.network, self.lora_adapter)

    def __call__(self, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction at x_t, in float32."""
        with self.running():
            return self.denoiser(x_t, t, conditions, network=self.network).float()

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters for an optimizer, in float32 whatever the precision of the others."""
        found = [weight for _, weight in self.weights.named_tensors() if isinstance(weight, nn.Parameter)]
        for weight in found:
            weight.data = weight.data.float()
            weight.requires_grad_(True)  # peft freezes LoRA adapters that are not active
        return found


@dataclass(frozen=True)
class Student(Role):
    """The one-step generator: x = one step, from noise, of the scheduler that samples with it later.

    For LCMScheduler that is x = c_skip(t) z + c_out(t) x_0(z, t), LCM's own parametrisation (arXiv 2310.04378, Eq. 9),
    and for flow matching x = z - v(z, 1).
    """

    scheduler: Any = None

    def generate(self, z: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return samples x, of the shape of the unit noise z."""
        scheduler = copy.copy(self.scheduler)  # a scheduler counts its steps
        time = scheduler.timesteps[0]
        t = (time / self.denoiser.time_scale).expand(len(z)).to(z.device)
        return scheduler.step(self(z, t, conditions), time, z, return_dict=False)[0]


class Roles(NamedTuple):
    """The three roles."""

    teacher: Role
    fake_score: Role
    student: Student


def assign_roles(options: Options, pipeline: Any, denoiser: Denoiser) -> Roles:
    """Make the networks and LoRA adapters of the three roles; the student becomes the pipeline's network.

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
        fake_score, teacher = Role(denoiser, copy.deepcopy(base)), Role(denoiser, base)
    else:
        layers = ATTENTION if options.fake_score_layers == "attention" else STUDENT[component]
        _add_lora(base, "fake_score", options.rank, layers)
        lora.add_teacher(base, like="fake_score")
        fake_score, teacher = Role(denoiser, base, "fake_score"), Role(denoiser, base, "teacher")
    scheduler = _scheduler(options, pipeline, denoiser)
    student = Student(denoiser, network, "student" if options.student == "lora" else None, scheduler)
    if options.gradient_checkpointing:
        for role in (fake_score, student):
            role.network.enable_gradient_checkpointing()
    return Roles(teacher, fake_score, student)


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


class Updates:
    """Draw batches, and take the steps of the two optimizers.

    Args:
        options: Options of the run.
        accelerator: Accelerator of the run.
        roles: The three roles.
        embeddings: The conditions of the prompts.
        size: Height and width of x.
    """

    def __init__(
        self, options: Options, accelerator: Accelerator, roles: Roles, embeddings: Embeddings, size: int
    ) -> None:
        self.options, self.accelerator, self.roles, self.embeddings = options, accelerator, roles, embeddings
        self.denoiser = roles.teacher.denoiser
        self.shape = (options.batch_size, self.denoiser.channels, size, size)
        self.weights, self.fake_score_weights = roles.student.trainable(), roles.fake_score.trainable()
        self.optimizer = accelerator.prepare(Adam(self.weights, lr=options.learning_rate))
        self.fake_score_optimizer = accelerator.prepare(
            Adam(self.fake_score_weights, lr=options.fake_score_learning_rate)
        )

    def update_fake_score(self) -> Tensor:
        """Fit s_phi to samples of the present student; return the loss, shape ()."""
        with torch.no_grad():
            x, conditions = self._sample()
        x_t, t, eps, at_t = noised(self.denoiser.noise, x)
        with self.accelerator.autocast():
            output = self.roles.fake_score(x_t, t, conditions)
        loss = kernels.denoising(output, x, eps, prediction=self.denoiser.prediction, **at_t)
        self._step(loss, self.roles.fake_score, self.fake_score_optimizer, self.fake_score_weights)
        return loss.detach()

    def update_generator(self) -> Tensor:
        """Move the student along the score difference; return the loss, shape (), which measures no progress."""
        name, guidance = self.options.loss, self.options.guidance
        x, conditions = self._sample()
        x_t, t, eps, at_t = noised(self.denoiser.noise, x.detach(), *COMPARED)
        options = {"prediction": self.denoiser.prediction, "weight": LOSSES[name](**at_t)} | at_t
        options |= {"eps": eps} if name == "dmd" else {}
        with torch.no_grad(), self.accelerator.autocast():
            fake = self.roles.fake_score(x_t, t, conditions)
            if guidance != 1:  # both branches in one batch, that of no prompt first
                options["guidance"], null = guidance, self.embeddings.null
                conditions = {k: torch.cat([null[k].to(own).expand_as(own), own]) for k, own in conditions.items()}
                x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
            real = self.roles.teacher(x_t, t, conditions)
        loss = getattr(kernels, name)(x, real, fake, **options)
        self._step(loss, self.roles.student, self.optimizer, self.weights)
        return loss.detach()

    def _step(self, loss: Tensor, role: Role, optimizer: Any, weights: list[nn.Parameter]) -> None:
        optimizer.zero_grad()
        with role.running():  # gradient checkpointing runs the forward again
            self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:
            for weight in weights:
                if weight.grad is not None:
                    weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")
        self.accelerator.clip_grad_norm_(weights, CLIP)
        optimizer.step()

    def _sample(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return samples of the student for random prompts, and their conditions."""
        # All numbers are drawn from the global streams, which a checkpoint holds.
        rows = self.embeddings.rows(torch.randint(self.embeddings.count, self.shape[:1]).tolist())
        device = self.accelerator.device
        conditions = {name: value.to(device, non_blocking=True) for name, value in rows.items()}
        with self.accelerator.autocast():
            return self.roles.student.generate(torch.randn(self.shape, device=device), conditions), conditions


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
        t = torch.randint(int(low * steps), int(high * steps), **draw)
    alpha, sigma = (noise.expand(value, x) for value in schedule(t))
    eps = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return noise.add_noise(x, eps, alpha=alpha, sigma=sigma), t, eps, {"alpha": alpha, "sigma": sigma}

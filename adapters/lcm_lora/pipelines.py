"""Read a teacher from a diffusers pipeline: its denoiser, its noise and prediction, and its prompts' embeddings.

| network                                 | its time              | conditions that its forward needs                 |
|-----------------------------------------|-----------------------|---------------------------------------------------|
| `UNet2DConditionModel` (SD 1.5, 2.1)    | t; 1000 t under flows | encoder_hidden_states                             |
| with addition_embed_type text_time      | the same              | also text_embeds, time_ids (SDXL)                 |
| `SD3Transformer2DModel`                 | 1000 t                | encoder_hidden_states, pooled_projections         |
| `FluxTransformer2DModel`                | t                     | also txt_ids, img_ids                             |

Read from configs as diffusers 0.30 to 0.42 write them (`unet_2d_condition.py`, `transformer_sd3.py`,
`transformer_flux.py`, and how their pipelines call them).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import DiffusionPipeline, UNet2DConditionModel
from disback_adapters.lcm_lora.prompts import prompts_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from disback_plugin import Prediction, ScoreNetwork, lora
from disback_plugin import noise as noises
from disback_plugin.errors import MismatchError, OptionError, RoleError

if TYPE_CHECKING:
    from disback_adapters.lcm_lora.roles import Options

# Conditions of each network; a UNet with addition_embed_type text_time takes `ADDED` too, as its added_cond_kwargs.
CONDITIONS = {
    "UNet2DConditionModel": ("encoder_hidden_states",),
    "SD3Transformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "FluxTransformer2DModel": ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids"),
}
ADDED = ("text_embeds", "time_ids")
# Values of a UNet's config for which it takes no other conditions.
UNET = {
    "addition_embed_type": (None, "text", "text_time"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
ROWS = 50  # prompts of a file, and of a call of the text encoders


@dataclass(frozen=True)
class Denoiser:
    """The denoiser of a pipeline, or a copy or a LoRA adapter of it, as a function of x_t, t and conditions.

    Attributes:
        component: Its name in the pipeline: "unet" or "transformer".
        network: The network.
        noise: The noise schedule that it was trained under.
        prediction: Its prediction.
        conditions: Names of the arguments that its forward needs beside x_t and the time.
        time_scale: Factor from the noise's t to the network's time.
        channels: Channels of x_t: dimension 1 of images, the last one of Flux's packed latents.
        lora_adapter: The LoRA adapter that is active in a forward; None for the network as it is.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x_t, timestep, return_dict):
        ...         return (x_t * timestep.view(-1, 1, 1, 1),)
        >>> net = Denoiser("transformer", Net(), noises.RectifiedFlow(), Prediction.FLOW, (), 1000.0, 4)
        >>> net(torch.ones(1, 4, 2, 2), torch.tensor([0.5]), {}).mean()
        tensor(500.)
    """

    component: str
    network: nn.Module
    noise: noises.Discrete | noises.RectifiedFlow
    prediction: Prediction
    conditions: tuple[str, ...]
    time_scale: float
    channels: int
    lora_adapter: str | None = None

    def __call__(self, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction at x_t, of the shape of x_t, in float32.

        Args:
            x_t: Noisy samples, shape (B, channels, height, width), or (B, tokens, channels) for Flux.
            t: Times of the noise schedule, shape (B,).
            conditions: A tensor for each name of `conditions`, no more, no less.

        Raises:
            OptionError: If a condition is missing or unknown.
        """
        self.validate(conditions)
        arguments: dict[str, Any] = {name: value for name, value in conditions.items() if name not in ADDED}
        if len(arguments) < len(conditions):
            arguments["added_cond_kwargs"] = {name: conditions[name] for name in ADDED}
        time = t if self.time_scale == 1 else t * self.time_scale
        with self.activated():
            return self.network(x_t, timestep=time, return_dict=False, **arguments)[0].float()

    @property
    def weights(self) -> ScoreNetwork:
        """Return the weights for `attach` and for a checkpoint."""
        return ScoreNetwork(self.network, lora_adapter=self.lora_adapter)

    def activated(self) -> AbstractContextManager[None]:
        """Activate the LoRA adapter inside the context."""
        return nullcontext() if self.lora_adapter is None else lora.use_adapter(self.network, self.lora_adapter)

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters for an optimizer, in float32 whatever the precision of the others."""
        found = [weight for _, weight in self.weights.named_tensors() if isinstance(weight, nn.Parameter)]
        for weight in found:
            weight.data = weight.data.float()
            weight.requires_grad_(True)  # peft freezes LoRA adapters that are not active
        return found

    def validate(self, conditions: Mapping[str, Tensor]) -> None:
        """Raise OptionError if a condition is missing or unknown."""
        if set(conditions) != set(self.conditions):
            raise OptionError(
                f"conditions {sorted(conditions)}",
                expected=f"{', '.join(self.conditions)} for the {self.component}, a {type(self.network).__name__}",
                cure="pass what encode_prompt of the denoiser's own pipeline returns, and the time ids of SDXL; SDXL's "
                "pipeline has two text encoders",
            )


def denoiser(pipeline: Any) -> Denoiser:
    """Return the denoiser of a diffusers pipeline.

    Args:
        pipeline: A `DiffusionPipeline`, or anything with its attributes `scheduler` and `unet` or `transformer`.

    Raises:
        RoleError: If it has none, one of an unknown kind, one that does not fit its scheduler, or one distilled before.
        OptionError: If the scheduler is of another kind of model (`noise.from_diffusers`).

    Example:
        >>> from types import SimpleNamespace
        >>> from diffusers import DDPMScheduler
        >>> class UNet2DConditionModel(nn.Identity):
        ...     config = {"in_channels": 4, "out_channels": 4, "addition_embed_type": "text_time"}
        >>> found = denoiser(SimpleNamespace(unet=UNet2DConditionModel(), scheduler=DDPMScheduler()))
        >>> found.prediction, found.conditions
        (<Prediction.EPS: 'eps'>, ('encoder_hidden_states', 'text_embeds', 'time_ids'))
    """
    component = "transformer" if getattr(pipeline, "unet", None) is None else "unet"
    network, scheduler = getattr(pipeline, component, None), pipeline.scheduler
    plain = None if network is None else extract_model_from_parallel(network)
    name, config = type(plain).__name__, dict(getattr(plain, "config", {}))
    noise, prediction = noises.from_diffusers(scheduler), Prediction.from_diffusers(scheduler)
    flow, channels = isinstance(noise, noises.RectifiedFlow), config.get("in_channels")
    if config.get("time_cond_proj_dim") is not None or config.get("guidance_embeds"):
        raise RoleError(
            f"a {component} that takes a guidance scale as input, so one distilled before",
            expected="a diffusion model: the output of a consistency model is no score (the paper's appendix A)",
            cure="pass the model that it was distilled from as --teacher, and its LoRA as --student_lora",
        )
    odd = [f"with {key}={config[key]!r}" for key, known in UNET.items() if config.get(key) not in known]
    if config.get("out_channels") not in (None, channels):
        odd.append(f"from {channels} to {config['out_channels']} channels")
    if component == "transformer" and not flow:
        odd.append(f"under a {type(scheduler).__name__}")
    if name not in CONDITIONS or odd:
        raise RoleError(
            f"a denoiser of class {name} {', '.join(odd)}".strip(),
            expected="UNet2DConditionModel (SD 1.5, SDXL), SD3Transformer2DModel or FluxTransformer2DModel, for text "
            "alone, under its own repository's scheduler",
            cure="use such a pipeline, or make a disback_adapters.lcm_lora.pipelines.Denoiser of yours",
        )
    conditions = CONDITIONS[name] + (ADDED if config.get("addition_embed_type") == "text_time" else ())
    # Flux multiplies its time by 1000 itself.
    scaled = flow and name != "FluxTransformer2DModel"
    time_scale = float(scheduler.config["num_train_timesteps"]) if scaled else 1.0
    return Denoiser(component, network, noise, prediction, conditions, time_scale, channels)


# -- the teacher's pipeline, with its prompts' embeddings -------------------------------------------------------------


def load(options: Options, device: torch.device) -> tuple[Any, Denoiser, Embeddings, int]:
    """Load the teacher's pipeline onto a device, all but the VAE, and encode the prompts unless their files exist.

    Returns:
        The pipeline without its text encoders, its denoiser, the prompts' embeddings, and the images' size in pixels.

    Raises:
        RoleError: If the denoiser is quantised, or cannot be a teacher (`denoiser`).
        MismatchError: If the prediction is another one than `options.prediction`.
        OptionError: If `options.resolution` is no multiple of the VAE's factor.
    """
    config = DiffusionPipeline.load_config(options.teacher)
    for component in {"unet", "transformer"} & config.keys():
        if "quantization_config" in UNet2DConditionModel.load_config(options.teacher, subfolder=component):
            cure = "load the teacher without quantisation; --mixed_precision bf16 halves its memory"
            raise RoleError(f"a quantised {component}", expected="weights in floating point", cure=cure)
    prompts = prompts_of(options.prompts)
    key = json.dumps([options.teacher, options.resolution, options.mixed_precision, prompts])
    folder = Path(options.output) / "embeddings" / hashlib.sha256(key.encode()).hexdigest()[:16]
    encoded = (folder / "complete").exists()
    text = dict.fromkeys(name for name in config if name.startswith(("text_encoder", "tokenizer")))
    pipeline = DiffusionPipeline.from_pretrained(options.teacher, **(text if encoded else {}))
    half = options.mixed_precision == "bf16" and options.fake_score == options.student == "lora"
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
            part.to("cpu" if name == "vae" else device, **({"dtype": torch.bfloat16} if half else {}))
    found, factor = denoiser(pipeline), pipeline.vae_scale_factor
    if options.prediction is not None and Prediction(options.prediction) is not found.prediction:
        both = f"--prediction {options.prediction}, and {found.prediction.value} in the teacher's scheduler"
        cure = "omit --prediction, or correct prediction_type in the teacher's scheduler_config.json"
        raise MismatchError(both, expected="the same prediction", cure=cure)
    own = found.network.config.sample_size * factor
    pixels = options.resolution or own
    if pixels % factor:
        raise OptionError(f"--resolution {pixels}", expected=f"a multiple of {factor}", cure=f"pass {own}")
    if not encoded:
        Embeddings.write(folder, pipeline, found, prompts, pixels)
        pipeline.register_modules(**text)
    return pipeline, found, Embeddings(folder, len(prompts)), pixels


class Embeddings:
    """Read the conditions of prompts, which were encoded once, from mapped files: a million prompts take no memory.

    `FOLDER/00000.safetensors` and so on hold the conditions of `ROWS` prompts each, `null.safetensors` those of no
    prompt.

    Args:
        folder: Folder of the files.
        count: Number of prompts.

    Attributes:
        null: The conditions of no prompt, each of shape (1, ...).
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.null = load_file(folder / "null.safetensors")

    @staticmethod
    def write(folder: Path, pipeline: Any, denoiser: Denoiser, prompts: Sequence[str], pixels: int) -> None:
        """Encode prompts and write the files, and at last one named "complete"."""
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(prompts), ROWS):
            own, null = encode(pipeline, denoiser.conditions, prompts[start : start + ROWS], pixels)
            denoiser.validate(own)
            save_file(own, folder / f"{start // ROWS:05d}.safetensors")
        save_file({name: value[:1].clone() for name, value in null.items()}, folder / "null.safetensors")
        (folder / "complete").touch()

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the conditions of the prompts at these indices, each of shape (B, ...)."""
        parts = []
        for file, row in (divmod(index, ROWS) for index in indices):
            with safe_open(self.folder / f"{file:05d}.safetensors", framework="pt") as opened:
                parts.append({name: opened.get_slice(name)[row : row + 1] for name in self.null})
        return {name: torch.cat([part[name] for part in parts]) for name in self.null}


def encode(pipeline: Any, names: Sequence[str], prompts: Sequence[str], pixels: int) -> list[dict[str, Tensor]]:
    """Return the conditions of B prompts, and those of no prompt as the pipeline's own guidance has them.

    Args:
        pipeline: A pipeline with its text encoders.
        names: Names of the conditions; what the pipeline does not make is missing in the result.
        prompts: B prompts.
        pixels: Height and width of the images, for SDXL's time ids.

    Returns:
        Two mappings from names to tensors of shape (B, ...).
    """
    wanted = inspect.signature(pipeline.encode_prompt).parameters
    texts = {name: prompts for name in ("prompt", "prompt_2", "prompt_3") if name in wanted}
    options = {"device": pipeline.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        made = pipeline.encode_prompt(**texts, **options)
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).expand(len(prompts), -1)
    both = []
    for own in (0, 1):
        found = {"encoder_hidden_states": made[own]}
        if len(made) > 2:
            found |= dict.fromkeys(("text_embeds", "pooled_projections"), made[own + 2]) | {
                "time_ids": sizes.to(made[own])
            }
        both.append({name: found[name].contiguous().cpu() for name in names if name in found})
    return both

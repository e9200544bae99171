"""The denoiser of a diffusers pipeline: what it predicts under which noise, and what its forward needs beside x_t.

| network                                 | its time              | conditions, by the names `arguments` takes      |
|-----------------------------------------|-----------------------|-------------------------------------------------|
| `UNet2DConditionModel` (SD 1.5, 2.1)    | t; 1000 t under flows | encoder_hidden_states                           |
| with addition_embed_type text_time      | the same              | also text_embeds, time_ids (SDXL)               |
| `SD3Transformer2DModel`                 | 1000 t                | encoder_hidden_states, pooled_projections       |
| `FluxTransformer2DModel`                | t                     | also txt_ids, img_ids; guidance if distilled    |

Read from configs as diffusers 0.30 to 0.42 write them (`unet_2d_condition.py`, `transformer_sd3.py`,
`transformer_flux.py`, and how their pipelines call them); diffusers itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from disback_plugin import Prediction
from disback_plugin import noise as noises
from disback_plugin.errors import OptionError, RoleError

__all__ = ["Denoiser", "denoiser"]

# What goes into a UNet's added_cond_kwargs instead of being an argument of its own.
ADDED = ("text_embeds", "time_ids")
# Values of a UNet's config by which it wants nothing but what the table says.
UNET = {
    "addition_embed_type": (None, "text", "text_time"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}


@dataclass(frozen=True)
class Denoiser:
    """What there is to know of a pipeline's denoiser to train scores with it.

    Attributes:
        component: Its name in the pipeline: "unet" or "transformer".
        network: The network.
        noise: The noise schedule that it was trained under.
        prediction: What it predicts.
        conditions: Names of what its forward needs beside x_t and the time.
        time_scale: What the network is given as time, in units of the noise's t.
        channels: Channels of x_t: dimension 1 of images, the last one of Flux's packed latents.

    Example:
        >>> import torch
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

    def arguments(self, t: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the keyword arguments of the network's forward beside x_t, which is its first.

        Args:
            t: Times of the noise schedule, shape (B,).
            conditions: A tensor for each name of `conditions`, no more, no less.

        Raises:
            OptionError: If one is missing or unknown.

        Example:
            >>> import torch
            >>> net = Denoiser("transformer", nn.Identity(), noises.RectifiedFlow(), Prediction.FLOW, (), 1000.0, 4)
            >>> net.arguments(torch.tensor([0.5]), {})["timestep"].tolist()
            [500.0]
        """
        if set(conditions) != set(self.conditions):
            raise OptionError(
                f"conditions {sorted(conditions)}",
                expected=f"{', '.join(self.conditions)} for the {self.component}, a {type(self.network).__name__}",
                cure="pass what the pipeline's own encode_prompt returns (and, of SDXL, its time ids)",
            )
        time = t if self.time_scale == 1 else t * self.time_scale
        own = {name: value for name, value in conditions.items() if name not in ADDED}
        added = {name: value for name, value in conditions.items() if name in ADDED}
        return {"timestep": time, **own, **({"added_cond_kwargs": added} if added else {}), "return_dict": False}

    def __call__(
        self, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor], *, network: nn.Module | None = None
    ) -> Tensor:
        """Return the prediction at x_t, of the shape of x_t.

        Args:
            x_t: Noisy samples, shape (B, channels, height, width), or (B, tokens, channels) for Flux.
            t: Times of the noise schedule, shape (B,).
            conditions: As in `arguments`.
            network: Which network of this kind to ask: a wrapped or copied one; None for the pipeline's own.
        """
        output: Tensor = (self.network if network is None else network)(x_t, **self.arguments(t, conditions))[0]
        return output


def denoiser(pipeline: object) -> Denoiser:
    """Return what there is to know of a diffusers pipeline's denoiser.

    Args:
        pipeline: A `DiffusionPipeline`, or anything with its attributes `scheduler` and `unet` or `transformer`.

    Raises:
        RoleError: If there is none, or one that needs what is not known here, or that does not fit its scheduler.
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
    component, network = _component(pipeline)
    plain = extract_model_from_parallel(network)
    name, config = type(plain).__name__, dict(getattr(plain, "config", {}))
    scheduler: Any = pipeline.scheduler  # type: ignore[attr-defined]
    noise, prediction = noises.from_diffusers(scheduler), Prediction.from_diffusers(scheduler)
    steps = float(scheduler.config["num_train_timesteps"]) if isinstance(noise, noises.RectifiedFlow) else 1.0
    conditions: tuple[str, ...] = ("encoder_hidden_states",)
    if name == "UNet2DConditionModel":
        odd = [f"{key}={config[key]!r}" for key, known in UNET.items() if config.get(key) not in known]
        if odd:
            raise _unknown(f"a UNet with {', '.join(odd)}")
        if config.get("addition_embed_type") == "text_time":
            conditions += ADDED
        if config.get("time_cond_proj_dim") is not None:  # a guidance scale, embedded: consistency models
            conditions += ("timestep_cond",)
    elif name in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        conditions += ("pooled_projections",)
        if name == "FluxTransformer2DModel":
            conditions += ("txt_ids", "img_ids", *(("guidance",) if config.get("guidance_embeds") else ()))
            steps = 1.0  # it multiplies by 1000 itself
        if not isinstance(noise, noises.RectifiedFlow):
            raise RoleError(
                f"{name} under a {type(scheduler).__name__}",
                expected="a flow-matching scheduler, for a flow model",
                cure="use the scheduler of the model's own repository, as FlowMatchEulerDiscreteScheduler",
            )
    else:
        raise _unknown(f"a denoiser of class {name}")
    channels = int(config["in_channels"])
    if config.get("out_channels") not in (None, channels):
        raise RoleError(
            f"a {name} from {channels} to {config['out_channels']} channels",
            expected="one that predicts as many as it is given",
            cure="use a text-to-image model; inpainting models and learned variances cannot be distilled here",
        )
    return Denoiser(component, network, noise, prediction, conditions, steps, channels)


def _component(pipeline: object) -> tuple[str, nn.Module]:
    for component in ("unet", "transformer"):
        network = getattr(pipeline, component, None)
        if isinstance(network, nn.Module) and hasattr(pipeline, "scheduler"):
            return component, network
    raise RoleError(
        f"{type(pipeline).__name__}, without a scheduler and a unet or a transformer",
        expected="a diffusers pipeline",
        cure="pass DiffusionPipeline.from_pretrained(...)",
    )


def _unknown(found: str) -> RoleError:
    return RoleError(
        found,
        expected="a UNet2DConditionModel (SD 1.5, SDXL), SD3Transformer2DModel or FluxTransformer2DModel for text",
        cure="make a disback_adapters.lcm_lora.pipelines.Denoiser of what is known of it, and a call for its forward",
    )

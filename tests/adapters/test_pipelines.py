"""What is read from diffusers' schedulers and pipelines is what diffusers itself computes."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from disback_adapters.lcm_lora.pipelines import denoiser
from hypothesis import given
from hypothesis import strategies as st
from tiny_pipelines import text_time, unet

from disback_plugin import noise
from disback_plugin.errors import OptionError, RoleError
from disback_plugin.noise import RectifiedFlow, add_noise, expand
from disback_plugin.prediction import Prediction, convert, target

PREDICTIONS = {"epsilon": Prediction.EPS, "sample": Prediction.X0, "v_prediction": Prediction.V}
schedules = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.integers(2, 1000),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "beta_start": st.floats(1e-5, 5e-3),
        "beta_end": st.floats(6e-3, 0.05),
    }
)
variance_preserving = st.sampled_from(
    [diffusers.DDPMScheduler, diffusers.DDIMScheduler, diffusers.LCMScheduler, diffusers.PNDMScheduler]
)


def batch(seed, times):
    stream = torch.Generator().manual_seed(seed)
    x_0, eps = torch.randn(2, len(times), 3, 4, generator=stream)
    return x_0, eps, torch.tensor(times)


def scales(schedule, t, like):
    return {name: expand(value, like) for name, value in zip(("alpha", "sigma"), schedule(t), strict=True)}


@given(kind=variance_preserving, config=schedules, zero=st.booleans(), seed=st.integers(0, 99), data=st.data())
def test_noising_equals_the_schedulers_own_bit_for_bit(kind, config, zero, seed, data):
    last = config["num_train_timesteps"] - 1
    x_0, eps, t = batch(seed, data.draw(st.lists(st.integers(0, last), min_size=1, max_size=3)))
    options = {"rescale_betas_zero_snr": True} if zero and kind is not diffusers.PNDMScheduler else {}
    scheduler = kind(**config, **options)
    for given_as in (scheduler, json.loads(scheduler.to_json_string())):
        schedule = noise.from_diffusers(given_as)
        assert torch.equal(torch.tensor(schedule.alphas_cumprod), scheduler.alphas_cumprod)
        x_t = add_noise(x_0, eps, **scales(schedule, t, x_0))
        assert torch.equal(x_t, scheduler.add_noise(x_0, eps, t)), type(given_as)


@given(config=schedules, kind=st.sampled_from(sorted(PREDICTIONS)), seed=st.integers(0, 99), data=st.data())
def test_targets_and_conversions_are_the_schedulers_own(config, kind, seed, data):
    t = data.draw(st.integers(1, config["num_train_timesteps"] - 1))
    x_0, eps, times = batch(seed, [t])
    scheduler = diffusers.DDIMScheduler(**config, prediction_type=kind, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(config["num_train_timesteps"])
    prediction, at = Prediction.from_diffusers(scheduler), scales(noise.from_diffusers(scheduler), times, x_0)
    assert prediction is PREDICTIONS[kind]
    torch.testing.assert_close(target(Prediction.V, x_0, eps, **at), scheduler.get_velocity(x_0, eps, times))
    x_t, output = scheduler.add_noise(x_0, eps, times), eps.flip(1)
    if at["alpha"].item() > 1e-2:  # below, both divide by what rounding has left
        ours = convert(output, prediction, Prediction.X0, x_t=x_t, **at)
        torch.testing.assert_close(ours, scheduler.step(output, t, x_t).pred_original_sample, rtol=1e-4, atol=1e-3)


@given(shift=st.floats(0.5, 6), dynamic=st.booleans(), seed=st.integers(0, 99), index=st.integers(0, 998))
def test_a_flow_is_straight_whatever_the_shift(shift, dynamic, seed, index):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    times = scheduler.timesteps[index : index + 1]
    x_0, eps, _ = batch(seed, [0])
    at = scales(noise.from_diffusers(scheduler), times / 1000, x_0)
    x_t = add_noise(x_0, eps, **at)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x_0, times, eps))
    assert Prediction.from_diffusers(json.loads(scheduler.to_json_string())) is Prediction.FLOW
    velocity = target(Prediction.FLOW, x_0, eps, **at)
    scheduler.sigmas = torch.cat([scheduler.sigmas, torch.zeros(1)])
    stepped = scheduler.step(velocity, times[0], x_t).prev_sample  # along the line to the next time
    after = scheduler.sigmas[index + 1]
    torch.testing.assert_close(stepped, add_noise(x_0, eps, alpha=1 - after, sigma=after), rtol=1e-3, atol=1e-4)


def test_a_sampler_in_sigma_space_comes_to_the_same_input_of_the_network():
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    t = scheduler.timesteps[3:4]
    x_0, eps, _ = batch(0, [0])
    x_t = scheduler.scale_model_input(scheduler.add_noise(x_0, eps, t), t[0])
    assert t == t.round()
    ours = add_noise(x_0, eps, **scales(noise.from_diffusers(scheduler), t.long(), x_0))
    torch.testing.assert_close(ours, x_t)


# What diffusers has learned since the lowest version.
LATER = [
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "t = sigma"),
    ("SCMScheduler", {}, "of the teacher's own repository"),
]


def since_then():
    for name, options, cure in LATER:
        kind = getattr(diffusers, name, None)
        if kind is not None and options.keys() <= inspect.signature(kind).parameters.keys():
            yield kind(**options), cure


@pytest.mark.parametrize(
    ("scheduler", "cure"),
    [
        (diffusers.EDMEulerScheduler(), "noise.Karras"),
        (diffusers.EDMDPMSolverMultistepScheduler(), "noise.Karras"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "noise.Karras"),
        (diffusers.CMStochasticIterativeScheduler(), "of the teacher's own repository"),
        (
            getattr(diffusers, "SCMScheduler", diffusers.CMStochasticIterativeScheduler)(),
            "of the teacher's own repository",
        ),
        ({"beta_start": 0.1}, "scheduler_config.json"),
        ({"_class_name": "DPPMScheduler"}, "scheduler_config.json"),
        *since_then(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_schedule_of_ours_is_refused_with_the_cure(scheduler, cure):
    for read in (noise.from_diffusers, Prediction.from_diffusers):
        with pytest.raises(OptionError, match=cure):
            read(scheduler)


def test_a_prediction_that_means_another_thing_is_refused():
    for config in ({"prediction_type": "flow_prediction"}, {"prediction_type": "trigflow"}):
        with pytest.raises(OptionError, match="name the Prediction yourself"):
            Prediction.from_diffusers(diffusers.DPMSolverMultistepScheduler.from_config(config))
    flows = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert (noise.from_diffusers(flows), Prediction.from_diffusers(flows)) == (RectifiedFlow(), Prediction.FLOW)


TRANSFORMER = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1, "joint_attention_dim": 8}


def pipeline(**components):
    return SimpleNamespace(scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction"), **components)


def flow(**components):
    return SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **components)


def flux(**more):
    return diffusers.FluxTransformer2DModel(
        **TRANSFORMER, in_channels=4, num_single_layers=1, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2), **more
    )


def cases():
    text = torch.zeros(2, 5, 8)
    image = torch.zeros(2, 4, 8, 8)
    added = {"text_embeds": torch.zeros(2, 8), "time_ids": torch.zeros(2, 6)}
    yield pipeline(unet=unet(8)), image, {"encoder_hidden_states": text}
    yield pipeline(unet=unet(8, **text_time(8))), image, {"encoder_hidden_states": text, **added}
    yield flow(unet=unet(8)), image, {"encoder_hidden_states": text}
    pooled = {"encoder_hidden_states": text, "pooled_projections": torch.zeros(2, 8)}
    sd3 = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 8}
    yield (
        flow(transformer=diffusers.SD3Transformer2DModel(**TRANSFORMER, **sd3, pooled_projection_dim=8)),
        image,
        pooled,
    )
    ids = {"txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(16, 3)}
    yield flow(transformer=flux()), torch.zeros(2, 16, 4), {**pooled, **ids}


CASES = list(cases())
NAMES = ["sd15", "sdxl", "unet-flow", "sd3", "flux"]


@pytest.mark.parametrize(("of", "x_t", "conditions"), CASES, ids=NAMES)
def test_a_denoiser_runs_on_what_it_says_it_needs(of, x_t, conditions):
    found = denoiser(of)
    flows = isinstance(of.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert found.prediction is (Prediction.FLOW if flows else Prediction.V)
    assert set(found.conditions) == set(conditions)
    assert found.channels == 4
    t = torch.tensor([0.25, 0.5]) if flows else torch.tensor([3, 999])
    seen = []
    embedding = next(m for m in found.network.modules() if type(m).__name__ == "Timesteps")
    handle = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        output = found(x_t, t, conditions)
    handle.remove()
    assert output.shape == x_t.shape
    assert seen[0].tolist() == ([250.0, 500.0] if flows else [3, 999])  # what the networks were trained on
    for missing in conditions:
        with pytest.raises(OptionError, match="encode_prompt"):
            found(x_t, t, {name: value for name, value in conditions.items() if name != missing})


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        (pipeline(unet=None), "of class NoneType"),
        (pipeline(unet=unet(8, in_channels=9)), "from 9 to 4 channels"),
        (pipeline(unet=unet(8, class_embed_type="timestep")), "class_embed_type"),
        (pipeline(unet=torch.nn.Linear(1, 1)), "of class Linear"),
        (pipeline(transformer=CASES[3][0].transformer), "under a DDPMScheduler"),
        (flow(transformer=flux(guidance_embeds=True)), "distilled before"),
        (pipeline(unet=unet(8, time_cond_proj_dim=8)), "distilled before"),
    ],
    ids=["nothing", "inpainting", "classes", "unknown", "no-flow", "guided-flux", "consistency"],
)  # fmt: skip
def test_a_denoiser_that_is_not_known_is_refused(of, reason):
    with pytest.raises(RoleError, match=reason):
        denoiser(of)

"""On CUDA a fused loss is one exact kernel without spills. Separate processes check this without a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pretend
import pytest
from codegen import Case

from disback_plugin import kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(pretend.why_not()), reason=pretend.why_not() or "nothing is missing"),
]

LATENT, IMAGE = (4, 4, 64, 64), (16, 3, 256, 256)
LOSSES = {
    "dmd": {"loss": "dmd"},
    "dmd guided": {"loss": "dmd", "guided": True},
    "sid": {"loss": "sid"},
    "diff_instruct": {"loss": "diff_instruct"},
}
MORE = {
    "sid of v": {"loss": "sid", "prediction": "V"},
    "diff_instruct guided": {"loss": "diff_instruct", "guided": True},
    "denoising": {"loss": "denoising"},
}
# The interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {"torch.float32": 1e-6, "torch.bfloat16": 2**-7, "torch.bool": 0.0}


def case(name, shape=LATENT, capability=90, **given):
    """Return a loss as `kernels` compiles it on a GPU of this capability."""
    options = {"split_reductions": False} if math.prod(shape[1:]) <= kernels.ONE_BLOCK else {}
    given = {**{**LOSSES, **MORE}[name], "shape": shape, **given}
    name = f"{name} {given.get('dtype', 'float32')} {'x'.join(map(str, shape))} sm_{capability}"
    return Case(name, "cases:formula", "", given, options, capability, cubins=True)


LATENTS = [
    *(case(name, capability=capability) for capability in pretend.MULTIPROCESSORS for name in LOSSES),
    *(case(name) for name in MORE),
    *(case(name, dtype="bfloat16") for name in ("dmd guided", "sid")),
    case("dmd", capability=75, dtype="float16"),  # inductor takes no bfloat16 before sm_80
]
IMAGES = [case("dmd guided", IMAGE), case("sid", IMAGE, dtype="bfloat16")]
STARVED = dataclasses.replace(case("sid"), name="sid with 24 registers", triton={"maxnreg": 24})


def named(c):
    return c.name


def answers(script, cases, **environment):
    """Run the cases in a process that sees no GPU, and return its answers by name."""
    command = [
        sys.executable,
        str(Path(__file__).with_name(script)),
        *(json.dumps(dataclasses.asdict(c)) for c in cases),
    ]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **environment,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {answer["name"]: answer for answer in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the answers of `codegen` and `interpret` by the names of the cases, from two processes at a time."""
    folder = tmp_path_factory.mktemp("cuda")
    cases = [dataclasses.replace(c, source=str(folder / f"{c.name}.py")) for c in [*LATENTS, *IMAGES, STARVED]]

    def work(part):
        caches = {key: str(folder / f"{key}{part}") for key in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        mine = cases[part::2]
        looks = answers("codegen.py", mine, **caches)
        return looks, answers("interpret.py", runs(mine), **caches, TRITON_INTERPRET="1")

    with ThreadPoolExecutor() as pool:
        (looks, replays), (more_looks, more_replays) = pool.map(work, range(2))
    return looks | more_looks, replays | more_replays


def runs(cases):
    """Yield the cases to run: one architecture, another batch size than at compilation, a NaN in one sample."""
    for c in cases:
        if c.capability == 90 and not c.triton:
            batch, *image = c.given["shape"]
            yield dataclasses.replace(
                c, given={**c.given, "shape": (2 if batch == 16 else 5, *image), "nan_in_sample": 1}
            )


@pytest.mark.parametrize("c", LATENTS, ids=named)
def test_gradient_and_sample_losses_of_latents_are_one_kernel(results, c):
    look = results[0][c.name]
    assert (look["kernels"], look["other_calls"]) == (1, 0), look
    assert not look["in_float64"]


@pytest.mark.parametrize("c", IMAGES, ids=named)
def test_large_images_take_at_most_three_kernels(results, c):
    look = results[0][c.name]
    assert 2 <= look["kernels"] <= 3, look
    assert look["other_calls"] == 0
    assert not look["in_float64"]


@pytest.mark.parametrize("c", [*LATENTS, *IMAGES], ids=named)
def test_every_configuration_becomes_a_cubin_without_spills(results, c):
    cubins = results[0][c.name]["cubins"]
    assert {cubin["kernel"] for cubin in cubins}
    for cubin in cubins:
        assert cubin["cubin_bytes"] > 0
        assert cubin["spilled_bytes"] == 0, cubin
        assert cubin["shared_bytes"] <= 48 << 10, cubin


def test_a_spill_would_be_seen(results):
    assert all(cubin["spilled_bytes"] > 0 for cubin in results[0][STARVED.name]["cubins"])


def test_the_generated_kernels_are_exact_for_every_batch_and_mask_samples_that_are_not_finite(results):
    _, replays = results
    assert {name.partition(" float32")[0] for name in replays} >= {*LOSSES, *MORE}
    for name, replay in replays.items():
        for dtype, error in replay["errors"]:
            assert error <= TOLERANCE[dtype], f"{name}: {error} in {dtype}"

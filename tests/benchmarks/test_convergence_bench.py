"""The study of `benchmarks/bench_convergence.py` trains many runs side by side: each is what `attach` makes of one."""

import math
from dataclasses import replace

import pytest
import torch
from bench_convergence import beyond
from coloured_shapes import images
from convergence_goals import verdict
from convergence_methods import BASELINE, METHODS, Method, Regime, SingleAuto
from convergence_results import Result, at, crossing
from convergence_runs import RECORDING, TRAINING, Distillation
from convergence_worlds import P_MEAN, P_STD, denoising, seeded, world

import disback_plugin as disback
from disback_plugin.schedules import Auto

REGIME = Regime("gauss10-2d", "scratch", 10.0, 0)
RATE, UPDATES, SEED = 1e-3, 30, 3
AUTO = METHODS[-1]


@pytest.fixture(scope="module")
def place():
    return world("gauss10-2d")


def study(place, methods, seeds):
    runs = Distillation(
        place, REGIME, methods, [RATE] * len(methods), seeds, place.random(seeds), place.random([s + 50 for s in seeds])
    )
    runs.record()
    return runs


def attached_loop(place, folder):
    """A plain loop with torch's own Adam that knows nothing of DisBack, on the random numbers of the study."""
    teacher, fake, generator = (place.build(1) for _ in range(3))
    for network, seed in ((teacher, SEED), (fake, SEED), (generator, SEED + 50)):
        network.load_state_dict(place.random([seed]))
    fake.requires_grad_(True)
    generator.requires_grad_(True)
    fake_adam, generator_adam = (
        torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.0, 0.999)) for network in (fake, generator)
    )
    streams = {purpose: seeded(1_000_003 * purpose + SEED) for purpose in (TRAINING, RECORDING)}

    def draws(purpose):
        return [torch.randn(shape, generator=streams[purpose])[None] for shape in ((64, 2), (64,), (64, 2))]

    def sample(z):
        return generator(REGIME.sigma_init * z, torch.tensor(REGIME.sigma_init))

    def fake_step(purpose):
        z, log_sigma, eps = draws(purpose)
        fake_adam.zero_grad()
        denoising(fake, sample(z).detach(), eps, log_sigma).sum().backward()
        fake_adam.step()

    def generator_step(z, log_sigma, eps):
        x, sigma = sample(z), (P_MEAN + P_STD * log_sigma).exp()[..., None]
        with torch.no_grad():
            x_t = x + sigma * eps
            g = fake(x_t, sigma[..., 0]) - teacher(x_t, sigma[..., 0])
        generator_adam.zero_grad()
        x.backward(g / x.shape[1])
        generator_adam.step()

    with disback.attach(
        teacher=teacher, fake_score=fake, generator_optimizer=generator_adam, fake_score_optimizer=fake_adam,
        path=folder, record=200, every=200, codec="exact", schedule="auto",
    ) as handle:  # fmt: skip
        while handle.phase == "recording":
            fake_step(RECORDING)
            generator_step(torch.zeros(1, 64, 2), torch.zeros(1, 64), torch.zeros(1, 64, 2))
        for _ in range(UPDATES):
            fake_step(TRAINING)
            generator_step(*draws(TRAINING))
    return disback.DegradationPath.from_pretrained(folder).manifest, generator


def test_one_member_of_the_study_is_what_attach_makes_of_a_plain_loop(place, tmp_path):
    runs = study(place, [AUTO], [SEED])
    manifest, generator = attached_loop(place, tmp_path)
    assert (manifest.updates_to_fit, manifest.ended) == (runs.fitted[0], runs.recorded[0])
    before = [weight.clone() for weight in runs.generator.parameters()]
    runs.train(UPDATES)
    for ours, theirs, start in zip(runs.generator.parameters(), generator.parameters(), before, strict=True):
        moved = (theirs - start).norm()
        assert (ours - theirs).norm() < 1e-2 * moved


def test_a_member_does_not_depend_on_its_company(place):
    methods = [BASELINE, METHODS[3], AUTO]
    together, alone = study(place, methods, [2, SEED]), study(place, [AUTO], [SEED])
    assert (together.fitted[-1], together.recorded[-1]) == (alone.fitted[0], alone.recorded[0])
    together.train(3)
    alone.train(3)
    for many, one in zip(together.generator.parameters(), alone.generator.parameters(), strict=True):
        torch.testing.assert_close(many[-1], one[0], rtol=1e-3, atol=1e-4)


def test_a_method_without_a_recording_leaves_its_fake_score_alone(place):
    runs = study(place, [BASELINE, Method("warm", BASELINE.schedule, 3)], [SEED])
    for fake, teacher in zip(runs.fake.parameters(), runs.target.parameters(), strict=True):
        assert torch.equal(fake[0], teacher[0])
        assert not torch.equal(fake[1], teacher[1])


@pytest.mark.parametrize("fitted", [5, 15, 70])
def test_the_single_precision_of_auto_is_auto(fitted):
    for update in range(4 * fitted):
        assert SingleAuto(fitted)(update, 1) == pytest.approx(Auto(fitted)(update, 1), abs=2e-7)


def result(ours, fitted=(0, 5), **more):
    def run(curve):
        return {"updates": [0, 20, 40, 60, 80], "ema": [[v] for v in curve], "raw": [[v] for v in curve]}

    runs = {"diff-instruct": run([9, 7, 1, 1, 1]), "auto": run(ours), **{k: run(v) for k, v in more.items()}}
    return Result({"rate": 1e-3, "R": {"auto": [fitted]}, "runs": runs})


def test_a_round_with_two_updates_of_s_phi_has_one_of_the_generator_and_costs_four_passes_more(place):
    regime = replace(REGIME, ratio=2)
    weights = place.random([SEED])
    runs = Distillation(place, regime, [BASELINE], [RATE], [SEED], weights, weights)
    runs.train(3)
    assert (runs._fake_adam.updates.item(), runs._generator_adam.updates.item()) == (6, 3)
    assert regime.cost == REGIME.cost + 4


def test_each_coloured_shape_is_of_one_colour_on_a_dark_ground():
    shapes = torch.nn.functional.pixel_shuffle(images().view(-1, 12, 8, 8), 2)
    assert shapes.shape == (4_000, 3, 16, 16)
    assert shapes.abs().max() <= 1
    edges = torch.cat([shapes[:, :, 0], shapes[:, :, :, 0]], 2)
    assert edges.median() == pytest.approx(-0.8, abs=1e-3)
    # Of a pixel inside each channel is at its end; all such pixels of an image have the same colour.
    inside = (shapes.abs() > 0.95).all(1)
    assert inside.flatten(1).any(1).all()
    for image, where in zip(shapes, inside, strict=True):
        assert len(image[:, where].sign().unique(dim=1).T) == 1


def test_the_same_curve_is_neither_faster_nor_better():
    same = result([9, 7, 1, 1, 1])
    assert same.speed("auto", 2.0, 0) == same.speed("auto", 2.0, 0, compute=True) == 1.0
    assert same.last("auto", same.ema) == same.equal_compute("auto") == same.least("auto") == [1.0]


def test_who_was_nearer_on_the_way_has_the_lesser_least_distance_whatever_the_end():
    passed = result([9, 7, 0.5, 2, 2])
    assert passed.least("auto") == [0.5]
    assert passed.last("auto", passed.ema) == [1.5]


def test_a_recording_costs_its_updates():
    paid = result([9, 7, 1, 1, 1], fitted=(90, 5))  # 90 at 4 passes are 40 updates at 9
    crossed = 20 + 5 / 6 * 20
    assert paid.speed("auto", 2.0, 0, compute=True) == pytest.approx(crossed / (crossed + 40))
    assert paid.equal_compute("auto") == [(9 + 7 + 1) / 3]  # at updates 0, 20, 40


def test_who_never_reaches_a_threshold_counts_as_late_and_who_began_below_it_not_at_all():
    never = result([9, 9, 9, 9, 9], warm=[1, 1, 1, 1, 1])
    assert never.speed("auto", 1.0, 0) == 40 / 160
    assert never.speed("auto", 0.5, 0) == 1.0
    assert never.speed("warm", 2.0, 0) is None
    assert never.stalled("auto") == [True]


def test_a_run_that_is_not_finite_has_diverged_and_stalled():
    lost = result([9, 7, math.inf, math.nan, math.nan])
    assert lost.diverged("auto") == 1
    assert lost.stalled("auto") == [True]


def test_a_best_rate_at_the_edge_has_the_next_beyond_it_tried_and_one_inside_has_not():
    assert beyond({"0.001": 1.0, "0.002": 2.0, "0.004": 3.0}) == 5e-4
    assert beyond({"0.001": 3.0, "0.002": 2.0, "0.004": 1.0}) == 8e-3
    assert beyond({"0.001": 3.0, "0.002": 1.0, "0.004": 2.0}) is None


def test_curves_are_read_between_evaluations():
    assert crossing([0, 20], [4.0, 2.0], 3.0) == 10.0
    assert at([0, 20], [4.0, 2.0], 10.0) == 3.0


@pytest.mark.parametrize(
    ("better", "seeds", "expected"), [(8, 10, 0), (9, 10, 1), (1, 10, -1), (2, 10, 0), (14, 20, 0), (15, 20, 1)]
)
def test_better_is_said_only_of_more_seeds_than_chance_gives(better, seeds, expected):
    assert verdict(better, seeds) == expected


def test_a_method_at_its_own_best_rate_is_told_apart_from_it_at_diff_instructs():
    def run(curve):
        return {"updates": [0, 20, 40, 60, 80], "ema": [[v] for v in curve], "raw": [[v] for v in curve]}

    content = {
        "rate": 1e-3,
        "R": {"auto": [(0, 5)]},
        "runs": {"diff-instruct": run([9, 7, 2, 2, 2]), "auto": run([9, 7, 3, 3, 3])},
        "own_rates": {"auto": 2e-3},
        "own_runs": {"auto": run([9, 7, 1, 1, 1]) | {"recorded": [(90, 5)]}},
    }
    both = Result(content)
    assert both.best == {"diff-instruct": "diff-instruct", "auto": "auto, 0.002"}
    assert both.last(both.best["auto"], both.ema) == [0.5]
    assert both.last("auto", both.ema) == [1.5]
    assert [both.head_start(label, 0) for label in ("auto", "auto, 0.002")] == [0.0, 40.0]

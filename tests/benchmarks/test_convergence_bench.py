"""The study of `benchmarks/bench_convergence.py` trains many runs side by side: each is what `attach` makes of one."""

import json
import math
from dataclasses import replace

import pytest
import torch
from bench_convergence import beyond
from coloured_shapes import images
from convergence_methods import (
    BASELINE,
    CANDIDATES,
    COMPARISON,
    METHODS,
    NEW_REGIMES,
    REGIMES,
    Altered,
    Method,
    Regime,
    SingleAuto,
)
from convergence_results import Result, at, comparisons, crossing, over_all, read, verdict
from convergence_runs import RECORDING, TRAINING, Distillation
from convergence_tables import EVIDENCE, decided, harms, text
from convergence_worlds import P_MEAN, P_STD, denoising, mnist, seeded, world

import disback_plugin as disback
from disback_plugin.schedules import Auto

REGIME = Regime("gauss10-2d", "scratch", 10.0, 0)
RATE, UPDATES, SEED = 1e-3, 30, 3
AUTO = Method("auto", Auto(), None)


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
def test_the_single_precision_of_the_positions_is_autos(fitted):
    for update in range(4 * fitted):
        assert Altered(fitted)(update, 1).position == pytest.approx(Auto(fitted)(update, 1).position, abs=2e-7)


def result(ours, fitted=(0, 5), ratio=1, **more):
    def run(curve):
        return {"updates": [0, 20, 40, 60, 80], "ema": [[v] for v in curve]}

    runs = {"diff-instruct": run([9, 7, 1, 1, 1]), "auto": run(ours), **{k: run(v) for k, v in more.items()}}
    return Result({"rate": 1e-3, "R": {"auto": [fitted]}, "runs": runs}, ratio)


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
    assert same.last("auto") == same.equal_compute("auto") == [1.0]


@pytest.mark.parametrize(
    ("recorded", "apart", "ratio", "rounds"), [(40, False, 1, 40), (90, True, 1, 40), (200, False, 5, 40)]
)
def test_a_recording_costs_its_rounds_in_a_loop_and_its_updates_apart_from_one(recorded, apart, ratio, rounds):
    paid = result([9, 7, 1, 1, 1], fitted=(recorded, 5), ratio=ratio)
    crossed = 20 + 5 / 6 * 20
    assert paid.head_start("auto", 0, apart) == rounds
    assert paid.speed("auto", 2.0, 0, compute=True, apart=apart) == pytest.approx(crossed / (crossed + rounds))
    assert paid.equal_compute("auto", apart) == [(9 + 7 + 1) / 3]  # at updates 0, 20, 40


def test_the_printed_means_are_those_of_an_independent_check():
    found = read(REGIMES)
    ours = [over_all(found, own=own, apart=apart)["auto"][5] for own in (True, False) for apart in (True, False)]
    assert ours == pytest.approx([0.917, 0.940, 1.001, 1.024], abs=5e-4)


def test_a_study_says_its_rules_winner_and_holds_what_was_run():
    page, tables = EVIDENCE.read_text(), text(REGIMES)
    for marker, lines in tables.items():
        assert "\n".join(lines[:-1]) in page, marker
    assert decided(comparisons(REGIMES | NEW_REGIMES)) == "walk"


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.2, 1.3], True), ([1.5, 0.9], False), ([1.05, 1.05], False), ([1.2] * 9 + [0.9] * 3, False)],
)
def test_a_method_harms_beyond_chance_only(values, expected):
    assert harms(values) is expected


def candidates(**finals):
    """One regime whose candidates end at these distances; every recording is free."""

    def run(value):
        return {"updates": [0, 20, 40, 60], "ema": [[value, value]] * 4, "recorded": [(0, 5)] * 2, "steps": []}

    runs = {method.name: run(1.0) for method in COMPARISON} | {name: run(value) for name, value in finals.items()}
    return Result({"rate": 1e-3, "runs": runs})


@pytest.mark.parametrize(
    ("finals", "winner"),
    [
        ({}, "warm, fitted"),
        ({"auto": 0.985}, "warm, fitted"),
        ({"auto": 0.9}, "auto"),
        ({"auto": 0.9, "walk": 0.91}, "walk"),
        ({"walk, divided": 0.9}, "walk, divided"),
    ],
)
def test_the_default_is_the_nearest_and_within_two_per_cent_the_simplest(finals, winner):
    assert [method.name for method in CANDIDATES] == ["warm, fitted", "walk", "walk, divided", "auto"]
    assert decided({"one": candidates(**finals)}) == winner


def test_a_candidate_that_harms_in_two_regimes_more_loses_although_it_is_nearest():
    harmed = candidates(auto=1.2)
    assert decided({"a": candidates(auto=0.1), "b": harmed}) == "auto"
    assert decided({"a": candidates(auto=0.1), "b": harmed, "c": harmed}) == "warm, fitted"


def test_altered_schedules_keep_what_they_say():
    position, gradient = SingleAuto(10)(5, 1)
    assert Altered(10)(5, 1) == (position, 1.0)
    assert Altered(10, kept="divided")(5, 1) == (position, pytest.approx(1 / (1 - position)))
    assert Altered(10, kept="ramp")(5, 1) == (0.0, gradient)
    assert Altered(10, kept="warm")(5, 1) == (0.0, 1.0)


def test_an_effective_step_is_the_rms_of_the_step_over_the_rate_and_a_cap_bounds_it(place):
    capped = Method("capped", BASELINE.schedule, capped=True)
    runs = study(place, [BASELINE, COMPARISON[1], capped], [SEED])
    runs.fitted[2] = 2  # the cap's length is ten times it
    moved, lengths = [], []
    step = runs._generator_adam.step

    def watched(gradients, moving, capped):
        before = torch.cat([weight.detach().flatten(1) for weight in runs.generator.parameters()], 1)
        lengths.append(step(gradients, moving, capped))
        after = torch.cat([weight.detach().flatten(1) for weight in runs.generator.parameters()], 1)
        moved.append((after - before).square().mean(1).sqrt() / torch.tensor([RATE, 1.25 * RATE, RATE]))

    runs._generator_adam.step = lambda *arguments: watched(*arguments) or lengths[-1]
    windows = runs.train(95, steps=True)["steps"]
    torch.testing.assert_close(torch.stack(lengths), torch.stack(moved), rtol=1e-2, atol=1e-3)
    assert max(length[2] for length in lengths[:20]) <= 1 + 1e-6 < max(length[2] for length in lengths[20:])
    assert windows[0][0] == pytest.approx(float(torch.stack(lengths)[:10, 0].mean()))


def test_digits_of_28_pixels_are_halved_and_four_neighbours_become_channels(tmp_path):
    image = torch.zeros(28, 28)
    image[6, 4] = image[6, 5] = image[7, 4] = image[7, 5] = 1.0  # in 16 x 16 with its border of one: row 4, column 3
    for digit in range(10):
        (tmp_path / f"{digit}.json").write_text(json.dumps({"data": image.flatten().tolist() * 2}))
    images = mnist(tmp_path)
    assert images.shape == (20, 256)
    halved = torch.nn.functional.pixel_shuffle(images.view(-1, 4, 8, 8), 2)
    assert (halved[:, 0, 4, 3] == 1).all()
    assert (halved.flatten(1) == -1).sum(1).tolist() == [255] * 20


@pytest.mark.slow
@pytest.mark.parametrize("divided", [False, True])
def test_a_loop_around_the_attention_network_records_and_trains(monkeypatch, divided):
    pytest.importorskip("diffusers")
    import convergence_attention as attention

    monkeypatch.setattr(attention, "UPDATES", 2)
    monkeypatch.setattr(attention, "EVALUATE_EVERY", 1)
    torch.manual_seed(0)
    state = attention.Denoiser(0.75).state_dict()
    loop, (recorded, fitted) = attention.run(state, 1e-3, 100, Altered(), 200, divided)
    assert (recorded >= 10, fitted >= 10, len(loop.curve)) == (True, True, 3)
    assert loop.lengths[0] == pytest.approx(1.0, abs=0.01)  # whatever the gradient's factor is, under Adam
    for restored, weight in zip(loop.teacher.state_dict().values(), state.values(), strict=True):
        assert torch.equal(restored, weight)


def test_half_the_samples_of_a_two_step_student_are_of_its_first_step(place):
    regime = replace(REGIME, second=0.8)
    weights = place.random([SEED])
    runs = Distillation(place, regime, [BASELINE], [RATE], [SEED], weights, weights)
    z = torch.randn(1, 6, 4)
    half, last = runs._generate(z), runs._generate(z, last=True)
    one = runs.generator(10.0 * z[..., :2], torch.tensor(10.0))
    torch.testing.assert_close(half[:, :3], one[:, :3])
    torch.testing.assert_close(half[:, 3:], last[:, 3:])
    torch.testing.assert_close(last, runs.generator(one + 0.8 * z[..., 2:], torch.tensor(0.8)))


def test_who_never_reaches_a_threshold_counts_as_late_and_who_began_below_it_not_at_all():
    never = result([9, 9, 9, 9, 9], warm=[1, 1, 1, 1, 1])
    assert never.speed("auto", 1.0, 0) == 40 / 160
    assert never.speed("auto", 0.5, 0) == 1.0
    assert never.speed("warm", 2.0, 0) is None
    assert (never.above("auto", 2), never.above("auto", 20), never.above("diff-instruct", 2)) == (1, 0, 0)


@pytest.mark.parametrize("curve", [[9, 7, math.inf, math.nan, math.nan], [9, 7, 21, 21, 21]])
def test_a_run_that_is_not_finite_or_ends_above_twenty_times_the_median_has_diverged_and_stalled(curve):
    lost = result(curve)
    assert lost.above("auto", 20) == lost.above("auto", 2) == 1


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
        return {"updates": [0, 20, 40, 60, 80], "ema": [[v] for v in curve]}

    content = {
        "rate": 1e-3,
        "R": {"auto": [(0, 5)]},
        "runs": {"diff-instruct": run([9, 7, 2, 2, 2]), "auto": run([9, 7, 3, 3, 3])},
        "own_rates": {"auto": 2e-3},
        "own_runs": {"auto": run([9, 7, 1, 1, 1]) | {"recorded": [(90, 5)]}},
    }
    both = Result(content)
    assert both.best == {"diff-instruct": "diff-instruct", "auto": "auto, 0.002"}
    assert both.last(both.best["auto"]) == [0.5]
    assert both.last("auto") == [1.5]
    assert [both.head_start(label, 0) for label in ("auto", "auto, 0.002")] == [0.0, 90.0]

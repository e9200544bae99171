from __future__ import annotations

import json

import gpu_study
import gpu_study_report
import pytest
import torch
from segment_digits import draw


def test_digits_are_bright_strokes_on_a_dark_ground_and_follow_their_seed():
    images = draw(600, 28)
    assert images.shape == (600, 1, 28, 28)
    assert images.abs().max() <= 1
    ink = (images > -0.5).float().mean((1, 2, 3))
    assert ink.min() > 0.01  # an upright one, thin
    assert ink.max() < 0.5
    assert (images[:, :, [0, -1]] < -0.9).float().mean() > 0.99
    assert torch.equal(draw(600, 28), images)
    assert not torch.equal(draw(600, 28, seed=1), images)


@pytest.mark.slow
def test_the_tiny_study_trains_a_teacher_runs_every_method_and_writes_a_table_and_a_figure(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        gpu_study.main(["--out", str(tmp_path), "--tiny"])
    assert done.value.code == 0
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["teacher losses"][-1] < 0.7 * found["teacher losses"][0]
    assert found["other data"] < found["teacher"]
    (methods,) = found["rates"].values()
    assert tuple(methods) == gpu_study.METHODS
    for name, run in methods.items():
        assert [at for at, _ in run["curve"]] == [0, 10, 20, 30]
        assert len({value for _, value in run["curve"]}) == 4, name
        assert run["rounds"] == 30 + run["recorded"]
    recorded = {name: run["recorded"] for name, run in methods.items()}
    assert recorded["disback"] == recorded["warm start"] > 0
    assert recorded["diff-instruct"] == recorded["rate x 1.25"] == recorded["gradient ramp"] == 0
    starts = [run["curve"][0] for run in methods.values()]
    assert starts == [starts[0]] * 5
    page = (tmp_path / "study.txt").read_text()
    assert page in capsys.readouterr().out
    assert all(name in page for name in methods)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def small():
    data = draw(100, 8)
    teacher, _ = gpu_study.train_teacher({**gpu_study.TINY, "teacher_updates": 3}, data, until=float("inf"))
    return teacher, gpu_study.Features(data)


@pytest.mark.slow
def test_with_disback_attached_and_record_0_the_baseline_is_the_same_bit_for_bit(small):
    plain, attached, other = (
        gpu_study.Run(small[0], gpu_study.TINY, rate, small[1], options)
        for rate, options in ((1e-3, None), (1e-3, {"record": 0}), (2e-3, None))
    )
    for run in (plain, attached, other):
        for _ in range(10):
            run.round()
    attached.handle.detach()
    for name in ("generator", "fake", "teacher"):
        states = [getattr(run, name).state_dict() for run in (plain, attached, other)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
        same = all(torch.equal(states[0][key], states[2][key]) for key in states[0])
        assert same == (name == "teacher")
    assert plain.curve == attached.curve
    assert [float(step) for _, step in plain.steps] == [float(step) for _, step in attached.steps]


@pytest.mark.slow
def test_a_budget_that_is_over_ends_the_study_with_what_there_is(small, tmp_path, monkeypatch):
    rounds = []
    once = gpu_study.Run.round
    monkeypatch.setattr(gpu_study.Run, "round", lambda run: (rounds.append(run), once(run)))
    monkeypatch.setattr(gpu_study.time, "time", lambda: float(len(rounds) > 89))
    gpu_study.study(gpu_study.TINY, 1e-3, small[0], small[1], tmp_path, until=0.5)
    found = json.loads((tmp_path / "rate-0.001.json").read_text())
    assert sum(run["rounds"] for run in found.values()) == len(rounds) == 90
    # Who has the fewest updates is next.
    updates = [run["rounds"] - run["recorded"] for run in found.values()]
    assert max(updates) - min(updates) <= 1
    assert min(updates) > 0
    assert not list(tmp_path.glob("*.part"))


def curve(*values):
    return {"rate": 1e-4, "recorded": 5, "fitted": 3, "curve": list(enumerate(values)), "steps": [(1, 0.5), (2, 1.0)]}


def test_the_table_cuts_all_curves_at_the_last_common_update_and_charges_a_recording_as_rounds():
    methods = {"diff-instruct": curve(8.0, 4.0, 1.0, 1.0, 1.0), "disback": curve(8.0, 2.0, 1.0, 1.0)}
    methods["diff-instruct"]["recorded"] = 0
    lines = gpu_study_report.table(methods).splitlines()
    # The last three of four evaluations: (4 + 1 + 1) / 3 = 2 against (2 + 1 + 1) / 3.
    assert lines[1].split()[:3] == ["diff-instruct", "2", "1.00"]
    assert lines[2].split()[:3] == ["disback", "1.333", "0.67"]
    # 8 = 4 x 2 is at update 0; 4 = 2 x 2 at update 1 and, between 8 and 2, at 2/3.
    assert " ".join(lines[1].split()[3:9]) == "0 / 0 1 / 1"
    assert " ".join(lines[2].split()[3:9]) == "0 / 5 1 / 6"

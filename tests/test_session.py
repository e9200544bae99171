"""What real trainers do while a path is recorded and walked back."""

from __future__ import annotations

import pytest
import torch
from worlds import Run, clone, difference, everything, hooks

import disback_plugin as disback
from disback_plugin.errors import OptionError, PathError, RoleError
from disback_plugin.schedules import Fixed, GradientRamp, Ramp
from disback_plugin.weights.network import ScoreNetwork


def test_a_teacher_in_train_mode_may_write_its_running_statistics(tmp_path):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    run.teacher.train()
    with disback.attach(**run.roles(), path=tmp_path, record=3, every=1, schedule=Ramp(4)) as handle:
        run.steps(9)
        assert handle.phase == "done"
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
    assert run.teacher.training


def test_a_teacher_whose_requires_grad_the_trainer_flips_moves_as_any_other(tmp_path):
    # DMD2 turns the gradients of its whole guidance model on and off around each generator's turn
    plain, run = Run(), Run()
    plain.teacher.requires_grad_(False)
    options = {"record": 4, "every": 2, "schedule": Fixed(2)}
    with disback.attach(**plain.roles(), path=tmp_path / "plain", **options):
        plain.steps(9)
    run.teacher.requires_grad_(True)
    with disback.attach(**run.roles(), path=tmp_path / "flipped", **options) as handle:
        for i in range(9):
            run.teacher.requires_grad_(i % 3 != 0)
            run.fake_score.requires_grad_(True)
            run.fake_step()
            run.fake_score.requires_grad_(False)
            run.generator_step()
            assert all(p.requires_grad is (i % 3 != 0) for p in run.teacher.parameters()), "the flag is the trainer's"
        assert handle.phase == "done"
    assert difference(everything(run), everything(plain)) == []


def test_accelerates_optimizers_are_held_still_and_counted(tmp_path):
    from accelerate import Accelerator

    run, plain = Run(optimizer="adamw"), Run(optimizer="adamw")
    run.optimizer_f, run.optimizer_g = Accelerator(cpu=True).prepare(run.optimizer_f, run.optimizer_g)
    results = []
    for each, name in ((run, "a"), (plain, "b")):
        before = clone(dict(each.generator.state_dict()))
        with disback.attach(**each.roles(), path=tmp_path / name, record=3, every=1, schedule=Fixed(1)) as handle:
            each.steps(3)
            assert difference(dict(each.generator.state_dict()), before) == []
            each.steps(4)
            results.append([handle.generator_updates, handle.fake_score_updates, dict(each.generator.state_dict())])
    assert difference(*results) == []


@pytest.mark.parametrize("ratio", [1, 2, 5])
def test_a_generator_that_steps_first_and_rarely_is_held_still_until_the_path_is_complete(tmp_path, ratio):
    # DMD2: the generator's turn is before the fake score's, at step 0 and then at each multiple of the ratio
    run = Run()
    before = clone(dict(run.generator.state_dict()))
    with disback.attach(**run.roles(), path=tmp_path, record=6, every=2, schedule=Fixed(1)) as handle:
        seen = []
        for step in range(40):
            if step % ratio == 0:
                run.generator_step()
                seen.append((handle.fake_score_updates, handle.generator_updates, handle.position))
            run.fake_step()
            if not handle.generator_updates:
                assert difference(dict(run.generator.state_dict()), before) == []
        handed_over = next(i for i, (_, _, position) in enumerate(seen) if position)
        assert seen[handed_over][0] == -(-6 // ratio) * ratio, "at the first turn after node N"
        assert [row[1:] for row in seen[handed_over : handed_over + 3]] == [(0, 2.0), (1, 1.0), (2, 0.0)]
        assert [node.iteration for node in handle.path.nodes] == [2, 4, 6]


def test_a_fake_forward_may_wait_for_the_generators_step(tmp_path):
    # fake forward, generator step, fake backward: the hand-over must not cut the waiting graph
    run = Run()
    run.fake_score.eval()
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Fixed(1)) as handle:
        run.steps(1)
        run.fake_step()
        x = torch.ones(4, 2)
        waiting = run.fake_score(x, torch.ones(4, 1)).square().mean()
        run.generator_step()
        assert handle.phase == "backtracking"
        waiting.backward()


def test_an_attention_mask_of_minus_infinity_survives_path_and_mixture(tmp_path):
    run = Run()
    for net in (run.teacher, run.fake_score):
        net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(4)):
        run.steps(4)
        assert torch.equal(run.teacher.mask, torch.tensor([0.0, -torch.inf]))


def test_a_run_may_change_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run()
    with disback.attach(**run.roles(), path="runs/path", record=2, every=1, schedule=Ramp(4)):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        run.steps(4)
    assert (tmp_path / "runs" / "path" / "node-002.safetensors").exists()


def test_a_trainer_that_loads_its_checkpoint_first_gives_the_state_to_attach(tmp_path):
    options = {"path": tmp_path / "path", "record": 4, "every": 2, "schedule": Ramp(6)}
    for moment in (3, 7):
        whole, first = Run(), Run()
        with disback.attach(**whole.roles(), **options | {"path": tmp_path / f"whole{moment}"}):
            whole.steps(12)
            expected = everything(whole)
        handle = disback.attach(**first.roles(), **options | {"path": tmp_path / f"split{moment}"})
        first.steps(moment)
        saved, state = first.checkpoint(), handle.state_dict()

        late = Run()
        late.load(saved)
        late.teacher.load_state_dict(first.teacher.state_dict())  # DMD2's checkpoints hold whichever node was there
        with disback.attach(**late.roles(), **options | {"path": tmp_path / f"split{moment}"}, state=state):
            late.steps(12 - moment)
            assert difference(everything(late), expected) == []


def test_a_path_recorded_again_is_another_path(tmp_path):
    import shutil

    run = Run()
    handle = disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(4))
    run.steps(3)
    saved, state = run.checkpoint(), handle.state_dict()
    handle.detach()
    shutil.rmtree(tmp_path)
    again = Run()
    again.stream.manual_seed(5)  # the same teacher, student and plan, other noise
    with disback.attach(**again.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(4)) as other:
        again.steps(3)
        again.load(saved)
        with pytest.raises(disback.DisbackError, match="other nodes"):
            other.load_state_dict(state)


def test_a_detached_handle_refuses_a_state_and_changes_nothing(tmp_path):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    handle = disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(9))
    run.steps(4)
    state = handle.state_dict()
    with handle.original_teacher():
        handle.detach()
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
    assert handle.position == 0.0
    with pytest.raises(disback.DisbackError, match="detached"):
        handle.load_state_dict(state)
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []


def test_an_evaluation_inside_which_the_generator_moves_ends_at_the_right_place(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Fixed(2)) as handle:
        run.steps(3)
        with handle.original_teacher():
            run.step()
            assert difference(ScoreNetwork(run.teacher).state_dict(), handle.path[0]) == []
        assert (handle.generator_updates, handle.position) == (2, 0.0)
        assert difference(ScoreNetwork(run.teacher).state_dict(), handle.path[0]) == []


def test_detach_restores_the_teacher_after_the_folder_was_deleted(tmp_path):
    import shutil

    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    handle = disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(9))
    run.steps(4)
    assert handle.position > 0
    shutil.rmtree(tmp_path)
    handle.detach()
    assert hooks(run) == [0, 0, 0, 0]
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []


def test_a_second_handle_on_one_loop_is_refused(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "a", record=2, every=1):
        before = clone(dict(run.fake_score.state_dict()))
        with pytest.raises(RoleError, match="attached to already"):
            disback.attach(**run.roles(), path=tmp_path / "b", record=2, every=1)
        assert difference(dict(run.fake_score.state_dict()), before) == []
    with disback.attach(**run.roles(), path=tmp_path / "a", record=2, every=1):
        pass


def test_a_loop_that_steps_other_optimizers_has_a_warning(tmp_path, caplog):
    with disback.attach(**Run().roles(), path=tmp_path, record=2, every=1):
        Run().steps(2)
    assert "no optimizer step was seen" in caplog.text


def test_a_bf16_teacher_that_rounds_the_nodes_away_has_a_warning_with_the_figure(tmp_path, caplog):
    run = Run(dtype=torch.bfloat16)
    run.optimizer_f = torch.optim.Adam(run.fake_score.parameters(), lr=1e-6)
    run.fake_score.eval()  # running statistics move a lot
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1):
        run.steps(2)
    assert "rounds node 2 by" in caplog.text


def test_a_folder_that_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    from disback_plugin.path import files

    run = Run()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PathError, match="cannot be written"):
        disback.attach(**run.roles(), path=tmp_path / "file" / "path", record=2, every=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(PathError, match="No space left"):
        disback.attach(**run.roles(), path=tmp_path / "new" / "path", record=2, every=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert hooks(run) == [0, 0, 0, 0]


def test_record_may_be_any_whole_number_and_smaller_than_every(tmp_path):
    import numpy as np

    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=np.int64(3)) as handle:
        run.steps(3)
        assert [node.iteration for node in handle.path.nodes] == [3]


def test_a_state_is_loaded_without_a_path_too(tmp_path):
    run, late = Run(), Run()
    with disback.attach(**run.roles(), record=0, schedule=GradientRamp(50)) as handle:
        run.steps(20)
        saved, state = run.checkpoint(), handle.state_dict()
    late.load(saved)
    with disback.attach(**late.roles(), record=0, schedule=GradientRamp(50), state=state) as handle:
        assert handle.state_dict() == state
    with pytest.raises(disback.DisbackError, match="a state with keys"):
        disback.attach(**Run().roles(), record=0, state={"garbage": 1})


def test_a_state_saved_before_a_crash_in_the_middle_of_a_node(tmp_path):
    run = Run()
    handle = disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule=Ramp(4))
    run.steps(3)
    saved, state = run.checkpoint(), handle.state_dict()
    (tmp_path / "node-002.safetensors").write_bytes(b"written, but not yet listed")
    late = Run()
    late.load(saved)
    with disback.attach(**late.roles(), path=tmp_path, state=state, schedule=Ramp(4)) as handle:
        late.steps(2)
        assert handle.phase == "backtracking"
        handle.path.verify()


def test_a_node_that_could_not_be_written_is_due_again(tmp_path, monkeypatch):
    from disback_plugin.path import files

    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="warm") as handle:
        run.steps(1)
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_tensors", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run.fake_step()
        run.steps(4)
        assert handle.phase == "done"
    assert [node.iteration for node in disback.DegradationPath(tmp_path).nodes] == [2, 4]
    with pytest.raises(OptionError, match="the next iteration"):
        disback.DegradationPath(tmp_path).append({}, iteration=3)


def test_detach_while_recording_leaves_the_teacher_as_it_was(tmp_path):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    run.teacher.train()
    with disback.attach(**run.roles(), path=tmp_path, record=9, every=3):
        run.steps(3)
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []


class GeneratorFirst(Run):
    """A loop in the order of Algorithm 2: the generator's update, then those of s_phi."""

    fake_steps = 1

    def step(self):
        self.generator_step()
        for _ in range(self.fake_steps):
            self.fake_step()


@pytest.mark.parametrize("optimizer", ["adam", "sgd-momentum"])
@pytest.mark.parametrize("fake_steps", [1, 2, 3])
def test_with_the_generator_first_in_a_round_its_first_update_sees_the_last_node_as_algorithm_2(
    tmp_path, fake_steps, optimizer
):
    run, hand = GeneratorFirst(optimizer=optimizer), GeneratorFirst(optimizer=optimizer)
    run.fake_steps = hand.fake_steps = fake_steps
    plan = {"record": 6, "every": 2, "codec": "exact", "schedule": "fixed:2,2"}
    with disback.attach(**run.roles(), path=tmp_path / "p", **plan) as handle:
        while handle.phase == "recording":
            run.step()
        assert handle.generator_updates == 0
        start, last = run.checkpoint(), dict(handle.path[3])
        # Forwards in training mode go on changing the running statistics.
        assert all(torch.equal(weight, last[name]) for name, weight in run.fake_score.named_parameters())
        run.steps(6)
        found = everything(run)
    hand.load(start)
    scheduler = disback.TrajectoryScheduler(tmp_path / "p", hand.teacher, schedule="fixed:2,2")
    scheduler.start()
    for _ in range(6):
        hand.generator_step()
        scheduler.step()
        for _ in range(fake_steps):
            hand.fake_step()
    assert difference(everything(hand), found) == []


def test_with_the_fake_score_first_it_is_updated_before_the_generator_as_ever(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "p", record=4, every=2, schedule="warm") as handle:
        run.steps(4)
        run.fake_step()
        assert (handle.generator_updates, handle.fake_score_updates) == (0, 5)

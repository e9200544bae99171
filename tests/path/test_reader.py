"""A path is verified as it is read, whatever happens to its files meanwhile, and written whole or not at all."""

from __future__ import annotations

import os
import shutil

import pytest
from path_edits import flip, rewrite
from worlds import Run, Score, clone, difference

import disback_plugin as disback
from disback_plugin.errors import PathError, StateError
from disback_plugin.path import files
from disback_plugin.path.delta import NodeSource
from disback_plugin.schedules import Fixed, Ramp
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.tensors import checksum, fingerprint


@pytest.mark.parametrize("schedule", [Fixed(1, 1), Ramp(6)])
def test_a_file_changed_in_the_middle_of_a_walk_is_noticed_before_the_teacher_is_written(folder, schedule):
    run = Run()
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=schedule)
    scheduler.start()
    held = clone(dict(run.teacher.state_dict()))
    flip(folder / "node-001.safetensors", -3)
    with pytest.raises(PathError, match="SHA-256"):
        scheduler.step()
    assert difference(dict(run.teacher.state_dict()), held) == []


def test_a_node_that_changes_while_it_is_read_leaves_the_teacher_and_stops_the_walk(folder, monkeypatch):
    run = Run()
    original = clone(dict(run.teacher.state_dict()))
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=Fixed(1, 1))
    scheduler.start()
    flip(folder / "node-001.safetensors", -3)
    monkeypatch.setattr(scheduler.path, "source", lambda position: scheduler.path._node(int(position)))
    with pytest.raises(PathError, match="decodes to checksum"):
        scheduler.step()
    assert difference(dict(run.teacher.state_dict()), original) == []
    for go_on in (scheduler.step, scheduler.wrap(lambda: None)):
        with pytest.raises(StateError, match="whose last move failed"):
            go_on()


def test_a_link_to_the_right_file_is_a_path_as_those_of_the_hub_cache_are(folder, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        shutil.move(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    disback.DegradationPath(folder).verify()


def test_a_path_without_its_teacher_needs_the_teacher_itself(tmp_path):
    run = Run()
    disback.record(
        run.teacher, run.fake_score, run.fake_step, path=tmp_path / "p", iterations=6, every=2, keep_teacher=False
    )
    assert not (tmp_path / "p" / "teacher.safetensors").exists()
    path = disback.DegradationPath(tmp_path / "p")
    path.verify()
    with pytest.raises(PathError, match="a path without its teacher"):
        path[1]
    with pytest.raises(PathError, match="another teacher"):
        disback.TrajectoryScheduler(path, Run(seed=1).teacher)
    teacher = clone(ScoreNetwork(run.teacher).state_dict())
    with disback.attach(**run.roles(), path=path, schedule=Ramp(4)) as handle:
        run.steps(2)
        assert handle.position > 0
        assert difference(ScoreNetwork(run.teacher).state_dict(), teacher) != []
    assert difference(ScoreNetwork(run.teacher).state_dict(), teacher) == []


def test_the_checksums_in_the_manifest_are_those_of_the_decoded_nodes(folder):
    path = disback.DegradationPath(folder)
    for index, entry in enumerate(path.manifest.entries):
        assert entry.checksum == checksum(path[index])
    assert path.manifest.teacher.fingerprint == fingerprint(path[0])


def test_every_recorded_position_is_compared_with_its_checksum(folder):
    run, compared = Run(), []
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=Fixed(1, 1))
    check = scheduler.path.verify_checksum
    scheduler.path.verify_checksum = lambda index, *found: (compared.append(index), check(index, *found))
    scheduler.start()
    for _ in range(3):
        net = ScoreNetwork(Score())
        net.write(scheduler.path.source(scheduler.position))
        assert net.checksum() == scheduler.path.manifest.entries[int(scheduler.position)].checksum
        scheduler.step()
    assert compared == [2, 1, 0]


def test_without_its_teacher_a_path_is_decoded_and_compared_once_the_teacher_is_there(tmp_path):
    run = Run()
    options = {"iterations": 6, "every": 2, "keep_teacher": False}
    disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path, **options)
    rewrite(tmp_path, 1, lambda parts: parts["inner.0.weight|q"].fill_(1))
    path = disback.DegradationPath(tmp_path)
    path.verify()  # files only: nothing can be decoded yet
    before = clone(dict(run.teacher.state_dict()))
    with pytest.raises(PathError, match="decodes to checksum"):
        disback.TrajectoryScheduler(path, run.teacher, schedule=Ramp(6)).start()
    assert difference(dict(run.teacher.state_dict()), before) == []


def test_a_teacher_file_cut_short_under_a_running_walk_is_an_error_and_no_crash(folder):
    run = Run()
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=Ramp(6))
    scheduler.start()
    os.truncate(folder / "teacher.safetensors", 8)
    with pytest.raises(PathError, match="cut to 8 bytes"):
        scheduler.restore_teacher()


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run, calls = Run(), []

    def fake_step():
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(None)
        run.fake_step()

    with pytest.raises(KeyboardInterrupt):
        disback.record(run.teacher, run.fake_score, fake_step, path=tmp_path / "p", iterations=6, every=2)
    (tmp_path / "p" / ".config.json.tmp").symlink_to(victim)
    rest = Run()
    disback.record(rest.teacher, rest.fake_score, rest.fake_step, path=tmp_path / "p", iterations=6, every=2)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "p" / "config.json").is_symlink()


def test_every_file_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    flush, rename = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("flush"), flush(descriptor)))
    monkeypatch.setattr(type(tmp_path), "replace", lambda a, b: (done.append("rename"), rename(a, b))[1])
    files.write_text(tmp_path / "file", "text")
    assert done == ["flush", "rename", "flush"]  # the file, its name, the folder that holds the name


@pytest.mark.parametrize("full", ["create", "append"])
def test_a_full_disk_is_one_error_and_leaves_a_path_or_nothing(tmp_path, monkeypatch, full):
    from safetensors import SafetensorError

    run = Run()

    def broken(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        steps = []

        def fake_step():
            run.fake_step()
            steps.append(None)
            if full == "append":
                patch.setattr(files, "save_file", broken)

        if full == "create":
            patch.setattr(files, "save_file", broken)
        with pytest.raises(PathError, match=r"cannot be written.*No space left"):
            disback.record(run.teacher, run.fake_score, fake_step, path=tmp_path / "p", iterations=4, every=2)
    assert (tmp_path / "p").exists() == (full == "append")
    rest = Run()
    disback.record(rest.teacher, rest.fake_score, rest.fake_step, path=tmp_path / "p", iterations=4, every=2).verify()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_write_leaves_the_teacher_and_nobody_trains_on(folder, monkeypatch, interruption):
    run = Run()
    original = clone(dict(run.teacher.state_dict()))
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=Fixed(1, 1))
    scheduler.start()
    state = scheduler.state_dict()
    read, calls = NodeSource.read, []

    def interrupted(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 4:
            raise interruption
        return read(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(NodeSource, "read", interrupted)
        with pytest.raises(interruption):
            scheduler.step()
    assert difference(dict(run.teacher.state_dict()), original) == []
    assert scheduler.state_dict() == state, "an update that did not end is not counted"
    with pytest.raises(StateError, match="whose last move failed"):
        scheduler.wrap(lambda: None)()
    scheduler.load_state_dict(state)
    scheduler.step()
    assert scheduler.position == 1.0

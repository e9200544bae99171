from __future__ import annotations

import math

import pytest
import torch
from path_edits import flip
from safetensors.torch import load_file
from torch import nn
from worlds import Score, clone, difference

from disback_plugin.errors import MismatchError, OptionError, PathError, TrainingError
from disback_plugin.path.codecs import CODECS
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.weights.network import ScoreNetwork

RECORDING = Recording(iterations=20, every=10, codec="exact")


def states(count):
    out = []
    for seed in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out.append(ScoreNetwork(Score()).state_dict())
    return out


@pytest.fixture
def recorded(tmp_path):
    teacher, *nodes = states(3)
    path = DegradationPath.create(tmp_path / "path", teacher, RECORDING, generator="g")
    for i, node in enumerate(nodes):
        path.append(node, iteration=10 * (i + 1))
    path.finish()
    return path


def test_what_was_written_is_read_back_bit_for_bit(recorded):
    again = DegradationPath.from_pretrained(recorded.folder)
    assert repr(again) == f"DegradationPath({str(recorded.folder)!r}, nodes 0 to 2, complete)"
    assert len(again) == 3
    assert again.complete
    for i, state in enumerate(states(3)):
        assert difference(again[i], state) == [], i
    assert difference(again[-1], again[2]) == []
    with pytest.raises(IndexError, match="nodes 0 to 2"):
        again[3]


def test_tied_weights_are_stored_once_and_read_as_one_value(recorded):
    stored = {name.partition("|")[0] for name in load_file(recorded.folder / "node-001.safetensors")}
    assert "left.weight" in stored
    assert "right.weight" not in stored
    other = Score()
    ScoreNetwork(other).load_state_dict(recorded[1])
    assert other.right.weight is other.left.weight


def test_tensors_that_are_views_of_one_storage_survive(tmp_path):
    storage = torch.arange(6.0)
    state = {"whole": storage, "part": storage[2:4], "empty": torch.zeros(0), "scalar": torch.tensor(3)}
    path = DegradationPath.create(tmp_path / "p", state, RECORDING)
    assert difference(path[0], state) == []


def test_the_norms_of_the_steps_are_recorded(recorded):
    a, b = recorded[0], recorded[1]
    once = [k for k in a if a[k].is_floating_point() and k != "right.weight"]  # tied to left.weight
    squares = sum((a[k].double() - b[k].double()).square().sum() for k in once)
    assert recorded.nodes[0].delta_norm == pytest.approx(squares.item() ** 0.5)


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_in_the_folder_depends_on_when_or_where(tmp_path, codec):
    contents = []
    for place in ("a", "b"):
        teacher, node, _ = states(3)
        path = DegradationPath.create(tmp_path / place, teacher, Recording(10, 10, codec))
        path.append(node, iteration=10)
        path.finish()
        contents.append({file.name: file.read_bytes() for file in path.folder.iterdir()})
    assert contents[0] == contents[1]


def test_a_path_is_a_hub_object(recorded, tmp_path):
    recorded.save_pretrained(tmp_path / "copy")
    copy = DegradationPath.from_pretrained(tmp_path / "copy")
    copy.verify()
    assert copy.manifest == recorded.manifest
    assert "| 2 | 20 |" in (tmp_path / "copy" / "README.md").read_text()


def test_a_path_is_uploaded_whole_with_its_card(recorded, monkeypatch):
    from huggingface_hub import hub_mixin

    uploaded = {}

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            copy = DegradationPath(folder_path)
            copy.verify()
            uploaded[repo_id] = (copy.manifest, (copy.folder / "README.md").read_text())

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    recorded.push_to_hub("somebody/a-path")
    manifest, card = uploaded["somebody/a-path"]
    assert manifest == recorded.manifest
    for said in (recorded.manifest.teacher.fingerprint, "codec `exact`", "format 2", "library_name: disback"):
        assert said in card
    for node in recorded.nodes:
        assert f"| {node.index} | {node.iteration} | exact | {node.bytes:,} |" in card


def test_saving_into_a_folder_that_holds_something_is_refused(recorded, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "node-009.safetensors").write_bytes(b"older")
    with pytest.raises(OptionError, match="holds something"):
        recorded.save_pretrained(tmp_path / "copy")
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["node-009.safetensors"]


def test_saving_onto_itself_is_refused_and_a_broken_path_is_not_saved(recorded, tmp_path):
    with pytest.raises(OptionError, match="holds something"):
        recorded.save_pretrained(recorded.folder)
    flip(recorded.folder / "node-002.safetensors", -3)
    before = sorted(file.name for file in recorded.folder.iterdir())
    for target in (recorded.folder, tmp_path / "copy"):
        with pytest.raises(PathError):
            recorded.save_pretrained(target)
    assert sorted(file.name for file in recorded.folder.iterdir()) == before
    assert not (tmp_path / "copy").exists()


def test_only_safetensors_and_text_are_on_disk(recorded):
    assert sorted(file.name for file in recorded.folder.iterdir()) == [
        "README.md", "config.json", "node-001.safetensors", "node-002.safetensors", "teacher.safetensors",
    ]  # fmt: skip


def test_whoever_may_read_the_folder_may_read_the_nodes(recorded):
    modes = {file.name: file.stat().st_mode & 0o777 for file in recorded.folder.iterdir()}
    assert set(modes.values()) == {modes["config.json"]}, modes


def test_a_folder_that_holds_something_else_is_refused_and_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PathError, match=r"notes\.txt.*nothing there was touched"):
        DegradationPath.create(tmp_path, states(1)[0], RECORDING)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(PathError):
        DegradationPath.create(tmp_path / "notes.txt", states(1)[0], RECORDING)


def test_a_second_path_in_one_folder_is_refused(recorded):
    with pytest.raises(PathError, match="empty or missing"):
        DegradationPath.create(recorded.folder, states(1)[0], RECORDING)


def test_a_missing_path_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(PathError, match="pass the folder of a recorded path"):
        DegradationPath(tmp_path / "none")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PathError, match="neither a folder nor a reachable hub repository"):
        DegradationPath.from_pretrained("no/such-path", local_files_only=True)


@pytest.mark.parametrize(
    ("value", "message"), [(0.0, "did not move"), (math.nan, "not finite"), (math.inf, "not finite")]
)
def test_a_node_that_did_not_move_or_is_not_finite_is_not_recorded(tmp_path, value, message):
    net = nn.Linear(1, 1)
    state = clone(ScoreNetwork(net).state_dict())
    path = DegradationPath.create(tmp_path / "p", state, RECORDING)
    with pytest.raises(TrainingError, match=message):
        path.append({"weight": state["weight"] + value, "bias": state["bias"]}, iteration=10)
    assert len(DegradationPath(path.folder)) == 1


def test_a_node_of_another_network_does_not_reach_the_teacher(recorded):
    net = nn.Linear(1, 1)
    before = clone(dict(net.state_dict()))
    with pytest.raises(MismatchError):
        ScoreNetwork(net, role="teacher").load_state_dict(recorded[1])
    assert difference(dict(net.state_dict()), before) == []


@pytest.mark.parametrize("fail_at", range(12))
def test_a_crash_at_any_write_leaves_a_path_that_opens_and_resumes(tmp_path, monkeypatch, fail_at):
    """Fail at each rename in turn; what is there afterwards must open, and end equal to an undisturbed recording."""
    from pathlib import Path

    from disback_plugin.plugins.manager import PluginManager
    from disback_plugin.progress import Progress
    from disback_plugin.recorder import Recorder, open_or_create

    teacher, *nodes = states(4)
    net = Score()
    ScoreNetwork(net).load_state_dict(teacher)
    plan = Recording(30, 10, "exact")

    def record():
        student = Score()
        path = open_or_create(tmp_path / "path", ScoreNetwork(net), plan)
        recorder = Recorder(path, ScoreNetwork(student), Progress(), plugins=PluginManager())
        recorder.start()
        while not recorder.done:
            ScoreNetwork(student).load_state_dict(nodes[recorder.progress.recorded // 10])
            recorder.update()
        return recorder.path

    calls, rename = [], Path.replace

    def crash(self, target):
        calls.append(self)
        if len(calls) == fail_at + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        try:
            record()
        except KeyboardInterrupt:
            if DegradationPath.exists(tmp_path / "path"):
                DegradationPath(tmp_path / "path")
    path = record()
    path.verify()
    assert [difference(path[i + 1], node) for i, node in enumerate(nodes)] == [[], [], []]
    assert not [file.name for file in path.folder.iterdir() if file.name.endswith(".tmp")]

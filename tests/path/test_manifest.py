"""The manifest: what identifies a recording, and formats of earlier and later versions."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from path_edits import config, edit
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.errors import OptionError, PathError
from disback_plugin.path import manifest as module
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import FORMAT, Manifest, Node, Recording
from disback_plugin.weights.network import ScoreNetwork

# Paths that version 0.1.0 recorded, and what it said of them.
FORMAT_1 = Path(__file__).parent / "format_1"
IDENTITY = "fe6962fffb3166f6078e315057dd9fba09ea127c7df7a9a8a92476af374ede76"
NODES = "4cf02d4761adf545461d3292185f3f5fb1b42d4cd70096a25f80145d5c6cce02"
CHECKSUMS = [
    "8455edcd8c289f15f13d83cfb2ddaaa7",
    "cc209748fadeec8b35996c6f275c0974",
    "63fd7732f46024976ad872e252fce062",
]


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(FORMAT_1 / "int8", tmp_path / "int8")


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_int8_path_of_format_1_opens_and_decodes_as_version_0_1_0_decoded_it(old):
    before = files_of(old)
    path = DegradationPath.from_pretrained(old)
    path.verify()
    assert path.manifest.format == 1
    assert (path.identity, path.nodes_digest(), path.complete) == (IDENTITY, NODES, True)
    assert [ScoreNetwork(Net(path[i])).checksum() for i in range(3)] == CHECKSUMS
    assert files_of(old) == before


class Net(nn.Module):
    """A network with the weights of a state."""

    def __init__(self, state):
        super().__init__()
        own = {name: nn.Parameter(tensor) for name, tensor in state.items() if name != "tied"}
        for name, tensor in own.items():
            setattr(self, name, tensor)
        if "tied" in state:
            self.tied = self.w


def test_a_run_goes_along_a_path_of_format_1(old):
    path = DegradationPath(old)
    teacher = Net(path[0])
    scheduler = disback.TrajectoryScheduler(path, teacher, schedule="fixed:1")
    scheduler.start()
    assert ScoreNetwork(teacher).checksum() == path.nodes[0].checksum
    scheduler.restore_teacher()
    assert ScoreNetwork(teacher).checksum() == path.manifest.teacher.checksum


def test_an_unfinished_path_of_format_1_is_resumed_and_becomes_format_2(old):
    edit(old, lambda c: c.update(complete=False, nodes=c["nodes"][:1]))
    (old / "node-002.safetensors").unlink()
    path = DegradationPath(old)
    state = {name: tensor + 1 for name, tensor in path[1].items()}
    state = {name: tensor if name == "short" else nn.Parameter(tensor) for name, tensor in state.items()}
    path.append(state | {"tied": state["w"]}, iteration=4)
    path.finish()
    assert config(old)["format"] == FORMAT
    assert config(old)["nodes"][0]["codec_error"] is None, "a key that only the earlier version knew"
    path = DegradationPath(old)
    path.verify()
    assert path.identity == IDENTITY


GONE = {
    "int4": lambda c: c["recording"].update(codec="int4"),
    "auto": lambda c: c["recording"].update(codec="auto"),
    "auto with a bound": lambda c: c["recording"].update(codec="auto:0.005"),
    "a node in bf16": lambda c: c["nodes"][1].update(codec="bf16"),
    "compressed nodes of exact": lambda c: (
        c["recording"].update(codec="exact"),
        [node.update(codec="exact") for node in c["nodes"]],
    ),
}


@pytest.mark.parametrize("change", [*GONE.values(), None], ids=[*GONE, "compressed parts of int8"])
def test_a_path_in_a_codec_that_is_gone_names_the_version_that_reads_it_and_is_not_touched(tmp_path, change):
    folder = shutil.copytree(FORMAT_1 / ("packed" if change is None else "int8"), tmp_path / "path")
    if change is not None:
        edit(folder, change)
    (folder / ".config.json.tmp").touch()
    before, run = files_of(folder), Run()
    weights = clone([dict(net.state_dict()) for net in (run.teacher, run.fake_score)])
    for open_path in (
        lambda: DegradationPath(folder),
        lambda: DegradationPath.from_pretrained(folder),
        lambda: disback.attach(**run.roles(), path=folder),
        lambda: disback.TrajectoryScheduler(folder, run.teacher),
    ):
        with pytest.raises(PathError, match=r"^found .*; to mend it, read the path with disback-plugin 0\.1\.0"):
            open_path()
    assert files_of(folder) == before
    assert difference([dict(net.state_dict()) for net in (run.teacher, run.fake_score)], weights) == []


def test_the_identity_does_not_depend_on_how_far_the_recording_got():
    start = Manifest(module.Teacher("t", "c"), Recording(20, 10), "g")
    later = replace(
        start, complete=True, fitted=7, ended=10, learning_rate_factor=2, learning_rate=0.1, extra={"key": 1}
    )
    assert later.identity == start.identity
    for other in (
        replace(start, teacher=module.Teacher("u", "c")),
        replace(start, generator=None),
        *(replace(start, recording=plan) for plan in (
            Recording(21, 10), Recording(20, 5), Recording(20, 10, "exact"), Recording(20, 10, keep_teacher=False)
        )),
    ):  # fmt: skip
        assert other.identity != start.identity


def test_one_more_optional_field_reads_every_earlier_file_and_leaves_identities_as_they_are(old, monkeypatch):
    @dataclass(frozen=True)
    class NextNode(Node):
        note: str | None = None

    @dataclass(frozen=True)
    class NextManifest(Manifest):
        note: str | None = None

    monkeypatch.setattr(module, "Node", NextNode)
    found = NextManifest.read(old)
    assert (found.note, [node.note for node in found.nodes]) == (None, [None, None])
    assert found.identity == IDENTITY
    noted = replace(found, note="new", nodes=tuple(replace(node, note="each") for node in found.nodes))
    assert noted.identity == IDENTITY
    noted.write(old)
    assert NextManifest.read(old).nodes == noted.nodes
    monkeypatch.undo()
    # This version does not know the field, and keeps it.
    path = DegradationPath(old)
    assert path.manifest.extra == {"note": "new"}
    assert path.identity == IDENTITY


def test_the_learning_rate_factor_has_another_key_in_format_1(old):
    edit(old, lambda content: content.update(haste=2))
    path = DegradationPath(old)
    assert path.manifest.learning_rate_factor == 2
    path.update_manifest(fitted=1)
    assert DegradationPath(old).manifest.updates_to_fit == 2
    assert path.identity == IDENTITY


def test_unknown_keys_are_kept_when_the_manifest_is_written_again(old):
    news = {"colour": {"deep": [1, None]}, "extra": "its own name"}

    def change(content):
        content.update(news)
        content["nodes"][1].update(news)
        content["teacher"].update(news)

    edit(old, change)
    path = DegradationPath(old)
    path.verify()
    path.update_manifest(fitted=3)
    written = config(old)
    for place in (written, written["nodes"][1], written["teacher"]):
        assert {key: place[key] for key in news} == news
    assert written["fitted"] == 3
    assert path.identity == IDENTITY
    assert DegradationPath(old).manifest == path.manifest


@pytest.mark.parametrize("codec", ["int4", "int7", "auto", "auto:0.5", "same", "plain", "", "INT8", None])
def test_a_recording_in_another_codec_is_refused(codec):
    with pytest.raises(OptionError, match=r"found codec=.*expected 'int8' or 'exact'.*to mend it"):
        Recording(codec=codec)


def test_a_number_that_json_cannot_hold_is_refused(old):
    text = (old / "config.json").read_text()
    for number in ("NaN", "Infinity", "1e999"):
        (old / "config.json").write_text(text.replace('"format"', f'"later": {number}, "format"'))
        with pytest.raises(PathError, match="no readable"):
            DegradationPath(old)


def test_a_manifest_of_format_2_has_every_key_that_it_was_written_with(old):
    DegradationPath(old).update_manifest()
    edit(old, lambda content: content.pop("learning_rate"))
    with pytest.raises(PathError, match=r"without .*learning_rate"):
        DegradationPath(old)


def test_a_node_of_exact_is_a_state_dict_that_safetensors_alone_reads(tmp_path):
    from safetensors.torch import load_file

    run = Run()
    path = disback.record(
        run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=2, every=1, codec="exact"
    )
    own = {name: tensor for name, tensor in path[2].items() if name != "right.weight"}  # tied to left.weight
    assert difference(load_file(tmp_path / "node-002.safetensors"), own) == []
    assert torch.equal(path[2]["right.weight"], own["left.weight"])

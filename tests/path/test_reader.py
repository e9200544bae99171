"""Damaged and hostile folders: each is one named error, before anything is written into the teacher."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from worlds import Run, Score, clone, difference

import disback_plugin as disback
from disback_plugin.errors import PathError, StateError
from disback_plugin.path import files
from disback_plugin.path.codecs import Delta, Entry
from disback_plugin.path.delta import NodeSource
from disback_plugin.schedules import Fixed, Ramp
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.tensors import TensorMeta, checksum, fingerprint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    run = Run()
    disback.record(run.teacher, run.fake_score, run.fake_step, path=folder, iterations=6, every=2)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "path")


def config(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, change):
    content = config(folder)
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def flip(file, where, bit=0):
    content = bytearray(file.read_bytes())
    content[where] ^= 1 << bit
    file.write_bytes(content)


def admit(folder, index):
    """List a changed file in the manifest as if it had been recorded: what somebody with intent would do."""
    name = "teacher.safetensors" if index == 0 else f"node-{index:03d}.safetensors"
    content = (folder / name).read_bytes()

    def change(manifest):
        entry = manifest["teacher"] if index == 0 else manifest["nodes"][index - 1]
        entry |= {"sha256": sha256(content).hexdigest(), "bytes": len(content)}

    edit(folder, change)


def rewrite(folder, index, change, about=None):
    """Write a node's file with other parts, and admit it."""
    file = folder / ("teacher.safetensors" if index == 0 else f"node-{index:03d}.safetensors")
    parts = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, "pt") as handle:
        text = handle.metadata()["disback"]
    change(parts)
    save_file(parts, file, metadata={"disback": text if about is None else about(text)})
    admit(folder, index)


def header(folder, name, text):
    """Write a safetensors file with this header and nothing behind it, and admit it."""
    raw = text.encode()
    (folder / name).write_bytes(len(raw).to_bytes(8, "little") + raw)
    admit(folder, 0 if name.startswith("teacher") else int(name[5:8]))


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def foreign(folder, index):
    """Put in another recording's node, with that recording's entry in the manifest."""
    other = folder.parent / "other"
    run = Run(seed=7)
    disback.record(run.teacher, run.fake_score, run.fake_step, path=other, iterations=6, every=2)
    shutil.copy(other / f"node-{index:03d}.safetensors", folder)
    edit(folder, lambda c: c["nodes"].__setitem__(index - 1, config(other)["nodes"][index - 1]))


def link(folder, name, target):
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def nan_scale(parts):
    parts["inner.0.weight|scale"][0] = torch.nan


def huge(parts):
    parts["inner.0.weight|scale"].fill_(3e38)


def nan_in_the_middle(folder):
    """Record NaN in node 1 alone, with all checksums right: what somebody with intent would do."""
    path = disback.DegradationPath(folder)
    states, manifest = [path[i] for i in range(4)], config(folder)
    states[1]["inner.0.weight"] = torch.full_like(states[1]["inner.0.weight"], torch.nan)
    for i in (1, 2, 3):
        own = {name: tensor for name, tensor in states[i].items() if name != "right.weight"}
        entries = {name: Entry("plain", TensorMeta(tensor.dtype, tensor.shape)) for name, tensor in own.items()}
        delta = Delta(entries, {"right.weight": "left.weight"}, own)
        listed = files.write_tensors(folder / f"node-{i:03d}.safetensors", own, metadata=delta.metadata())
        manifest["nodes"][i - 1] |= listed | {"checksum": checksum(states[i])}
    (folder / "config.json").write_text(json.dumps(manifest))


def nan_teacher(parts):
    parts["inner.0.weight"][0] = torch.nan


NODE_1, NODE_2 = "node-001.safetensors", "node-002.safetensors"


def keep(parts):
    """Leave a node's parts as they are."""


def tensor_of(shape, end):
    return f'{{"w":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,{end}]}}}}'


DAMAGE = {
    "no manifest": lambda f: (f / "config.json").unlink(),
    "empty manifest": lambda f: (f / "config.json").write_text(""),
    "manifest cut in half": lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:200]),
    "manifest in another encoding": lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"),
    "manifest nested without end": lambda f: (f / "config.json").write_text("[" * 100_000),
    "manifest that is a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "older than the first format": lambda f: edit(f, lambda c: c.update(format=0)),
    "newer format": lambda f: edit(f, lambda c: c.update(format=3)),
    "format as a text": lambda f: edit(f, lambda c: c.update(format="1")),
    "absolute file name": lambda f: edit(f, lambda c: c["nodes"][0].update(file="/etc/passwd")),
    "file name that leaves the folder": lambda f: edit(f, lambda c: c["nodes"][0].update(file=f"../{NODE_1}")),
    "teacher that leaves the folder": lambda f: edit(f, lambda c: c["teacher"].update(file="../teacher.safetensors")),
    "the same file twice": lambda f: edit(f, lambda c: c["nodes"][1].update(file="node-001.safetensors")),
    "negative size": lambda f: edit(f, lambda c: c["nodes"][0].update(bytes=-1)),
    "another size": lambda f: edit(f, lambda c: c["nodes"][0].update(bytes=c["nodes"][0]["bytes"] + 1)),
    "NaN as a norm": lambda f: edit(f, lambda c: c["nodes"][0].update(delta_norm=float("nan"))),
    "infinite error": lambda f: edit(f, lambda c: c["nodes"][0].update(weight_error=float("inf"))),
    "a huge plan": lambda f: edit(f, lambda c: c["recording"].update(iterations=10**30)),
    "unknown codec of a node": lambda f: edit(f, lambda c: c["nodes"][0].update(codec="pickle")),
    "missing field": lambda f: edit(f, lambda c: c["nodes"][0].pop("checksum")),
    "another checksum": lambda f: edit(f, lambda c: c["nodes"][1].update(checksum="0" * 32)),
    "another checksum of the teacher": lambda f: edit(f, lambda c: c["teacher"].update(checksum="0" * 32)),
    "another fingerprint": lambda f: edit(f, lambda c: c["teacher"].update(fingerprint="0" * 64)),
    "a teacher that is not kept": lambda f: edit(f, lambda c: c["recording"].update(keep_teacher=False)),
    "missing teacher": lambda f: (f / "teacher.safetensors").unlink(),
    "missing node": lambda f: (f / NODE_2).unlink(),
    "empty node": lambda f: (f / NODE_2).write_bytes(b""),
    "truncated node": lambda f: os.truncate(f / NODE_2, 500),
    "truncated node, admitted": lambda f: (os.truncate(f / NODE_2, 500), admit(f, 2)),
    "node of zeros, admitted": lambda f: ((f / NODE_2).write_bytes(bytes(500)), admit(f, 2)),
    "swapped nodes": lambda f: swap(f / NODE_1, f / NODE_2),
    "swapped nodes, admitted": lambda f: (swap(f / NODE_1, f / NODE_2), admit(f, 1), admit(f, 2)),
    "teacher in a node's place, admitted": lambda f: (shutil.copy(f / "teacher.safetensors", f / NODE_1), admit(f, 1)),
    "a node of another recording": lambda f: foreign(f, 2),
    "link to nowhere": lambda f: link(f, "node-001.safetensors", "nowhere"),
    "link to itself": lambda f: link(f, "node-001.safetensors", "node-001.safetensors"),
    "link to another file": lambda f: link(f, "node-001.safetensors", "/etc/hostname"),
    "link to a device": lambda f: link(f, "node-001.safetensors", "/dev/zero"),
    "link to a folder": lambda f: link(f, "node-001.safetensors", "/tmp"),
    "pipe": lambda f: ((f / NODE_1).unlink(), os.mkfifo(f / NODE_1)),
    "header of a terabyte": lambda f: ((f / NODE_1).write_bytes((1 << 40).to_bytes(8, "little") + b"{}"), admit(f, 1)),
    "header that is no JSON": lambda f: header(f, NODE_1, "{"),
    "huge declared shape": lambda f: header(f, NODE_1, tensor_of("1099511627776", 4398046511104)),
    "shape that overflows": lambda f: header(f, NODE_1, tensor_of("9223372036854775807,4", 0)),
    "no metadata": lambda f: (save_file(load_file(f / NODE_1), f / NODE_1), admit(f, 1)),
    "metadata that is no JSON": lambda f: rewrite(f, 1, keep, lambda text: "{"),
    "pickle as metadata": lambda f: rewrite(f, 1, keep, lambda text: "cos\nsystem\n(S'true'\ntR."),
    "another shape in the layout": lambda f: rewrite(f, 1, keep, lambda text: text.replace("[8, 3]", "[3, 8]")),
    "NaN scale": lambda f: rewrite(f, 2, nan_scale),
    "scale that overflows": lambda f: rewrite(f, 2, huge),
    "NaN teacher": lambda f: rewrite(f, 0, nan_teacher),
    "aliases that are no mapping": lambda f: rewrite(f, 0, keep, lambda text: "[1]"),
    "aliases of lists": lambda f: rewrite(f, 0, keep, lambda text: '{"right.weight": ["left.weight"]}'),
    "a plan beyond floats": lambda f: edit(f, lambda c: c["recording"].update(iterations=10**400)),
    "a norm beyond floats": lambda f: edit(f, lambda c: c["nodes"][2].update(delta_norm=10**400)),
    "a node that did not move": lambda f: edit(f, lambda c: c["nodes"][2].update(delta_norm=0)),
    "format as truth": lambda f: edit(f, lambda c: c.update(format=True)),
    "manifest of eight gigabytes": lambda f: os.truncate(f / "config.json", 1 << 33),
    "NaN in a middle node, stored exactly": nan_in_the_middle,
    "a part missing": lambda f: rewrite(f, 1, lambda parts: parts.pop("inner.0.weight|q")),
    "a part of another dtype": lambda f: rewrite(f, 1, lambda p: p.update({"inner.0.weight|q": torch.zeros(24)})),
    "steps changed, admitted": lambda f: rewrite(f, 1, lambda parts: parts["inner.0.weight|q"].fill_(1)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_or_hostile_path_is_one_named_error_and_reaches_no_weight(folder, damage):
    damage(folder)
    run = Run()
    before = clone([dict(net.state_dict()) for net in (run.teacher, run.fake_score, run.generator)])
    readable = r"^found .*; expected .*; to mend it, .*\.$"

    def start():
        disback.DegradationPath(folder).verify()
        disback.TrajectoryScheduler(folder, run.teacher, run.fake_score, schedule=Fixed(1)).start()

    with pytest.raises(PathError, match=readable) as caught:
        start()
    assert "\n" not in str(caught.value)
    with pytest.raises(PathError, match=readable):
        disback.attach(**run.roles(), path=folder, record=6, every=2, schedule=Fixed(1))
    after = [dict(net.state_dict()) for net in (run.teacher, run.fake_score, run.generator)]
    assert difference(after, before) == []
    assert not run.optimizer_g._optimizer_step_post_hooks


def test_the_undamaged_path_is_fine(folder):
    disback.DegradationPath(folder).verify()
    with disback.attach(**Run().roles(), path=folder, record=6, every=2, schedule="warm") as handle:
        assert handle.phase == "done"


@pytest.mark.parametrize("name", ["config.json", "teacher.safetensors", "node-001.safetensors", "node-003.safetensors"])
def test_any_flipped_bit_is_noticed_or_means_nothing(folder, name):
    """Of the manifest every field is checked but those that only people read."""
    whole = (folder / name).read_bytes()
    free = [b"codec_error", b"weight_error", b"delta_norm", b'"id"', b"recorded", b'"fingerprint": null']
    stream = torch.Generator().manual_seed(0)
    for where in torch.randint(len(whole), (40,), generator=stream).tolist():
        flip(folder / name, where, bit=where % 7)
        try:
            disback.DegradationPath(folder).verify()
            line = whole[whole.rfind(b"\n", 0, where) + 1 : whole.find(b"\n", where)]
            blank = whole[where : where + 1] in b" \n" and name == "config.json"
            assert name == "config.json"
            assert blank or any(word in line for word in free), f"{name} at {where}: {line!r}"
        except PathError:
            pass
        (folder / name).write_bytes(whole)


def test_another_teacher_is_refused(folder):
    run = Run(seed=3)
    before = clone(dict(run.teacher.state_dict()))
    with pytest.raises(PathError, match="another teacher"):
        disback.TrajectoryScheduler(folder, run.teacher)
    assert difference(dict(run.teacher.state_dict()), before) == []


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
    flip(folder / NODE_1, -3)
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

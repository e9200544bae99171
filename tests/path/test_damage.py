"""Damaged and hostile folders: each is one named error, before anything is written into the teacher."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
from path_edits import admit, config, edit, flip, rewrite
from safetensors.torch import load_file, save_file
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.errors import PathError
from disback_plugin.path import files
from disback_plugin.path.codecs import Delta, Entry
from disback_plugin.schedules import Fixed
from disback_plugin.weights.tensors import TensorMeta, checksum


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
    "manifest that is a list": lambda f: (f / "config.json").write_text("[]"),
    "somebody else's config": lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
    "manifest that is a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "older than the first format": lambda f: edit(f, lambda c: c.update(format=0)),
    "newer format": lambda f: edit(f, lambda c: c.update(format=3)),
    "format as a text": lambda f: edit(f, lambda c: c.update(format="1")),
    "absolute file name": lambda f: edit(f, lambda c: c["nodes"][0].update(file="/etc/passwd")),
    "file name that leaves the folder": lambda f: edit(f, lambda c: c["nodes"][0].update(file=f"../{NODE_1}")),
    "teacher that leaves the folder": lambda f: edit(f, lambda c: c["teacher"].update(file="../teacher.safetensors")),
    "the same file twice": lambda f: edit(f, lambda c: c["nodes"][1].update(file="node-001.safetensors")),
    "unknown field": lambda f: edit(f, lambda c: c["recording"].update(colour=3)),
    "impossible plan": lambda f: edit(f, lambda c: c["recording"].update(iterations=0)),
    "half an iteration": lambda f: edit(f, lambda c: c["recording"].update(iterations=6.5)),
    "infinite iterations": lambda f: edit(f, lambda c: c["recording"].update(iterations=math.inf)),
    "marked complete too early": lambda f: edit(f, lambda c: c.update(nodes=c["nodes"][:1])),
    "complete as a text": lambda f: edit(f, lambda c: c.update(complete="yes")),
    "nodes as a mapping": lambda f: edit(f, lambda c: c.update(nodes={})),
    "a teacher without a digest": lambda f: edit(f, lambda c: c["teacher"].update(sha256="")),
    "a fingerprint that is a number": lambda f: edit(f, lambda c: c["teacher"].update(fingerprint=7)),
    "an iteration as a text": lambda f: edit(f, lambda c: c["nodes"][0].update(iteration="2")),
    "an iteration out of turn": lambda f: edit(f, lambda c: c["nodes"][0].update(iteration=3)),
    "an index out of turn": lambda f: edit(f, lambda c: c["nodes"][0].update(index=3)),
    "a norm that is none": lambda f: edit(f, lambda c: c["nodes"][0].update(delta_norm="x")),
    "negative size": lambda f: edit(f, lambda c: c["nodes"][0].update(bytes=-1)),
    "another size": lambda f: edit(f, lambda c: c["nodes"][0].update(bytes=c["nodes"][0]["bytes"] + 1)),
    "NaN as a norm": lambda f: edit(f, lambda c: c["nodes"][0].update(delta_norm=float("nan"))),
    "infinite error": lambda f: edit(f, lambda c: c["nodes"][0].update(weight_error=float("inf"))),
    "a huge plan": lambda f: edit(f, lambda c: c["recording"].update(iterations=10**30)),
    "another codec": lambda f: edit(f, lambda c: c["recording"].update(codec="int3")),
    "unknown codec of a node": lambda f: edit(f, lambda c: c["nodes"][0].update(codec="pickle")),
    "missing field": lambda f: edit(f, lambda c: c["nodes"][0].pop("checksum")),
    "another checksum": lambda f: edit(f, lambda c: c["nodes"][1].update(checksum="0" * 32)),
    "another checksum of the teacher": lambda f: edit(f, lambda c: c["teacher"].update(checksum="0" * 32)),
    "another fingerprint": lambda f: edit(f, lambda c: c["teacher"].update(fingerprint="0" * 64)),
    "a teacher that is not kept": lambda f: edit(f, lambda c: c["recording"].update(keep_teacher=False)),
    "missing teacher": lambda f: (f / "teacher.safetensors").unlink(),
    "another teacher": lambda f: save_file({"w": torch.zeros(1)}, f / "teacher.safetensors"),
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

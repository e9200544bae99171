"""Edits of a path on disk, as a fault of a disk or somebody with intent makes them."""

from __future__ import annotations

import json
from hashlib import sha256

from safetensors import safe_open
from safetensors.torch import load_file, save_file


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

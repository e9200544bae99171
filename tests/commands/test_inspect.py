from __future__ import annotations

import json

import pytest
import torch
from worlds import Run

import disback_plugin as disback
from disback_plugin import cli
from disback_plugin.commands.inspect import node_rows


@pytest.fixture
def folder(tmp_path):
    run = Run()
    disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path / "p", iterations=6, every=2)
    return tmp_path / "p"


def test_the_table_says_what_is_on_disk(folder, capsys):
    assert cli.main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "complete, codec int8" in lines[0]
    assert lines[-5].split() == [
        *("node", "iteration", "bytes", "codec", "error", "in", "weights"),
        *("|theta_i", "-", "theta_i-1|", "sha256"),
    ]
    assert [line.split()[:2] for line in lines[-4:]] == [["0", "0"], ["1", "2"], ["2", "4"], ["3", "6"]]
    for node, line in zip(disback.DegradationPath(folder).nodes, lines[-3:], strict=True):
        assert line.endswith(node.sha256[:12])
        assert f"{node.bytes:,}" in line


def test_the_json_has_the_steps_of_the_path_in_weight_space(folder, capsys):
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    path = disback.DegradationPath(folder)
    names = [name for name, tensor in path[0].items() if tensor.is_floating_point() and name != "right.weight"]
    thetas = [torch.cat([path[i][name].double().reshape(-1) for name in names]) for i in range(4)]
    assert found["nodes"][0]["delta_norm"] == 0
    for i, row in enumerate(found["nodes"][1:], 1):
        assert row["delta_norm"] == pytest.approx((thetas[i] - thetas[i - 1]).norm().item(), rel=1e-2)
        assert row["codec"] == "int8"
    assert found["complete"] is True
    assert found["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_a_path_without_its_teacher_shows_what_is_known(tmp_path, capsys):
    run = Run()
    disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=2, every=1, keep_teacher=False)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "teacher " in capsys.readouterr().out
    path = disback.DegradationPath(tmp_path)
    assert [row["bytes"] for row in node_rows(path)] == [0, *(node.bytes for node in path.nodes)]


def test_an_unfinished_path_can_be_looked_at(tmp_path, capsys):
    run, calls = Run(), []

    def fake_step():
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(None)
        run.fake_step()

    with pytest.raises(KeyboardInterrupt):
        disback.record(run.teacher, run.fake_score, fake_step, path=tmp_path, iterations=6, every=2)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "unfinished" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "missing", "none"])
def test_a_broken_path_is_one_line_and_exit_code_1(folder, capsys, damage):
    file = folder / "node-002.safetensors"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-9] ^= 8
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    where = folder if damage != "none" else folder.parent / "nothing here"
    assert cli.main(["inspect", str(where)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("disback: found ")
    assert err.count("\n") == 1


def test_the_last_column_is_aligned(folder, capsys):
    assert cli.main(["inspect", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert len({line.find("  ", 1) > 0 for line in lines}) == 1
    ends = [len(line) - len(line.split("  ")[-1]) for line in lines[1:]]
    assert len(set(ends)) == 1, "the last column starts at one place"

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from worlds import Run, Score, difference

import disback_plugin as disback
from disback_plugin.errors import MismatchError, PathError
from disback_plugin.path import codecs
from disback_plugin.path.codecs import CODECS, Delta
from disback_plugin.path.delta import InterpolatedSource, NodeSource, encode
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.tensors import PIECE, checksum, pieces


def moved(state, seed, size=1e-2):
    """A state that training could have made of another: floats moved, integers counted up, ties kept."""
    stream = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            step = size * torch.randn(tensor.shape, generator=stream).to(tensor.dtype)
            made[name] = tensor + step
        else:
            made[name] = tensor + 1
    made["right.weight"] = made["left.weight"]
    return made


def chain(codec, count, dtype=torch.float32, size=1e-2):
    """A path of `count` nodes in memory, and the states it was made of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Score().to(dtype)
    states = [ScoreNetwork(net).state_dict()]
    deltas = []
    for seed in range(count):
        states.append(moved(states[-1], seed, size))
        deltas.append(encode(codec, states[-1], NodeSource(states[0], deltas))[0])
    return NodeSource(states[0], deltas), states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_errors_do_not_add_up_along_the_path(codec, dtype):
    node, states = chain(codec, 6, dtype)
    bound = {"int8": 0.02, "exact": 0.0}[codec]
    for i in (1, 6):
        found = NodeSource(node.teacher, node.deltas[:i]).state_dict()
        for name, tensor in states[i].items():
            if not tensor.is_floating_point():
                assert torch.equal(found[name], tensor)
                continue
            step = (tensor.double() - states[i - 1][name].double()).norm()
            rounding = tensor.double().norm() * torch.finfo(dtype).eps if codec != "exact" else 0.0
            assert (found[name].double() - tensor.double()).norm() <= bound * step + rounding, f"{name} of node {i}"


def test_a_half_precision_teacher_and_nodes_in_float32():
    teacher = {name: t.bfloat16() if t.is_floating_point() else t for name, t in chain("exact", 0)[1][0].items()}
    state = moved({n: t.float() if t.is_floating_point() else t for n, t in teacher.items()}, 0)
    node = NodeSource(teacher, [encode("exact", state, NodeSource(teacher))[0]])
    assert difference(node.state_dict(), state) == []


@pytest.mark.parametrize("codec", CODECS)
@given(fraction=st.floats(0.01, 0.99))
def test_between_two_nodes_weights_are_interpolated(codec, fraction):
    node, _ = chain(codec, 3)
    low, high = NodeSource(node.teacher, node.deltas[:2]).state_dict(), node.state_dict()
    net = Score()
    ScoreNetwork(net).write(InterpolatedSource(node, fraction))
    for name, tensor in ScoreNetwork(net).state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, torch.lerp(low[name], high[name], fraction)), name
        else:
            assert torch.equal(tensor, low[name] if fraction < 0.5 else high[name]), name


def test_interpolation_into_bf16_rounds_once():
    node, _ = chain("int8", 2)
    low, high = NodeSource(node.teacher, node.deltas[:1]).state_dict(), node.state_dict()
    net = Score().bfloat16()
    ScoreNetwork(net).write(InterpolatedSource(node, 0.3))
    exact = torch.lerp(low["left.weight"], high["left.weight"], 0.3)
    assert torch.equal(net.left.weight, exact.bfloat16())


def test_an_attention_masks_infinities_stay_between_nodes():
    teacher = {"mask": torch.tensor([0.0, -torch.inf]), "w": torch.zeros(2)}
    state = {"mask": torch.tensor([1.0, -torch.inf]), "w": torch.ones(2)}
    node = NodeSource(teacher, [encode("int8", state, NodeSource(teacher))[0]])
    assert node.deltas[0].entries["mask"].code == "plain"
    assert InterpolatedSource(node, 0.5).read("mask", 0, 2).tolist() == [0.5, -torch.inf]


def test_a_tensor_that_did_not_move_costs_nothing():
    teacher = {"w": torch.randn(1000), "filter": torch.randn(1000)}
    delta = encode("int8", teacher | {"w": teacher["w"] + 1}, NodeSource(teacher))[0]
    assert {name.partition("|")[0] for name in delta.parts} == {"w"}


def test_reading_never_writes_into_the_teacher():
    node, states = chain("int8", 3)
    before = checksum(states[0])
    for source in (node, InterpolatedSource(node, 0.5), NodeSource(node.teacher, ())):
        ScoreNetwork(Score()).write(source)
        for name, layout in source.layout().items():
            for start, stop in pieces(layout.shape.numel()):
                source.read(name, start, stop)
    assert checksum(states[0]) == before


def test_a_move_needs_a_few_pieces_of_memory_and_no_node():
    teacher = {"w": torch.randn(12 * PIECE)}
    deltas = [encode("int8", {"w": teacher["w"] + 1}, NodeSource(teacher))[0]]
    net = nn.Module()
    net.w = nn.Parameter(torch.empty(12 * PIECE))
    with torch.profiler.profile(profile_memory=True) as profile:
        ScoreNetwork(net).write(InterpolatedSource(NodeSource(teacher, deltas), 0.5))
    held, peak = 0, 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= 6 * 4 * PIECE


@pytest.mark.parametrize("surroundings", ["meta", "inference", "bfloat16"])
def test_the_callers_defaults_do_not_matter(surroundings):
    node, states = chain("int8", 2)
    expected = InterpolatedSource(node, 0.5).read("inner.0.weight", 0, 24).clone()
    known = node.state_dict()
    codecs._MEMORY.__dict__.clear()
    source = InterpolatedSource(node, 0.5)
    with SURROUNDINGS[surroundings]():
        again = encode("int8", states[2], NodeSource(node.teacher, node.deltas[:1]))[0]
        assert checksum(NodeSource(node.teacher, (node.deltas[0], again)).state_dict()) == checksum(known)
        source.read("inner.0.weight", 0, 24)
    assert torch.equal(source.read("inner.0.weight", 0, 24), expected)


@contextmanager
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "bfloat16": bfloat16_by_default,
}


def test_a_position_has_the_dtypes_of_its_node_though_a_tensor_did_not_move():
    teacher = {"w": torch.randn(4), "frozen": torch.ones(4)}
    state = {"w": teacher["w"].bfloat16() + 1, "frozen": torch.ones(4).bfloat16()}
    node = NodeSource(teacher, [encode("int8", state, NodeSource(teacher))[0]])
    assert InterpolatedSource(node, 0.5).read("frozen", 0, 4).dtype == torch.bfloat16


def test_tied_tensors_share_memory_at_every_node():
    node, _ = chain("int8", 1)
    for state in (node.state_dict(), NodeSource(node.teacher, ()).state_dict()):
        assert state["left.weight"].data_ptr() == state["right.weight"].data_ptr()


def test_a_tied_network_is_not_written_from_a_node_that_does_not_tie():
    net = Score()
    teacher = ScoreNetwork(net).state_dict()
    state = moved(teacher, 0) | {"right.weight": teacher["right.weight"] + 3}
    node = NodeSource(teacher, [encode("int8", state, NodeSource(teacher))[0]])
    before = checksum(teacher)
    for source in (node, InterpolatedSource(node, 0.5)):
        with pytest.raises(MismatchError, match="two values for the tied weights"):
            ScoreNetwork(net).write(source)
    assert ScoreNetwork(net).checksum() == before


# -- what is stored, and how ------------------------------------------------------------------------------------------


def test_exact_stores_the_whole_state_dict_and_nothing_else():
    teacher = {"w": torch.zeros(2, 2), "still": torch.ones(3)}
    state = teacher | {"w": torch.ones(2, 2)}
    delta = encode("exact", state, NodeSource(teacher))[0]
    assert difference(dict(delta.parts), state) == []


def test_int8_stores_whole_what_it_cannot_hold_and_what_it_is_told_to():
    teacher = {
        "w": torch.zeros(300), "buffer": torch.zeros(3), "count": torch.tensor(0), "wide": torch.zeros(2).double(),
        "mask": torch.tensor([0.0, -torch.inf]), "still": torch.ones(3), "bool": torch.tensor([False]),
        "far": torch.full((2,), -3e38),
    }  # fmt: skip
    state = {name: tensor + 1 for name, tensor in teacher.items()} | {"still": torch.ones(3)}
    state |= {"bool": torch.tensor([True]), "far": torch.full((2,), 3e38)}
    state |= {name: nn.Parameter(state[name]) for name in ("w", "wide", "mask", "far")}  # the others are buffers
    delta = encode("int8", state, NodeSource(teacher))[0]
    whole = {"buffer", "count", "wide", "mask", "bool", "far"}
    assert {name: entry.code for name, entry in delta.entries.items()} == {
        "w": "int8", "still": "same", **dict.fromkeys(whole, "plain"),
    }  # fmt: skip
    assert delta.parts.keys() == {"w|q", "w|scale", *whole}
    assert difference({name: delta.parts[name] for name in whole}, {name: state[name] for name in whole}) == []


def test_the_measured_norm_and_error_are_those_of_the_weights():
    node, states = chain("int8", 1)
    made = encode("int8", states[1], NodeSource(states[0]))
    once = [k for k, t in states[0].items() if t.is_floating_point() and k != "right.weight"]  # tied to left.weight
    squares = sum((states[1][k].double() - states[0][k].double()).square().sum() for k in once)
    lost = sum((states[1][k].double() - node.state_dict()[k].double()).square().sum() for k in once)
    assert made[1]["delta_norm"] == pytest.approx(squares.item() ** 0.5)
    assert made[1]["weight_error"] == pytest.approx((lost / squares).item() ** 0.5)
    assert made[1]["checksum"] == checksum(node.state_dict())
    assert made[1]["recorded"] == checksum(states[1])


def test_running_statistics_are_stored_whole_and_stay_positive(tmp_path):
    run = Run()
    with torch.no_grad():
        for _ in range(30):
            run.fake_score(100 * torch.randn(64, 2), torch.ones(64, 1))
    run.teacher.load_state_dict(run.fake_score.state_dict())

    def fake_step():
        run.optimizer_f.zero_grad()
        run.fake_score(1e-3 * run.randn(64, 2), torch.ones(64, 1)).square().sum().backward()
        run.optimizer_f.step()

    path = disback.record(run.teacher, run.fake_score, fake_step, path=tmp_path, iterations=60, every=20)
    path.verify()
    live = dict(run.fake_score.named_buffers())
    for name in ("inner.1.running_var", "inner.1.running_mean"):
        assert torch.equal(path[3][name], live[name])
        assert (path[1]["inner.1.running_var"] > 0).all()


def test_a_tensor_that_would_overflow_its_dtype_is_stored_whole():
    before = {"w": torch.full((256,), 65000.0).half(), "v": torch.zeros(256).half()}
    state = {"w": before["w"] + torch.linspace(-4000, 504, 256).half(), "v": torch.ones(256).half()}
    made = encode("int8", state, NodeSource(before))
    found = NodeSource(before, [made[0]]).state_dict()
    assert found["w"].isfinite().all()
    assert made[1]["weight_error"] < 0.02
    assert made[0].entries["v"].code == "int8"


def test_a_buffer_that_is_a_slice_of_another_is_what_was_recorded():
    storage = torch.randn(1000)
    before = {"whole": storage.clone()}
    before["part"] = before["whole"][10:500]
    state = {"whole": storage + torch.randn(1000)}
    state["part"] = state["whole"][10:500]
    made = encode("int8", state, NodeSource(before))
    found = NodeSource(before, [made[0]]).state_dict()
    assert torch.equal(found["part"], found["whole"][10:500])
    assert made[0].parts["part"].untyped_storage().data_ptr() != made[0].parts["whole"].untyped_storage().data_ptr()


def test_complex_weights_that_moved_are_recorded():
    before = {"w": torch.zeros(8, dtype=torch.complex64)}
    made = encode("int8", {"w": before["w"] + 3j}, NodeSource(before))
    assert made[1]["delta_norm"] == pytest.approx(3 * 8**0.5)
    assert torch.equal(NodeSource(before, [made[0]]).state_dict()["w"], before["w"] + 3j)


# -- what a file may say of itself ------------------------------------------------------------------------------------


def entries(content, **changes):
    content["entries"]["w"] = changes.get("w", content["entries"]["w"])
    return content


DAMAGE = {
    "no JSON": lambda c, p: "{",
    "a list": lambda c, p: "[]",
    "no entries": lambda c, p: {"aliases": {}},
    "no aliases": lambda c, p: {"entries": c["entries"]},
    "an unknown code": lambda c, p: entries(c, w=["int7", "float32", [300]]),
    "an unknown dtype": lambda c, p: entries(c, w=["int8", "float8", [300]]),
    "a negative shape": lambda c, p: entries(c, w=["int8", "float32", [-300]]),
    "a shape of fractions": lambda c, p: entries(c, w=["int8", "float32", [300.0]]),
    "a shape of truth": lambda c, p: entries(c, w=["int8", "float32", [300, True]]),
    "a huge shape": lambda c, p: entries(c, w=["int8", "float32", [1 << 40]]),
    "a shape without end": lambda c, p: entries(c, w=["int8", "float32", [1 << 62, 1 << 62]]),
    "another shape": lambda c, p: entries(c, w=["int8", "float32", [299]]),
    "an entry too short": lambda c, p: entries(c, w=["int8", "float32"]),
    "an entry that is a number": lambda c, p: entries(c, w=3),
    "an alias of nothing": lambda c, p: c | {"aliases": {"v": "nothing"}},
    "an alias of itself": lambda c, p: c | {"aliases": {"w": "w"}},
    "aliases as a list": lambda c, p: c | {"aliases": ["w"]},
    "another code": lambda c, p: entries(c, w=["plain", "float32", [300]]),
    "a difference of integers": lambda c, p: entries(c, w=["int8", "int64", [300]]),
    "a dtype that is a function": lambda c, p: entries(c, w=["plain", "zeros", [300]]),
    "a dtype of no torch": lambda c, p: entries(c, w=["plain", "__class__", [300]]),
    "a code of an earlier version": lambda c, p: entries(c, w=["int6", "float32", [300]]),
    "deep nesting": lambda c, p: "[" * 100_000,
    "a part missing": lambda c, p: (p.pop("w|scale"), c)[1],
    "a part too many": lambda c, p: (p.update({"w|other": torch.zeros(1)}), c)[1],
    "a part of another dtype": lambda c, p: (p.update({"w|q": p["w|q"].float()}), c)[1],
    "a part too long": lambda c, p: (p.update({"w|q": torch.zeros(301, dtype=torch.int8)}), c)[1],
    "a part with two axes": lambda c, p: (p.update({"w|q": p["w|q"].view(3, 100)}), c)[1],
    "a scale too few": lambda c, p: (p.update({"w|scale": p["w|scale"][:-1]}), c)[1],
    "a whole tensor of another shape": lambda c, p: (p.update({"i": torch.ones(4).long()}), c)[1],
    "a whole tensor of another dtype": lambda c, p: (p.update({"i": torch.ones(3)}), c)[1],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_parts_that_do_not_fit_are_one_named_error_before_anything_is_decoded(damage):
    teacher = {"w": torch.zeros(300), "i": torch.zeros(3).long()}
    state = {"w": torch.ones(300), "i": torch.ones(3).long()}
    delta = encode("int8", state, NodeSource(teacher))[0]
    parts = dict(delta.parts)
    content = damage(json.loads(delta.metadata()), parts)
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(PathError, match=r"found somewhere|found .* in somewhere"):
        Delta.from_parts(text, parts, source="somewhere")


def test_what_was_written_is_read_back():
    node, _ = chain("int8", 1)
    again = Delta.from_parts(node.deltas[0].metadata(), node.deltas[0].parts, source="memory")
    assert again.aliases == {"right.weight": "left.weight"}
    assert difference(NodeSource(node.teacher, [again]).state_dict(), node.state_dict()) == []

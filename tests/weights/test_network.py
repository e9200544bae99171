from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from worlds import Score, clone, difference

from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.path.delta import NodeSource
from disback_plugin.weights.modules import unwrap
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.tensors import checksum, fingerprint


class Root(nn.Module):
    """A guidance model as DMD2 has it: teacher and fake score inside one root."""

    def __init__(self):
        super().__init__()
        self.real_unet, self.fake_unet = Score(), Score()


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def other_state(net):
    """Another network's state with the same keys: every tensor differs."""
    return {name: (tensor + 1).clone() for name, tensor in ScoreNetwork(net).state_dict().items()}


def test_the_keys_are_those_of_torch():
    net = Score()
    assert list(ScoreNetwork(net).state_dict()) == list(net.state_dict())


def test_every_wrapper_shows_the_names_of_the_plain_module(process_group):
    plain = Score()
    keys = list(plain.state_dict())
    inner = Score()
    inner.inner[0] = checkpoint_wrapper(inner.inner[0])
    inner.inner[3] = torch.compile(inner.inner[3], backend="eager")
    wrapped = torch.compile(DistributedDataParallel(inner), backend="eager")
    for net in (torch.compile(plain, backend="eager"), DistributedDataParallel(plain), nn.DataParallel(plain), wrapped):
        assert list(ScoreNetwork(net).state_dict()) == keys, type(net)


def test_a_users_attribute_called_module_keeps_its_name():
    holder = nn.Module()
    holder.module = nn.Linear(1, 1)
    assert sorted(ScoreNetwork(holder).state_dict()) == ["module.bias", "module.weight"]


def test_a_role_is_found_inside_a_wrapped_root(process_group):
    root = DistributedDataParallel(Root())
    role = ScoreNetwork(root, prefix="real_unet")
    assert list(role.state_dict()) == list(Score().state_dict())
    role.load_state_dict(other_state(Score()))
    assert difference(role.state_dict(), ScoreNetwork(root.module.real_unet).state_dict()) == []


def test_experts_are_one_role():
    experts = ScoreNetwork({"high": nn.Linear(1, 1), "low": nn.Linear(1, 1)})
    assert sorted(experts.state_dict()) == ["high.bias", "high.weight", "low.bias", "low.weight"]


@given(seed=st.integers(0, 1000))
def test_a_write_copies_every_key_and_keeps_every_object(seed):
    net, source = Score(), Score()
    stream = torch.Generator().manual_seed(seed)
    state = {k: (t + torch.randn(t.shape, generator=stream).to(t.dtype)) for k, t in other_state(source).items()}
    state["right.weight"] = state["left.weight"]
    before = {name: (id(t), t.data_ptr(), t.dtype, t.requires_grad, t._version) for name, t in _live(net)}
    net.train()
    ScoreNetwork(net).load_state_dict(state)
    assert difference(dict(net.state_dict()), state) == []
    for name, tensor in _live(net):
        identity, pointer, dtype, requires_grad, version = before[name]
        assert (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad) == (
            identity, pointer, dtype, requires_grad,
        ), name  # fmt: skip
        assert tensor._version > version, f"{name}: autograd could not notice the write"
    assert net.training


def _live(net):
    return [
        (name, t) for name, t in (*net.named_parameters(), *net.named_buffers()) if name != "scratch"
    ]  # not persistent


def _corruptions():
    yield "missing", lambda s: s.pop("inner.0.bias")
    yield "unknown", lambda s: s.update({"lora_A": torch.zeros(1)})
    yield "shape", lambda s: s.update({"inner.3.bias": torch.zeros(3)})
    yield "broadcast", lambda s: s.update({"inner.3.bias": torch.zeros(1)})
    yield "dtype class", lambda s: s.update({"inner.3.bias": torch.zeros(2, dtype=torch.int64)})
    yield "tie", lambda s: s.update({"right.weight": s["left.weight"] + 1})


@pytest.mark.parametrize("corrupt", [pytest.param(c, id=name) for name, c in _corruptions()])
def test_a_write_is_all_or_nothing(corrupt):
    net = Score()
    before, state = clone(dict(net.state_dict())), other_state(net)
    corrupt(state)
    with pytest.raises(MismatchError, match=r"expected .* to mend it"):
        ScoreNetwork(net).load_state_dict(state)
    assert difference(dict(net.state_dict()), before) == []


def test_a_write_between_forward_and_backward_is_noticed_by_autograd():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    loss = net(torch.ones(1, 2, requires_grad=True)).sum()
    ScoreNetwork(net).load_state_dict(other_state(net))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_network_sees_the_write_without_recompiling():
    calls = []

    def backend(graph, _):
        calls.append(graph)
        return graph.forward

    net, x = nn.Linear(2, 1), torch.ones(1, 2)
    compiled = torch.compile(net, backend=backend)
    compiled(x)
    ScoreNetwork(compiled).load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    assert compiled(x).item() == 6
    assert len(calls) == 1


@given(seed=st.integers(0, 99), bf16=st.booleans())
def test_a_source_is_written_as_a_state_is(seed, bf16):
    torch.manual_seed(seed)
    net, twin = Score(), Score()
    state = other_state(net)
    if bf16:
        net, twin = net.bfloat16(), twin.bfloat16()
    before = [(t.data_ptr(), t.dtype, t._version) for _, t in ScoreNetwork(net).named_tensors()]
    found = ScoreNetwork(net).write(NodeSource(state, ()))
    ScoreNetwork(twin).load_state_dict(state)
    assert difference(dict(net.state_dict()), dict(twin.state_dict())) == []
    assert found == checksum(state)
    after = [(t.data_ptr(), t.dtype, t._version) for _, t in ScoreNetwork(net).named_tensors()]
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    assert all(new > old for (*_, new), (*_, old) in zip(after, before, strict=True))


def test_a_source_reaches_weights_that_are_not_contiguous():
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    state = {"weight": torch.randn(4, 3, 3, 3), "bias": torch.randn(4)}
    ScoreNetwork(net).write(NodeSource(state, ()))
    assert net.weight.is_contiguous(memory_format=torch.channels_last)
    assert difference(dict(net.state_dict()), state) == []


def test_a_write_from_a_source_between_forward_and_backward_is_noticed_by_autograd():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    loss = net(torch.ones(1, 2, requires_grad=True)).sum()
    ScoreNetwork(net).write(NodeSource(other_state(net), ()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rounding_measures_what_a_half_precision_network_loses():
    net, state = nn.Linear(8, 8).bfloat16(), {"weight": torch.randn(8, 8), "bias": torch.randn(8)}
    lost = torch.cat([(t.bfloat16().double() - t.double()).reshape(-1) for t in state.values()])
    assert ScoreNetwork(net).relative_rounding(NodeSource(state, ()), 1.0) == pytest.approx(lost.norm().item())
    assert ScoreNetwork(nn.Linear(8, 8)).relative_rounding(NodeSource(state, ()), 1.0) == 0


def test_the_fingerprint_depends_on_content_only():
    net, twin = Score(), Score()
    assert ScoreNetwork(net).fingerprint() != ScoreNetwork(twin).fingerprint()
    twin.load_state_dict(net.state_dict())
    assert ScoreNetwork(net).fingerprint() == ScoreNetwork(torch.compile(twin)).fingerprint()
    state = ScoreNetwork(net).state_dict()
    assert fingerprint(state) == fingerprint(dict(reversed(state.items())))
    assert fingerprint(state) != fingerprint({k: t.double() for k, t in state.items()})


def test_the_checksum_changes_with_any_optimizer_step():
    net = Score()
    role, before = ScoreNetwork(net), ScoreNetwork(net).checksum()
    assert role.checksum() == before
    net(torch.ones(4, 2), torch.ones(4, 1)).square().sum().backward()
    torch.optim.Adam(net.parameters(), lr=1e-5).step()
    assert role.checksum() != before


def _quantised():
    net = nn.Linear(2, 2)
    net.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    return net


def _inference():
    with torch.inference_mode():
        return nn.Linear(2, 2)


def _with_buffer(buffer):
    net = nn.Linear(1, 1)
    net.register_buffer("extra", buffer)
    return net


def _zero_3():
    net = nn.Linear(2, 2)
    net.weight.ds_id = 0  # as DeepSpeed marks what it has partitioned
    return net


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"scale": 1}


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Linear(2, 2, device="meta"), "meta device"),
        (_quantised, "quantised"),
        (lambda: nn.LazyLinear(2), "lazy"),
        (_inference, "inference mode"),
        (lambda: ExtraState(2, 2), "extra state"),
        (_zero_3, "ZeRO-3"),
        (lambda: _with_buffer(torch.ones(1).expand(3)), "expanded"),
        (lambda: _with_buffer(torch.ones(2, dtype=torch.float8_e4m3fn)), "quantised"),
        (lambda: _with_buffer(torch.ones(2, dtype=torch.complex128)), "complex128"),
        (lambda: _with_buffer(torch.eye(2).to_sparse()), "stored as"),
        (lambda: nn.ReLU(), "without weights"),
        (lambda: "unet", "str as the teacher"),
        (lambda: None, "NoneType as the teacher"),
    ],
)
def test_weights_that_cannot_be_written_in_place_are_refused_with_the_reason(network, message):
    with pytest.raises(RoleError, match=message):
        ScoreNetwork(network(), role="teacher")


def test_a_wrong_prefix_lists_what_is_there():
    with pytest.raises(RoleError, match=r"no 'unet'.*\['fake_unet', 'real_unet'\]"):
        ScoreNetwork(Root(), prefix="unet")


def test_unwrap_leaves_a_plain_module_alone():
    net = nn.Linear(1, 1)
    assert unwrap(net) is net


def test_the_checksum_sees_an_update_of_a_single_weight():
    net = nn.Embedding(1000, 4)
    role, before = ScoreNetwork(net), ScoreNetwork(net).checksum()
    with torch.no_grad():
        net.weight[517, 2] = net.weight[517, 2].nextafter(torch.tensor(9.0))
    assert role.checksum() != before


def test_weights_that_are_replaced_later_are_enumerated_and_validated_again():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    role = ScoreNetwork(net)
    net[0].weight = nn.Parameter(torch.ones(2, 2))
    assert role.state_dict()["0.weight"].data_ptr() == net[0].weight.data_ptr()
    net[1].running_mean = torch.ones(2)
    assert role.state_dict()["1.running_mean"].data_ptr() == net[1].running_mean.data_ptr()
    net.to(torch.float64)
    assert {tensor.dtype for _, tensor in role.named_tensors()} == {torch.float64, torch.int64}
    net[0] = nn.Linear(2, 3)
    assert role.named_tensors()[0][1].shape == (3, 2)
    net[0] = checkpoint_wrapper(net[0])
    assert list(role.state_dict()) == list(ScoreNetwork(net).state_dict())
    net[0] = nn.Linear(2, 2, device="meta")
    with pytest.raises(RoleError, match="meta device"):
        role.load_state_dict({})


def test_naming_a_role_does_not_rename_the_callers_object():
    mine = ScoreNetwork(nn.Linear(1, 1), role="mine")
    assert ScoreNetwork.of(mine, role="teacher").role == "teacher"
    assert mine.role == "mine"

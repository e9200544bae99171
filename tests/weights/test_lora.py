"""Teacher and fake score as adapters on one base: a teacher is added, one of them runs, each has its own tensors."""

from __future__ import annotations

import copy

import pytest
import tiny_pipelines
import torch
from lora_worlds import SIGMA, X_T, Eps, Under, active_adapters, adapted
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch._dynamo.testing import CompileCounter
from worlds import clone, difference

import disback_plugin as disback
from disback_plugin import lora
from disback_plugin.errors import RoleError
from disback_plugin.weights.network import ScoreNetwork

# -- a frozen teacher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_teacher_is_added_without_a_trace_and_changes_no_output(global_random_state, wrapped):
    model = adapted("fake", wrapped=wrapped)
    inject_fake = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters() if ".teacher." not in n}
    bare = Under(model, None)(X_T, SIGMA)
    torch.set_rng_state(global_random_state)
    lora.add_teacher(model, like="fake", name="another")
    for name, (flag, value) in inject_fake.items():
        parameter = model.get_parameter(name)
        assert parameter.requires_grad == flag
        assert torch.equal(parameter, value)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".another." in n)
    assert active_adapters(model) == ["fake"]
    assert torch.equal(Under(model, "another")(X_T, SIGMA), bare)


def test_two_processes_have_the_same_teacher_whatever_their_seed_and_the_fake_scores_dropout():
    states = []
    for seed in (1, 2):
        torch.manual_seed(0)
        base = Eps()
        torch.manual_seed(seed)
        model = adapted("fake", base=base, lora_dropout=0.5)
        states.append(ScoreNetwork(model, lora_adapter="teacher").state_dict())
        assert torch.equal(Under(model, "teacher")(X_T, SIGMA), Under(model, None)(X_T, SIGMA))
    assert difference(*states) == []
    assert all(bool(v.any()) is ("lora_A" in k) for k, v in states[0].items() if v.numel())


def test_the_active_adapter_is_restored_after_an_error_and_requires_grad_stays():
    model = adapted("fake", "student")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with lora.use_adapter(model, "fake"):
        for adapter in ("teacher", None, "student"):
            with lora.use_adapter(model, adapter):
                assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
            with pytest.raises(RuntimeError, match="shapes"):
                Under(model, adapter)(torch.ones(1, 7), SIGMA)
            assert active_adapters(model) == ["fake"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    with pytest.raises(RoleError, match="no LoRA adapter 'techer'"), lora.use_adapter(model, "techer"):
        pass


def test_gradients_of_two_adapters_on_one_base_go_to_their_own():
    model = adapted("fake", "student", init_lora_weights=False)
    for name in ("fake", "student"):
        for n, p in model.named_parameters():
            p.requires_grad_(f".{name}." in n)
            p.grad = None
        Under(model, name)(X_T, SIGMA).sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            n for n, _ in model.named_parameters() if f".{name}." in n
        }


def test_a_checkpointed_forward_has_its_gradients_if_backward_is_called_inside():
    from torch.utils.checkpoint import checkpoint

    model, gradients = adapted("fake", init_lora_weights=False), []
    for run in (model, lambda *args: checkpoint(model, *args, use_reentrant=False)):
        model.zero_grad()
        with lora.use_adapter(model, "teacher"), lora.use_adapter(model, "fake"):  # as a loop that was elsewhere before
            run(X_T, SIGMA).square().sum().backward()
        gradients.append(clone({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert gradients[0]
    assert difference(*gradients) == []


# -- the tensors of an adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_names_are_pefts_own(wrapped):
    model = adapted("fake", wrapped=wrapped, init_lora_weights=False)
    state = {n: t for n, t in ScoreNetwork(model, lora_adapter="fake").state_dict().items() if t.numel()}
    theirs = get_peft_model_state_dict(model, adapter_name="fake")
    assert {n.removeprefix("base_model.model."): t for n, t in theirs.items()}.keys() == state.keys()
    for name, value in theirs.items():
        assert value.data_ptr() == state[name.removeprefix("base_model.model.")].data_ptr()
    prefix = "base_model.model." if wrapped else ""
    before = clone(state)
    set_peft_model_state_dict(model, {prefix + n: t + 1 for n, t in state.items()}, adapter_name="teacher")
    written = {n: t for n, t in ScoreNetwork(model, lora_adapter="teacher").state_dict().items() if t.numel()}
    assert difference(written, {n: t + 1 for n, t in before.items()}) == []


def test_plain_and_wrapped_compiled_and_nested_networks_have_one_identity():
    base = Eps()
    plain = adapted("fake", base=copy.deepcopy(base))
    wrapped = adapted("fake", base=copy.deepcopy(base), wrapped=True)
    roles = [
        ScoreNetwork(plain, lora_adapter="teacher"),
        ScoreNetwork(wrapped, lora_adapter="teacher"),
        ScoreNetwork(torch.compile(wrapped, backend="eager"), lora_adapter="teacher"),
        ScoreNetwork(nn.ModuleDict({"unet": wrapped}), prefix="unet", lora_adapter="teacher"),
    ]
    assert len({role.fingerprint() for role in roles}) == 1
    assert lora.base_checksum(base) == lora.base_checksum(plain) == lora.base_checksum(wrapped)
    with torch.no_grad():
        next(base.parameters()).add_(1)
    assert lora.base_checksum(base) != lora.base_checksum(plain)


def test_a_quantised_base_is_fine_since_it_is_never_written():
    base = Eps()
    base.packed = nn.Parameter(torch.ones(5, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RoleError, match="quantised"):
        ScoreNetwork(base)
    net = ScoreNetwork(adapted("fake", base=base), lora_adapter="fake")
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    assert base.packed.tolist() == [1] * 5


# -- compiled ---------------------------------------------------------------------------------------------------------


def plane():
    return adapted("fake"), (X_T, SIGMA)


def unet():
    model = tiny_pipelines.unet(8)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]), "fake")
    lora.add_teacher(model, like="fake")
    return model, (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8))


@pytest.mark.parametrize("make", [plane, pytest.param(unet, marks=pytest.mark.slow)])
def test_a_compiled_network_has_a_graph_for_each_adapter_and_no_move_makes_another(tmp_path, make):
    model, inputs = make()
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)

    def output(adapter, network=compiled):
        with lora.use_adapter(network, adapter):
            found = network(*inputs)
        return getattr(found, "sample", found)

    teacher, fake = ScoreNetwork(compiled, lora_adapter="teacher"), ScoreNetwork(compiled, lora_adapter="fake")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def fake_step():
        optimizer.zero_grad()
        output("fake").square().mean().backward()
        optimizer.step()

    path = disback.record(teacher, fake, fake_step, path=tmp_path, iterations=4, every=1)
    compilations, outputs = [], []
    for position in (4.0, 3.5, 2.0, 1.0, 0.25, 0.0):
        teacher.write(path.source(position))
        with torch.no_grad():
            outputs.append(output("teacher"))
            output("fake"), output(None)
            torch.testing.assert_close(outputs[-1], output("teacher", model))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, compilations
    assert torch.equal(output("teacher", model), output(None, model))
    assert not torch.equal(outputs[0], outputs[-1])

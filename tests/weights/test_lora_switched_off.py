"""The teacher is the fake score's network with its adapters switched off, as in SwiftBrush: hooks add the nodes."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_worlds import SIGMA, X_T, Eps, Kinds, bits, config, inject
from peft import LoraConfig, get_peft_model
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin import lora
from disback_plugin.errors import PathError, RoleError
from disback_plugin.loop.roles import networks_of
from disback_plugin.path.delta import NodeSource

PLAN = {"record": 6, "every": 2, "schedule": "ramp:4"}


class SwitchedOffRun(Run):
    """`Run` whose teacher is its fake score while peft's layers are disabled, as a loop does it that knows nothing."""

    dtype = torch.float32

    def __init__(self, seed=0, *, wrapped=True, base_seed=0, adapter_seed=1, **options):
        super().__init__(seed)
        del self.teacher
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(base_seed)
            base = Eps()
            torch.manual_seed(adapter_seed)
            self.fake_score = get_peft_model(base, config(**options), "fake") if wrapped else base
            if not wrapped:
                inject(base, "fake", **options)
        self.bare = copy.deepcopy(self.fake_score)
        self.optimizer_f = torch.optim.Adam([p for p in self.fake_score.parameters() if p.requires_grad], lr=1e-2)

    def teacher(self, *args, network=None):
        network = network or self.fake_score
        with lora.use_adapter(network, None):
            return network(*args)

    def roles(self):
        optimizers = {"generator_optimizer": self.optimizer_g, "fake_score_optimizer": self.optimizer_f}
        return {"teacher": self.fake_score, "fake_score": self.fake_score, **optimizers}

    @property
    def outputs(self):
        return self.teacher(X_T, SIGMA).numpy().tobytes()


def hook_count(network):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_runs_while_adapters_are_off_moves_back_to_the_base_and_leaves_no_trace(tmp_path, wrapped):
    run = SwitchedOffRun(wrapped=wrapped)
    base, names, generator = run.outputs, [*run.fake_score.state_dict()], clone(run.generator.state_dict())
    before = bits({n: p for n, p in run.fake_score.state_dict().items() if "lora" not in n})
    with disback.attach(**run.roles(), path=tmp_path, codec="exact", **PLAN) as handle:
        run.steps(5)
        assert run.outputs == base
        assert difference(clone(run.generator.state_dict()), generator) == []
        run.step()
        fitted = copy.deepcopy(handle.path[len(handle.path) - 1])
        seen = []
        for _ in range(5):
            seen.append((handle.position, run.outputs == base))
            run.step()
        assert [*run.fake_score.state_dict()] == names
        with handle.original_teacher():
            assert run.outputs == base
    assert [is_base for _, is_base in seen] == [False] * 4 + [True]
    assert [p for p, _ in seen] == sorted((p for p, _ in seen), reverse=True)
    assert (run.outputs, hook_count(run.fake_score), [*run.fake_score.state_dict()]) == (base, 0, names)
    assert bits({n: p for n, p in run.fake_score.state_dict().items() if "lora" not in n}) == before
    assert any("lora_B" in name and tensor.any() for name, tensor in fitted.items())


def test_a_node_runs_as_the_fake_score_ran_when_it_was_recorded(tmp_path):
    run = SwitchedOffRun()
    with disback.attach(**run.roles(), path=tmp_path, codec="exact", record=2, every=1, schedule="fixed:2") as handle:
        run.fake_step()
        wanted = run.fake_score(X_T, SIGMA).detach()
        run.fake_step()
        run.generator_step()
        assert handle.position == 1.0
        assert torch.equal(run.teacher(X_T, SIGMA), wanted)


def test_a_run_resumes_bit_for_bit_in_both_stages(tmp_path):
    for stop in (3, 8):
        whole = SwitchedOffRun()
        with disback.attach(**whole.roles(), path=tmp_path / f"{stop}", **PLAN) as handle:
            whole.steps(stop)
            state, checkpoint = handle.state_dict(), whole.checkpoint()
            whole.steps(14 - stop)
            end = whole.checkpoint()
        again = SwitchedOffRun(adapter_seed=5)
        with disback.attach(**again.roles(), path=tmp_path / f"{stop}", **PLAN) as handle:
            again.load(checkpoint)
            handle.load_state_dict(state)
            again.steps(14 - stop)
            assert (handle.phase, difference(again.checkpoint(), end)) == ("done", []), stop
    with pytest.raises(PathError, match="another teacher"):
        disback.attach(**SwitchedOffRun(base_seed=1).roles(), path=tmp_path / "3", **PLAN)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["conv"], "lora_bias": True}])
def test_every_kind_of_layer_runs_as_under_peft(options):
    targets = {"target_modules": ["words", "conv", "image", "out", "gpt"]}
    model = get_peft_model(Kinds(), LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **targets | options), "fake")
    teacher, adapter = networks_of(model, model, adapter_parameters(model))
    index = torch.arange(6).view(2, 3)
    under = model(index)
    with model.disable_adapter():
        bare = model(index)
    teacher.install()
    teacher.write(NodeSource(adapter.state_dict(), ()))
    with model.disable_adapter():
        torch.testing.assert_close(model(index), under)
    assert torch.equal(model(index), under)
    teacher.write(NodeSource(dict(networks_of(model, model, adapter_parameters(model))[0].full_state()), ()))
    with model.disable_adapter():
        assert torch.equal(model(index), bare)


def adapter_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_one_network_in_both_roles_without_adapters_or_without_attach_is_refused(tmp_path):
    run = SwitchedOffRun()
    with pytest.raises(RoleError, match=r"one network as teacher and fake score.*use attach\(\)"):
        disback.TrajectoryScheduler(None, run.fake_score, run.fake_score)
    run = Run()
    with pytest.raises(RoleError, match="share weights"):
        disback.attach(**run.roles() | {"teacher": run.fake_score}, path=tmp_path)


@pytest.mark.parametrize("how", ["whole", "part"])
def test_a_compiled_network_is_refused_as_its_graph_would_not_see_the_hooks(tmp_path, how):
    run = SwitchedOffRun(wrapped=False)
    roles = run.roles()
    if how == "whole":
        roles |= dict.fromkeys(("teacher", "fake_score"), torch.compile(run.fake_score))
    else:
        run.fake_score.body[1].compile()
    with pytest.raises(RoleError, match="compile it after attach"):
        disback.attach(**roles, path=tmp_path)
    assert hook_count(run.fake_score) == 0

"""A LoRA fake score under a whole teacher: nodes are adapters, and moves write merged weights."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from lora_worlds import Eps, Kinds, Under, bits, config, inject
from peft import LoraConfig, get_peft_model
from ranks import returned
from sharded_runs import fsdp1
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.errors import DisbackError, MismatchError, PathError, RoleError, StateError
from disback_plugin.loop.roles import networks_of
from disback_plugin.path.delta import NodeSource
from disback_plugin.weights.network import ScoreNetwork

PLAN = {"record": 6, "every": 2, "schedule": "ramp:4"}


class WholeTeacherRun(Run):
    """`Run` whose fake score is a LoRA on a copy of the teacher, as peft injects it or inside a PeftModel."""

    dtype = torch.float32

    def __init__(
        self, seed=0, *, wrapped=False, base_seed=0, adapter_seed=1, dtype=torch.float32, shared=False, **options
    ):
        super().__init__(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(base_seed)
            self.teacher = Eps().to(dtype).requires_grad_(False)
            base = copy.deepcopy(self.teacher).float()
            torch.manual_seed(adapter_seed)
            self.fake_score = get_peft_model(base, config(**options), "fake") if wrapped else base
            if not wrapped:
                inject(base, "fake", **options)
            if shared:
                inject(base, "student", **options)
                student = Under(base, "student")
                self.generator = lambda z: z - student(z, torch.ones(1))
        self.dtype = dtype
        for name, parameter in self.fake_score.named_parameters():
            parameter.requires_grad_(".fake." in name)
        self.trained = [p for n, p in self.fake_score.named_parameters() if ".fake." in n]
        self.optimizer_f = torch.optim.Adam(self.trained, lr=1e-2)
        if shared:
            trained = [p.requires_grad_() for n, p in self.fake_score.named_parameters() if ".student." in n]
            self.optimizer_g, self.network = torch.optim.Adam(trained, lr=1e-2), self.fake_score
            self.fake_score = Under(base, "fake")

    def roles(self):
        return super().roles() | {"fake_score": getattr(self.fake_score, "model", self.fake_score)}


def merged(run, state):
    """The teacher's state at a node, in float64 and by peft's definition."""
    scale, wanted = run.fake_score.body[0].scaling["fake"], clone(run.original)
    for name, b in state.items():
        if name.endswith("lora_B.weight"):
            a, target = state[name.replace("lora_B", "lora_A")], name.replace("lora_B.", "")
            wanted[target] = (wanted[target].double() + scale * b.double() @ a.double()).to(run.dtype)
    return wanted


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_write_the_base_with_the_adapter_and_the_end_is_the_teacher_bit_for_bit(tmp_path, wrapped, dtype):
    run = WholeTeacherRun(wrapped=wrapped, dtype=dtype, lora_alpha=64)
    run.original = clone(dict(run.teacher.state_dict()))
    with torch.no_grad():  # adding 0 would lose the sign
        run.teacher.body[0].weight[0, 0] = run.fake_score.get_parameter(first_weight(run)).data[0, 0] = -0.0
    run.original, generator, storage = (
        clone(dict(run.teacher.state_dict())),
        clone(run.generator.state_dict()),
        where(run),
    )
    with disback.attach(**run.roles(), path=tmp_path, codec="exact", **PLAN) as handle:
        run.steps(6)
        assert difference(clone(run.generator.state_dict()), generator) == []
        positions = []
        for _ in range(5):
            positions.append(handle.position)
            source = handle.path.source(handle.position)
            state = {n: source.read(n, 0, m.shape.numel()).view(m.shape).clone() for n, m in source.layout().items()}
            assert difference(clone(dict(run.teacher.state_dict())), merged(run, state)) in ([], ["body.0.weight/."])
            run.step()
        with handle.original_teacher():
            assert bits(run.teacher) == bits(run.original)
    assert positions == sorted(positions, reverse=True)
    assert positions[0] > 2
    assert positions[-1] == 0
    assert bits(run.teacher) == bits(run.original)
    assert where(run) == storage
    assert handle.path.nodes[0].bytes < 20_000


def first_weight(run):
    return next(n for n, _ in run.fake_score.named_parameters() if n.endswith("body.0.base_layer.weight"))


def where(run):
    return [(p.data_ptr(), id(p), p.dtype) for p in run.teacher.parameters()]


def test_the_fake_score_and_the_student_may_share_the_base(tmp_path):
    run = WholeTeacherRun(shared=True)
    base = {n: p.clone() for n, p in run.network.named_parameters() if "lora" not in n}
    before = clone(dict(run.teacher.state_dict()))
    with disback.attach(**run.roles(), path=tmp_path, **PLAN) as handle:
        run.steps(14)
        assert handle.phase == "done"
    assert difference({n: run.network.get_parameter(n).data for n in base}, clone(base)) == []
    assert difference(clone(dict(run.teacher.state_dict())), before) == []


def test_a_run_resumes_bit_for_bit_in_both_stages_with_a_path_for_every_adapter_on_the_base(tmp_path):
    for stop in (3, 8):
        whole = WholeTeacherRun()
        with disback.attach(**whole.roles(), path=tmp_path / f"{stop}", **PLAN) as handle:
            whole.steps(stop)
            state, checkpoint = handle.state_dict(), whole.checkpoint()
            moving = clone(dict(whole.teacher.state_dict()))
            whole.steps(14 - stop)
            end = whole.checkpoint()
        again = WholeTeacherRun(adapter_seed=5)
        if stop == 8:  # as a checkpoint of DMD2 holds the moving teacher
            again.teacher.load_state_dict(moving)
        again.load(checkpoint)
        with disback.attach(**again.roles(), path=tmp_path / f"{stop}", state=state, **PLAN) as handle:
            again.steps(14 - stop)
            assert (handle.phase, difference(again.checkpoint(), end)) == ("done", []), stop
    with disback.attach(**WholeTeacherRun(adapter_seed=7).roles(), path=tmp_path / "3", **PLAN) as handle:
        assert handle.phase == "backtracking"
    with pytest.raises(PathError, match="another teacher"):
        disback.attach(**WholeTeacherRun(base_seed=1).roles(), path=tmp_path / "3", **PLAN)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("rslora", [False, True])
def test_every_kind_of_layer_is_merged_as_peft_merges_it(rslora):
    teacher = Kinds()
    fake = Kinds(head=True)
    fake.load_state_dict(teacher.state_dict(), strict=False)
    layers = ["words", "conv", "image", "out", "gpt"]
    model = get_peft_model(
        fake, LoraConfig(r=2, lora_alpha=3, target_modules=layers, use_rslora=rslora, init_lora_weights=False), "fake"
    )
    network, adapter = networks_of(teacher.double(), model.double())
    network.check_original()
    before = bits(teacher)
    network.write(NodeSource(adapter.state_dict(), ()))
    index = torch.arange(6).view(2, 3)
    torch.testing.assert_close(teacher(index), model(index))
    network.write(NodeSource(dict(network.full_state()), ()))
    assert bits(teacher) == before


# -- what cannot be a pair --------------------------------------------------------------------------------------------


def other_base(run):
    with torch.no_grad():
        run.teacher.body[4].bias[0] += 1e-3


def one_memory(run):
    run.teacher.body[0].weight = run.fake_score.body[0].base_layer.weight


def second_adapter(run):
    inject(run.fake_score, "second")
    weights = dict(run.fake_score.named_parameters())
    for name in [name for name in weights if ".fake." in name or ".second." in name]:
        weights[name].requires_grad_()  # peft 0.17 freezes the first one
    run.optimizer_f.add_param_group({"params": [weights[name] for name in weights if ".second." in name]})


def trained_base(run):
    run.optimizer_f.add_param_group({"params": [run.fake_score.body[0].base_layer.bias.requires_grad_()]})


def other_layers(run):
    run.teacher = nn.Sequential(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (other_base, MismatchError, "body.4.bias of the teacher, which differs from the base.*copy of the fake score"),
        (one_memory, RoleError, "share weights.*in the same memory"),
        (second_adapter, RoleError, r"several trained LoRA adapters, \['fake', 'second'\].*lora_adapter=NAME"),
        (trained_base, RoleError, "steps the adapters' base"),
        (other_layers, MismatchError, "a teacher without body.0.weight"),
    ],
)
def test_what_is_no_pair_is_refused_before_anything_is_written(tmp_path, change, error, reason):
    run = WholeTeacherRun()
    change(run)
    before = clone(dict(run.fake_score.state_dict()))
    with pytest.raises(error, match=reason):
        disback.attach(**run.roles(), path=tmp_path, **PLAN)
    assert not list(tmp_path.iterdir())
    assert difference(clone(dict(run.fake_score.state_dict())), before) == []


def test_one_of_several_adapters_can_be_named(tmp_path):
    run = WholeTeacherRun()
    second_adapter(run)
    named = {"fake_score": ScoreNetwork(run.fake_score, lora_adapter="fake")}
    with disback.attach(**run.roles() | named, path=tmp_path, **PLAN) as handle:
        assert handle.phase == "recording"


@pytest.mark.parametrize("how", ["merged", "written"])
def test_a_base_that_changes_meanwhile_is_noticed_instead_of_a_wrong_teacher(tmp_path, how):
    run = WholeTeacherRun(wrapped=True)
    handle = disback.attach(**run.roles(), path=tmp_path, **PLAN)
    run.steps(8)
    if how == "merged":
        run.fake_score.merge_adapter()
    else:
        run.fake_score.get_parameter(first_weight(run)).data[0] += 1
    with pytest.raises((StateError, RoleError), match=r"base of LoRA adapter 'fake' that somebody|unmerge_adapter"):
        handle.detach()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["body.4"], "target_modules": ["body.0"]}, "modules_to_save"),
        ({"bias": "all"}, "trains the base"),
    ],
)
def test_an_adapter_that_is_more_than_its_matrices_is_refused(tmp_path, options, reason):
    run = WholeTeacherRun(wrapped=True, **options)
    with pytest.raises(RoleError, match=reason):
        disback.attach(**run.roles(), path=tmp_path, **PLAN)


def test_a_teacher_too_coarse_for_the_adapter_is_named(tmp_path, caplog):
    run = WholeTeacherRun(dtype=torch.bfloat16, lora_alpha=0.01)
    with disback.attach(**run.roles(), path=tmp_path, **PLAN):
        run.steps(7)
    assert "dtype rounds node 3" in caplog.text


# -- on two ranks -----------------------------------------------------------------------------------------------------


def on_a_rank(folder, forms):
    from torch.distributed.fsdp import fully_shard

    cuts = {"plain": lambda net: net, "fsdp2": fully_shard, "fsdp1": partial(fsdp1, form="root")}
    said = []
    for form in forms:
        run = WholeTeacherRun()
        teacher, fake_score = (cuts[each] for each in form.split())
        run.teacher, run.fake_score = teacher(run.teacher), fake_score(run.fake_score)
        run.trained = [p for n, p in run.fake_score.named_parameters() if ".fake." in n]
        run.optimizer_f = torch.optim.Adam(run.trained, lr=1e-2)
        held = []
        with disback.attach(**run.roles(), path=f"{folder}/{form}", **PLAN) as handle:
            for step in range(12):
                run.step()
                held.append(ScoreNetwork(run.teacher).fingerprint())
                if step in (3, 8):  # in each stage, its own state fits
                    handle.load_state_dict(handle.state_dict())
                    assert ScoreNetwork(run.teacher).fingerprint() == held[-1]
            phase = handle.phase
        said.append((phase, len(set(held)), held, ScoreNetwork(run.teacher).fingerprint()))
        other = WholeTeacherRun(base_seed=4)
        with pytest.raises(DisbackError, match=r"differs from the base|recorded with another"):
            disback.attach(**run.roles() | {"teacher": teacher(other.teacher)}, path=f"{folder}/other", **PLAN)
    return said


@pytest.mark.parametrize(
    "form",
    [
        "fsdp1 fsdp1",  # as LongLive: the base is cut at other places, because the adapter lies between its weights
        pytest.param("fsdp2 fsdp2", marks=pytest.mark.slow),
        pytest.param("plain fsdp2", marks=pytest.mark.slow),
        pytest.param("fsdp2 fsdp1", marks=pytest.mark.slow),
    ],
)
def test_sharded_networks_hold_what_whole_ones_do(nursery, tmp_path, form):
    first, second = returned(nursery.play(on_a_rank, 2, str(tmp_path), ["plain plain", form]))
    assert first[1] == second[1]
    whole, sharded = first
    assert (sharded[0], sharded[1] > 3, sharded[3]) == ("done", True, sharded[2][0])
    assert (whole[0], whole[3]) == ("done", sharded[3])
    assert sharded[2][:3] == whole[2][:3]


def test_experts_have_an_adapter_each(tmp_path):
    runs = {"high": WholeTeacherRun(), "low": WholeTeacherRun(base_seed=4, adapter_seed=9)}
    first = runs["high"]
    before = {name: bits(run.teacher) for name, run in runs.items()}
    first.optimizer_f = torch.optim.Adam([p for run in runs.values() for p in run.trained], lr=1e-2)
    networks = {role: {name: getattr(run, role) for name, run in runs.items()} for role in ("teacher", "fake_score")}
    with disback.attach(**first.roles() | networks, path=tmp_path, **PLAN) as handle:
        for _ in range(8):
            for run in runs.values():
                x_0 = run.randn(16, 2)
                (run.fake_score(x_0, torch.ones(1)) - x_0).square().mean().backward()
            first.optimizer_f.step()
            first.optimizer_f.zero_grad()
            first.generator_step()
        assert handle.position > 0
        assert all(bits(run.teacher) != before[name] for name, run in runs.items())
    assert {name: bits(run.teacher) for name, run in runs.items()} == before

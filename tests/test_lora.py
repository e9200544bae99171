"""Teacher and fake score as adapters on one base: the base never moves, and a run is what it is with whole networks."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from ranks import returned
from test_flattening import fsdp1
from torch import nn
from torch._dynamo.testing import CompileCounter
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin import lora
from disback_plugin.errors import MismatchError, OptionError, PathError, RoleError
from disback_plugin.networks.adapting import runs_under
from disback_plugin.weights import ScoreNetwork

TARGETS = ["0", "2", "4"]


class Eps(nn.Module):
    """An eps-predictor of the plane."""

    def __init__(self, width=32):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x_t, sigma):
        return self.body(torch.cat([x_t, sigma.log().expand(len(x_t), 1)], dim=1))


def config(r=4, **options):
    return LoraConfig(r=r, target_modules=options.pop("target_modules", TARGETS), **options)


def adapted(*names, wrapped=False, like=None, base=None, **options):
    """A base with adapters, as peft injects them or inside a PeftModel, and a teacher like the first of them."""
    base = Eps() if base is None else base
    model = get_peft_model(base, config(**options), names[0]) if wrapped else base
    for name in names[wrapped:]:
        (model.add_adapter(name, config(**options)) if wrapped else inject(base, name, **options))
    lora.add_teacher(model, like=names[0])
    return model


def inject(model, name, **options):
    peft.inject_adapter_in_model(config(**options), model, name)


class Under:
    """The base under one adapter, to be called as a network of its own."""

    def __init__(self, model, adapter):
        self.model, self.adapter = model, adapter

    def __call__(self, *args):
        with lora.under(self.model, self.adapter):
            return self.model(*args)


class LoraRun(Run):
    """`Run` on one base: teacher, fake score and, with `shared`, the student are adapters of it."""

    def __init__(self, seed=0, *, wrapped=False, shared=False, base_seed=0, adapter_seed=1):
        super().__init__(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(base_seed)
            base = Eps()
            torch.manual_seed(adapter_seed)
            self.model = adapted("fake", "student", wrapped=wrapped, base=base)
        self.teacher, self.fake_score = Under(self.model, "teacher"), Under(self.model, "fake")
        if shared:
            student = Under(self.model, "student")
            self.generator = lambda z: z - student(z, torch.ones(1))
        tensors = {name: list(self.adapter(name).state_dict().values()) for name in ("fake", "student")}
        self.optimizer_f = torch.optim.Adam(self.parameters("fake"), lr=1e-2)
        assert all(tensors.values())
        if shared:
            self.optimizer_g = torch.optim.Adam(self.parameters("student"), lr=1e-3)

    dtype = torch.float32

    def parameters(self, name):
        found = [p for n, p in self.model.named_parameters() if f".{name}." in n]
        for parameter in found:
            parameter.requires_grad_(True)
        return found

    def adapter(self, name):
        return ScoreNetwork(self.model, adapter=name)

    def roles(self):
        return super().roles() | {"teacher": self.adapter("teacher"), "fake_score": self.adapter("fake")}

    def checkpoint(self):
        adapters = {name: clone(self.adapter(name).state_dict()) for name in ("fake", "student")}
        optimizers = {"g": clone(self.optimizer_g.state_dict()), "f": clone(self.optimizer_f.state_dict())}
        generator = clone(dict(self.generator.state_dict())) if isinstance(self.generator, nn.Module) else {}
        return {**adapters, **optimizers, "generator": generator, "stream": self.stream.get_state()}

    def load(self, checkpoint):
        checkpoint = clone(checkpoint)
        for name in ("fake", "student"):
            self.adapter(name).load_state_dict(checkpoint[name])
        self.optimizer_g.load_state_dict(checkpoint["g"])
        self.optimizer_f.load_state_dict(checkpoint["f"])
        if isinstance(self.generator, nn.Module):
            self.generator.load_state_dict(checkpoint["generator"])
        self.stream.set_state(checkpoint["stream"])


X_T, SIGMA = torch.linspace(-2, 2, 10).view(5, 2), torch.tensor([0.5])


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
    assert runs_under(model, "fake")
    assert torch.equal(Under(model, "another")(X_T, SIGMA), bare)


def test_two_processes_have_the_same_teacher_whatever_their_seed_and_the_fake_scores_dropout():
    states = []
    for seed in (1, 2):
        torch.manual_seed(0)
        base = Eps()
        torch.manual_seed(seed)
        model = adapted("fake", base=base, lora_dropout=0.5)
        states.append(ScoreNetwork(model, adapter="teacher").state_dict())
        assert torch.equal(Under(model, "teacher")(X_T, SIGMA), Under(model, None)(X_T, SIGMA))
    assert difference(*states) == []
    assert all(bool(v.any()) is ("lora_A" in k) for k, v in states[0].items() if v.numel())


def test_who_runs_is_put_back_though_the_forward_raises_and_what_requires_gradients_stays():
    model = adapted("fake", "student")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with lora.under(model, "fake"):
        for adapter in ("teacher", None, "student"):
            with lora.under(model, adapter):
                assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
            with pytest.raises(RuntimeError, match="shapes"):
                Under(model, adapter)(torch.ones(1, 7), SIGMA)
            assert runs_under(model, "fake")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    with pytest.raises(RoleError, match="no LoRA adapter 'techer'"), lora.under(model, "techer"):
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
        with lora.under(model, "teacher"), lora.under(model, "fake"):  # as a loop that was elsewhere before
            run(X_T, SIGMA).square().sum().backward()
        gradients.append(clone({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert gradients[0]
    assert difference(*gradients) == []


# -- the tensors of an adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_names_are_pefts_own(wrapped):
    model = adapted("fake", wrapped=wrapped, init_lora_weights=False)
    state = {n: t for n, t in ScoreNetwork(model, adapter="fake").state_dict().items() if t.numel()}
    theirs = get_peft_model_state_dict(model, adapter_name="fake")
    assert {n.removeprefix("base_model.model."): t for n, t in theirs.items()}.keys() == state.keys()
    for name, value in theirs.items():
        assert value.data_ptr() == state[name.removeprefix("base_model.model.")].data_ptr()
    prefix = "base_model.model." if wrapped else ""
    before = clone(state)
    set_peft_model_state_dict(model, {prefix + n: t + 1 for n, t in state.items()}, adapter_name="teacher")
    written = {n: t for n, t in ScoreNetwork(model, adapter="teacher").state_dict().items() if t.numel()}
    assert difference(written, {n: t + 1 for n, t in before.items()}) == []


def test_plain_and_wrapped_compiled_and_nested_networks_have_one_identity():
    base = Eps()
    plain = adapted("fake", base=copy.deepcopy(base))
    wrapped = adapted("fake", base=copy.deepcopy(base), wrapped=True)
    roles = [
        ScoreNetwork(plain, adapter="teacher"),
        ScoreNetwork(wrapped, adapter="teacher"),
        ScoreNetwork(torch.compile(wrapped, backend="eager"), adapter="teacher"),
        ScoreNetwork(nn.ModuleDict({"unet": wrapped}), prefix="unet", adapter="teacher"),
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
    net = ScoreNetwork(adapted("fake", base=base), adapter="fake")
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    assert base.packed.tolist() == [1] * 5


REFUSED = {
    "no such adapter": (lambda: adapted("fake"), "no LoRA adapter 'fak'.*add_adapter"),
    "no adapters at all": (Eps, r"no LoRA adapter 'fak' in Eps, which has \[\]"),
    "DoRA": (lambda: inject_only(use_dora=True), "lora_magnitude_vector.*leave use_dora"),
    "bias": (lambda: inject_only(bias="all"), "trains the base"),
    "PiSSA": (lambda: inject_only(init_lora_weights="pissa"), "changes the base"),
    "modules to save": (lambda: inject_only(target_modules=["0"], modules_to_save=["4"]), "copies of whole layers"),
    "merged": (lambda: merged(), "unmerge_adapter"),
    "another adapter that trains the base": (lambda: adapted_beside(bias="all"), "beside 'student'.*trains the base"),
    "the meta device": (lambda: adapted("fak", base=Eps().to("meta")), "on the meta device"),
}


def inject_only(**options):
    return get_peft_model(Eps(), config(**options), "fak")


def adapted_beside(**options):
    model = adapted("fak")
    inject(model, "student", **options)
    return model


def merged():
    model = get_peft_model(Eps(), config(init_lora_weights=False), "fak")
    model.merge_adapter()
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_than_its_matrices_is_refused_with_the_cure(case):
    make, reason = REFUSED[case]
    with pytest.raises(RoleError, match=re.compile(reason, re.DOTALL)):
        ScoreNetwork(make(), adapter="fak")


def test_an_adapter_of_another_kind_is_refused():
    model = get_peft_model(Eps(), peft.LoHaConfig(r=2, target_modules=TARGETS), "fake")
    with pytest.raises(RoleError, match="no LoRA adapter"):
        ScoreNetwork(model, adapter="fake")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"r": 8, "lora_alpha": 16}, r"lora_A.weight of shape \(4, 3\).*\(8, 3\).*lora.add_teacher"),
        ({"target_modules": ["0", "2"]}, "different targets.*lora.add_teacher"),
        ({"lora_alpha": 16}, "targets or scales"),
        ({"use_rslora": True}, "targets or scales"),
    ],
    ids=["rank", "targets", "alpha", "rslora"],
)
def test_two_adapters_that_do_not_fit_stop_before_the_first_step(tmp_path, options, reason):
    run = LoraRun()
    inject(run.model, "odd", **options)
    roles = run.roles() | {"teacher": run.adapter("odd")}
    with pytest.raises(MismatchError, match=re.compile(reason, re.DOTALL)):
        disback.attach(**roles, path=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("role", ["generator_optimizer", "fake_score_optimizer"])
def test_an_optimizer_that_would_train_the_base_is_refused(tmp_path, role):
    run = LoraRun()
    bias = run.model.body[0].base_layer.bias.requires_grad_(False)
    weights = [*run.parameters("fake" if role == "fake_score_optimizer" else "student"), bias]
    roles = run.roles() | {role: torch.optim.Adam(weights)}
    disback.attach(**roles, path=tmp_path / "frozen").detach()  # without gradients it stands still
    bias.requires_grad_(True)
    with pytest.raises(RoleError, match="steps the base of the adapters"):
        disback.attach(**roles, path=tmp_path / "trained")


@pytest.mark.parametrize("whole", ["teacher", "fake_score"])
def test_an_adapter_and_a_whole_network_are_refused(tmp_path, whole):
    run = LoraRun()
    with pytest.raises(MismatchError, match=r"one that is a whole network.*lora\.add_teacher"):
        disback.attach(**run.roles() | {whole: Eps()}, path=tmp_path)


def test_a_rank_stabilised_adapter_with_bias_and_dropout_works(tmp_path):
    run = LoraRun()
    run.model = adapted("fake", "student", use_rslora=True, lora_bias=True, lora_dropout=0.3)
    run.teacher, run.fake_score = Under(run.model, "teacher"), Under(run.model, "fake")
    run.optimizer_f = torch.optim.Adam(run.parameters("fake"), lr=1e-2)
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="ramp:3") as handle:
        run.steps(9)
        assert handle.phase == "done"
    assert torch.equal(run.teacher(X_T, SIGMA), Under(run.model, None)(X_T, SIGMA))


def test_a_standalone_recording_of_an_adapter_is_refused_with_the_cure(tmp_path):
    run = LoraRun()
    with pytest.raises(OptionError, match="fake_step that trains that adapter"):
        disback.record(run.adapter("teacher"), sample=lambda: X_T, loss=lambda s, x: s(x, SIGMA).sum(), path=tmp_path)


# -- both stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_base_is_bit_equal_throughout_and_the_teacher_comes_back(tmp_path, wrapped, shared):
    run = LoraRun(wrapped=wrapped, shared=shared)
    base, bare = lora.base_checksum(run.model), Under(run.model, None)(X_T, SIGMA)
    node_0, moved = clone(run.adapter("teacher").state_dict()), []
    with disback.attach(**run.roles(), path=tmp_path, record=6, every=2, schedule="fixed:1,2") as handle:
        for _ in range(12):
            run.step()
            assert lora.base_checksum(run.model) == base
            assert torch.equal(Under(run.model, None)(X_T, SIGMA), bare)
            moved.append((handle.phase, handle.position, torch.equal(run.teacher(X_T, SIGMA), bare)))
        assert "LoRA 'teacher' on" in repr(handle)
    assert [position for phase, position, _ in moved if phase != "recording"] == [2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert all(is_bare is (position == 0) for _, position, is_bare in moved)
    assert difference(run.adapter("teacher").state_dict(), node_0) == []
    path = disback.DegradationPath(tmp_path)
    assert all(node.codec_error is not None and node.codec_error < 0.05 for node in path.nodes)
    path.verify()


def test_nodes_are_the_fake_scores_adapters_and_a_teacher_on_one_scores_as_it_did(tmp_path):
    run, outputs = LoraRun(), []
    run.adapter("fake").load_state_dict(run.adapter("teacher").state_dict())

    def step():
        run.fake_step()
        outputs.append(run.fake_score(X_T, SIGMA).detach())

    teacher, fake = run.adapter("teacher"), run.adapter("fake")
    path = disback.record(teacher, fake, step, path=tmp_path, iterations=6, every=2, codec="exact")
    for index, wanted in ((1, outputs[1]), (2, outputs[3]), (3, outputs[5])):
        teacher.write(path.source(index))
        assert torch.equal(run.teacher(X_T, SIGMA), wanted), index


@given(t=st.floats(0.01, 0.99), node=st.integers(0, 1))
def test_between_two_nodes_the_weights_are_off_a_straight_line_by_the_product_of_the_steps(recorded, t, node):
    run, path = recorded
    a, b = path[node], path[node + 1]
    teacher = run.adapter("teacher")
    teacher.write(path.source(node + t))
    now = teacher.state_dict()
    for name in (n for n in a if n.endswith("lora_A.weight")):
        up = name.replace("lora_A", "lora_B")
        straight = torch.lerp(a[up] @ a[name], b[up] @ b[name], t)
        off = t * (1 - t) * (b[up] - a[up]) @ (b[name] - a[name])
        torch.testing.assert_close(now[up] @ now[name], straight - off, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    run = LoraRun()
    folder = tmp_path_factory.mktemp("path")
    path = disback.record(
        run.adapter("teacher"), run.adapter("fake"), run.fake_step, path=folder, iterations=20, every=10
    )
    return run, path


def test_a_run_resumes_bit_for_bit_in_another_process_with_other_seeds_for_its_adapters(tmp_path):
    options = {"record": 4, "every": 2, "schedule": "fixed:4"}
    for stop in (3, 6, 9):
        whole = LoraRun()
        with disback.attach(**whole.roles(), path=tmp_path / f"a{stop}", **options) as handle:
            whole.steps(stop)
            state, checkpoint = handle.state_dict(), whole.checkpoint()
            whole.steps(12 - stop)
            end = whole.checkpoint()
        again = LoraRun(adapter_seed=5)
        with disback.attach(**again.roles(), path=tmp_path / f"a{stop}", **options) as handle:
            again.load(checkpoint)
            handle.load_state_dict(state)
            again.steps(12 - stop)
            assert difference(again.checkpoint(), end) == [], stop


def test_a_path_fits_every_run_on_its_base_and_no_other(tmp_path):
    options = {"path": tmp_path, "record": 4, "every": 2, "schedule": "fixed:4"}
    first = LoraRun()
    with disback.attach(**first.roles(), **options):
        first.steps(5)
    other_seed = LoraRun(adapter_seed=3, wrapped=True)
    with disback.attach(**other_seed.roles(), **options) as handle:
        assert (handle.phase, handle.position) == ("backtracking", 1.0)
    with pytest.raises(PathError, match="another teacher"):
        disback.attach(**LoraRun(base_seed=1).roles(), **options)
    with pytest.raises(MismatchError, match="on base"):
        LoraRun(base_seed=1).adapter("teacher").load_state_dict(disback.DegradationPath(tmp_path)[1])


def test_record_0_changes_nothing_bit_for_bit():
    plain, attached = LoraRun(shared=True), LoraRun(shared=True)
    plain.steps(6)
    with disback.attach(**attached.roles(), path=None, record=0):
        attached.steps(6)
    assert difference(attached.checkpoint(), plain.checkpoint()) == []


# -- on two ranks -----------------------------------------------------------------------------------------------------


def on_a_rank(folder):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    run = LoraRun()
    model = DistributedDataParallel(run.model)
    roles = {name: ScoreNetwork(model, adapter=key) for name, key in (("teacher", "teacher"), ("fake_score", "fake"))}
    with disback.attach(**run.roles() | roles, path=folder, record=4, every=2, schedule="ramp:3") as handle:
        run.steps(8)
    said = [handle.phase, run.adapter("teacher").fingerprint(), run.adapter("fake").fingerprint()]
    for cut in (fully_shard, fsdp1):
        with pytest.raises(RoleError) as caught:
            ScoreNetwork(cut(adapted("fake")), adapter="fake")
        said.append(caught.value.expected)
    return said


def test_ranks_with_one_base_each_walk_together_and_a_base_cut_by_fsdp_is_refused(nursery, tmp_path):
    first, second = returned(nursery.play(on_a_rank, 2, str(tmp_path)))
    assert first == second
    assert (first[0], set(first[3:])) == ("done", {"a base that is whole on each process, as it is frozen"})


# -- compiled ---------------------------------------------------------------------------------------------------------

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def plane():
    return adapted("fake"), (X_T, SIGMA)


def unet():
    model = UNet2DConditionModel(**UNET)
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
        with lora.under(network, adapter):
            found = network(*inputs)
        return getattr(found, "sample", found)

    teacher, fake = ScoreNetwork(compiled, adapter="teacher"), ScoreNetwork(compiled, adapter="fake")
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

"""Networks as people have them: complex and custom weights, normalised ones, running statistics, wrappers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.convergence import FitDetector
from disback_plugin.errors import OptionError, PathError, RoleError, StateError
from disback_plugin.weights.modules import unwrap
from disback_plugin.weights.network import ScoreNetwork

PLAN = {"record": 6, "every": 3, "schedule": "ramp:4"}


class Loop(Run):
    """The loop of `worlds` with any network of two dimensions."""

    def __init__(self, teacher, fake_score=None):
        super().__init__()
        self.teacher, self.fake_score = teacher, fake_score or copy.deepcopy(teacher)
        self.optimizer_f = torch.optim.Adam(self.fake_score.parameters(), lr=1e-2)

    dtype = torch.float32


class Given(nn.Module):
    """A score network around any network from three to two numbers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x_t, sigma):
        return self.net(torch.cat([x_t, sigma.expand(len(x_t), 1)], dim=1))


def run_whole(loop, path, **more):
    """Run both stages to their end; return the path and the teacher at each position."""
    before, seen = clone(ScoreNetwork(loop.teacher).state_dict()), {}
    with disback.attach(**loop.roles(), path=path, **PLAN | more) as handle:
        for _ in range(12):
            loop.step()
            seen[handle.position] = clone(ScoreNetwork(loop.teacher).state_dict())
        assert handle.phase == "done"
        assert difference(clone(ScoreNetwork(loop.teacher).state_dict()), before) == []
    return handle.path, seen


# -- complex weights ---------------------------------------------------------------------------------------------------


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        self.out = nn.Linear(4, 2)

    def forward(self, x_t, sigma):
        spectrum = torch.fft.rfft(x_t, n=2) @ self.weight
        return self.out(torch.cat([torch.view_as_real(spectrum).flatten(1)], dim=1)) * sigma


@pytest.mark.parametrize("codec", ["int8", "exact"])
def test_complex_weights_are_recorded_measured_and_interpolated(tmp_path, codec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path, seen = run_whole(Loop(Spectral()), tmp_path / "path", codec=codec)
    path.verify()
    with_halves = [p for p in seen if p % 1 and p < 1]
    low, high = path[0]["weight"], path[1]["weight"]
    for position in with_halves:
        assert torch.allclose(seen[position]["weight"], low + position * (high - low), atol=1e-6)
    changes = [high[n] - low[n] for low, high in [(path[0], path[1])] for n in ("weight", "out.weight", "out.bias")]
    expected = sum(float(t.abs().square().sum()) for t in changes) ** 0.5
    assert path.nodes[0].delta_norm == pytest.approx(expected, rel=1e-2 if codec == "int8" else 1e-5)


def test_both_halves_of_a_complex_gradient_are_compared():
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    fit = FitDetector(ScoreNetwork(net))
    for gradient in (1 + 1j, 1 - 1j, -1 + 1j):
        net.weight.grad = torch.full((2,), gradient)
        fit.observe()
    assert fit.cosines() == pytest.approx([0.0, -1.0], abs=1e-6)


def test_a_conjugate_view_is_a_gradient_like_any_other():
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    fit = FitDetector(ScoreNetwork(net))
    for _ in range(2):
        net.weight.grad = torch.full((2,), 1 + 1j).conj()
        fit.observe()
    assert fit.cosines() == pytest.approx([1.0])


def test_nan_in_a_complex_teacher_is_refused(tmp_path):
    loop = Loop(Spectral())
    with torch.no_grad():
        loop.teacher.weight[0, 0] = complex(0, torch.nan)
    with pytest.raises(disback.DisbackError, match="NaN in weight"):
        disback.attach(**loop.roles(), path=tmp_path / "path", **PLAN)


# -- parameters of other classes ---------------------------------------------------------------------------------------


class Tagged(nn.Parameter):
    """A dense parameter that carries a note, as those of model-parallel libraries do."""

    tag = "column"


class Named(torch.Tensor):
    """A dense tensor class, which its operations return."""


class Packed(torch.Tensor):
    """A tensor without memory of its own, as quantised ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Packed(torch.zeros(2, 2))


@pytest.mark.parametrize("make", [Tagged, lambda t: nn.Parameter(t.as_subclass(Named))], ids=["parameter", "tensor"])
def test_dense_parameters_of_other_classes_are_taken(tmp_path, make):
    teacher, fake_score = (Given(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))) for _ in range(2))
    fake_score.load_state_dict(teacher.state_dict())
    for network in (teacher, fake_score):
        network.net[0].weight = make(network.net[0].weight.detach())
    loop, net = Loop(teacher, fake_score), teacher.net
    kind = type(net[0].weight)
    path, _ = run_whole(loop, tmp_path / "path")
    assert type(net[0].weight) is kind
    assert type(path[1]["net.0.weight"]) is torch.Tensor
    path.verify()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", ["script", "trace", "a part", "frozen", "fake score"])
def test_torchscript_is_refused_by_name_and_nothing_is_left(tmp_path, compiled):
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).eval()
    other, generator = copy.deepcopy(net), nn.Linear(2, 2)
    scripts = {
        "trace": lambda: torch.jit.trace(net, torch.zeros(1, 2)),
        "a part": lambda: nn.Sequential(torch.jit.script(net[0]), net[1]),
        "frozen": lambda: torch.jit.freeze(torch.jit.script(net)),
    }
    teacher = scripts.get(compiled, lambda: torch.jit.script(net))()
    if compiled == "fake score":
        teacher, other = other, teacher
    generator_optimizer, fake_score_optimizer = (torch.optim.Adam(n.parameters()) for n in (generator, other))
    with pytest.raises(RoleError, match=r"Module, whose forward and weights TorchScript.*torch\.jit\.script"):
        disback.attach(
            teacher=teacher,
            fake_score=other,
            generator_optimizer=generator_optimizer,
            fake_score_optimizer=fake_score_optimizer,
            path=tmp_path / "path",
        )
    assert not generator_optimizer._optimizer_step_pre_hooks
    assert not (tmp_path / "path").exists()


def test_a_packed_parameter_is_refused():
    net = nn.Linear(2, 2)
    net.weight = nn.Parameter(Packed(torch.zeros(2, 2)), requires_grad=False)
    with pytest.raises(RoleError, match=r"quantised \((Packed|Parameter)"):
        ScoreNetwork(net)


# -- normalised weights ------------------------------------------------------------------------------------------------

NORMS = {
    "weight_norm hooks": nn.utils.weight_norm,
    "weight_norm parametrization": parametrizations.weight_norm,
    "spectral_norm hooks": nn.utils.spectral_norm,
    "spectral_norm parametrization": parametrizations.spectral_norm,
}
deprecated = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


def normalised(norm):
    torch.manual_seed(0)
    return Given(nn.Sequential(norm(nn.Linear(3, 8)), nn.Tanh(), norm(nn.Linear(8, 2))))


def singular_vectors(state):
    return [n for n in state if n.endswith(("._u", "._v")) or (n.endswith(("_u", "_v")) and f"{n[:-2]}_orig" in state)]


@deprecated
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_normalised_weights_move_and_singular_vectors_stay_whole(tmp_path, norm):
    teacher = normalised(norm).eval()
    fake_score = normalised(norm)
    fake_score.load_state_dict(teacher.state_dict())
    loop = Loop(teacher, fake_score)
    path, seen = run_whole(loop, tmp_path / "path")
    vectors = singular_vectors(path[0])
    assert len(vectors) == (4 if "spectral" in str(norm) else 0)
    between = {position: state for position, state in seen.items() if position % 1}
    assert between
    for position, state in between.items():
        nearer = path[round(position)]
        assert [name for name in vectors if not torch.equal(state[name], nearer[name])] == []
        moved = [n for n in state if n not in vectors and not torch.equal(state[n], nearer[n])]
        assert moved, "the weights themselves are interpolated"


@deprecated
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_copy_of_a_normalised_teacher_is_recorded(tmp_path, norm):
    teacher = normalised(norm)
    teacher(torch.zeros(2, 2), torch.ones(1, 1))  # from now on a hook's weight has a graph
    before = clone(dict(teacher.state_dict()))

    def loss(net, x_0):
        return (net(x_0 + torch.randn_like(x_0), torch.ones(1, 1)) - x_0).square().mean()

    def sample():
        return torch.randn(4, 2)

    path = disback.record(teacher, sample=sample, loss=loss, path=tmp_path, iterations=2, every=1)
    assert len(path) == 3
    assert difference(dict(teacher.state_dict()), before) == []
    assert path[2].keys() == before.keys()


def test_a_teacher_that_cannot_be_copied_is_refused_before_anything_is_written(tmp_path):
    teacher = nn.Linear(2, 2)
    teacher.stream = open(__file__)  # noqa: SIM115
    with teacher.stream, pytest.raises(OptionError, match="cannot be copied"):
        disback.record(teacher, sample=lambda: torch.zeros(1, 2), loss=lambda n, x: n(x).sum(), path=tmp_path / "path")
    assert not (tmp_path / "path").exists()


class Forced(nn.Linear):
    """Normalises its own weights in each forward in training mode, as the layers of EDM2 do."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.weight / self.weight.norm(dim=1, keepdim=True))
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_that_normalises_its_own_weights_moves_in_eval_mode_and_is_refused_in_training_mode(
    tmp_path, training
):
    teacher = Given(nn.Sequential(Forced(3, 8), nn.Tanh(), nn.Linear(8, 2)))
    teacher(torch.zeros(1, 2), torch.ones(1, 1))
    loop = Loop(teacher)
    teacher.train(training)
    if not training:
        run_whole(loop, tmp_path / "path")
        return
    original = clone(dict(teacher.state_dict()))
    refused = pytest.raises(StateError, match=r"a normalisation in training mode does, call teacher.eval\(\)")
    with disback.attach(**loop.roles(), path=tmp_path / "path", **PLAN), refused:
        loop.steps(12)
    assert difference(clone(dict(teacher.state_dict())), original) == []


def test_a_fake_score_that_normalises_its_own_weights_is_recorded_as_it_is(tmp_path):
    teacher = Given(nn.Sequential(Forced(3, 8), nn.Tanh(), nn.Linear(8, 2)))
    fake_score = copy.deepcopy(teacher)
    path, _ = run_whole(Loop(teacher.eval(), fake_score), tmp_path / "path", codec="exact")
    norms = path[1]["net.0.weight"].norm(dim=1)
    assert (norms - 1).abs().max() < 0.1, "the forward before the last step normalised them"


# -- running statistics ------------------------------------------------------------------------------------------------


def _statistics(teacher):
    teacher.train()(torch.randn(4, 2), torch.ones(1, 1))


def _weight(teacher):
    with torch.no_grad():
        teacher.left.weight[0, 0] += 1


def _cast(teacher):
    teacher.to(torch.bfloat16)


def _name(teacher):
    teacher.extra = nn.Parameter(torch.zeros(1))


DIFFERENCES = {
    "statistics": (_statistics, r"other buffers \['inner.1.num_batches_tracked', 'inner.1.running_mean'", "eval"),
    "a weight": (_weight, r"other weights \['left.weight'\]", "load the teacher's own weights"),
    "a dtype": (_cast, r"of torch.bfloat16 and \(\d+,\) instead of torch.float32", "load the teacher's own weights"),
    "a name": (_name, "1 names that only one of them has, as extra", "load the teacher's own weights"),
}


@pytest.mark.parametrize(("change", "found", "cure"), DIFFERENCES.values(), ids=DIFFERENCES)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_the_error_says_how_another_teacher_differs(tmp_path, change, found, cure):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", **PLAN):
        run.steps(8)
    path = disback.DegradationPath(tmp_path / "path")
    change(run.teacher)
    with pytest.raises(PathError, match=found) as caught:
        path.verify_teacher(ScoreNetwork(run.teacher).full_state())
    assert cure in caught.value.cure


# -- wrappers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["lightning.fabric.wrappers", "lightning_fabric.wrappers"])
def test_a_network_is_seen_inside_fabrics_wrapper(package):
    def init(self, inner):
        nn.Module.__init__(self)
        self._forward_module = self._original_module = inner

    plain = nn.Linear(2, 2)
    wrapper = type("_FabricModule", (nn.Module,), {"__module__": package, "__init__": init})
    assert unwrap(wrapper(nn.DataParallel(plain))) is plain
    assert ScoreNetwork(wrapper(plain)).fingerprint() == ScoreNetwork(plain).fingerprint()

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin.errors import OptionError
from disback_plugin.metrics import frechet_distance


def _features(seed, rows, columns):
    stream = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=stream, dtype=torch.float64)
    return torch.randn(rows, columns, generator=stream, dtype=torch.float64) @ mixing


@given(seed=st.integers(0, 2**31), columns=st.integers(1, 8))
def test_it_is_symmetric_zero_on_itself_and_blind_to_rotation(seed, columns):
    a, b = _features(seed, 50, columns), _features(seed + 1, 60, columns)
    rotation = torch.linalg.qr(_features(seed + 2, columns, columns))[0]
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_it_equals_its_closed_form_on_diagonal_gaussians():
    def exact(mean, std):
        # Four points with this very mean and covariance diag(std^2).
        corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.tensor(mean) + corners * torch.tensor(std, dtype=torch.float64) * (3 / 4) ** 0.5

    found = frechet_distance(exact([0.0, 1.0], [1.0, 2.0]), exact([3.0, 1.0], [0.5, 5.0]))
    assert found == pytest.approx(9 + 0.5**2 + 3**2, rel=1e-6)


@pytest.mark.parametrize("shapes", [((5, 2), (5, 3)), ((1, 2), (5, 2)), ((5,), (5,))], ids=str)
def test_shapes_that_do_not_fit_are_named(shapes):
    with pytest.raises(OptionError, match="features of shapes"):
        frechet_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_broken_features_are_refused():
    with pytest.raises(OptionError, match="not finite"):
        frechet_distance(torch.tensor([[0.0], [float("nan")]]), torch.zeros(2, 1))

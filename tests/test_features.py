"""Images to features: no download here, so that every named model has random weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from disback_plugin.errors import OptionError
from disback_plugin.metrics import _timm, features, frechet_distance

NAME = "resnet10t"


@pytest.fixture(scope="module")
def extract():
    return features(NAME, pretrained=False, batch_size=4)


def images(count, channels=3, size=32):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(count)) * 2 - 1


def test_a_named_model_takes_images_of_any_size_and_colour(extract):
    for channels, size in ((1, 8), (3, 40)):
        found = extract(images(5, channels, size))
        assert found.shape == (5, 512)
        assert found.isfinite().all()
        assert not found.requires_grad


def test_a_named_model_gets_images_as_in_its_training():
    net, prepare = _timm(NAME, False, "cpu")
    dark, bright = prepare(torch.stack([torch.full((1, 8, 8), -1.0), torch.full((1, 8, 8), 1.0)]))
    mean, std = torch.tensor(net.pretrained_cfg["mean"]), torch.tensor(net.pretrained_cfg["std"])
    assert dark.shape == net.pretrained_cfg["input_size"]
    torch.testing.assert_close(dark.mean((1, 2)), -mean / std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bright.mean((1, 2)), (1 - mean) / std, atol=1e-5, rtol=1e-5)


def test_the_distance_of_features_tells_two_sets_apart(extract):
    a, b, dark = images(24), images(25), images(26) * 0.1 - 0.8
    near, far = (frechet_distance(extract(a), extract(other)) for other in (b, dark))
    assert 0 < near < far


def test_batches_do_not_matter_and_two_random_models_are_the_same(extract):
    other = features(NAME, pretrained=False, batch_size=5)
    torch.testing.assert_close(other(images(9)), extract(images(9)), rtol=1e-4, atol=1e-5)


def test_no_global_random_number_is_drawn(global_random_state):
    features(NAME, pretrained=False)(images(2))


def test_a_custom_network_takes_the_images_unchanged():
    net = nn.Conv2d(1, 2, 3).eval()
    batch = images(3, 1, 4)
    torch.testing.assert_close(features(net, batch_size=2)(batch), net(batch).detach().flatten(1))


def test_wrong_use_is_named():
    with pytest.raises(OptionError, match="no_such_model"):
        features("no_such_model")
    with pytest.raises(OptionError, match="training mode"):
        features(nn.Dropout())
    with pytest.raises(OptionError, match=r"torch\.uint8"):
        features(NAME, pretrained=False)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(OptionError, match="batch_size"):
        features(NAME, batch_size=0)

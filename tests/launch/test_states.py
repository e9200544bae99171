"""The state that belongs to a loaded checkpoint, told by the weights of s_phi and of the generator."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ranks import returned
from torch import nn

from disback_plugin.launch.states import SavedStates
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.weights.network import ScoreNetwork


def nets():
    torch.manual_seed(3)
    return [ScoreNetwork(nn.Linear(2, 2), role=role) for role in ("fake score", "generator")]


def train(network):
    with torch.no_grad():
        network.first_parameter().add_(1)


def save(states, fake_score, generator, updates, phase="backtracking", path=""):
    marks = {"fake_score": fake_score.local_checksum(), "generator": generator.local_checksum()}
    states.append({"phase": phase, "generator_updates": updates, "path": path} | marks)
    return copy.deepcopy((fake_score, generator))


@pytest.mark.parametrize("trained", ["generator", "fake score", "both"])
@pytest.mark.parametrize("loaded", [0, 1, 2])
def test_checkpoints_between_which_one_network_was_trained_are_told_apart(trained, loaded, tmp_path):
    states, (fake_score, generator) = SavedStates(tmp_path / "path"), nets()
    checkpoints = []
    for updates in (1, 2, 3):
        checkpoints.append(save(states, fake_score, generator, updates))
        for network in (fake_score, generator):
            if trained in ("both", network.role):
                train(network)
    state, restored = states.find(*checkpoints[loaded])
    assert restored
    assert state["generator_updates"] == loaded + 1


def test_a_state_of_an_earlier_version_is_told_by_the_fake_score_alone(tmp_path):
    states, (fake_score, generator) = SavedStates(tmp_path / "path"), nets()
    states.append(
        {"phase": "backtracking", "generator_updates": 4, "path": "", "fake_score": fake_score.local_checksum()}
    )
    train(generator)
    assert states.find(fake_score, generator)[0]["generator_updates"] == 4
    train(fake_score)
    assert states.find(fake_score, generator) == (None, True)


@pytest.mark.parametrize(
    ("phase", "trained", "path", "found"),
    [
        ("backtracking", True, "", True),
        ("done", True, "", True),
        ("recording", True, "", False),
        ("backtracking", False, "", False),  # at a learning rate of 0
        ("backtracking", True, "another path's", False),
    ],
)
def test_a_generator_that_was_restored_alone_goes_on_where_it_was_trained(phase, trained, path, found, tmp_path):
    states, (fake_score, generator) = SavedStates(tmp_path / "path"), nets()
    recorded = DegradationPath.create(
        tmp_path / "path", fake_score.state_dict(), Recording(1, 1), generator=generator.fingerprint()
    )
    if trained:
        train(generator)
    save(states, fake_score, generator, 4, phase, path or recorded.identity)
    train(fake_score)
    state, restored = states.find(fake_score, generator)
    assert (state is not None) is found
    assert restored is not found
    if found:
        assert state["fake_score"] == fake_score.local_checksum(), "the state holds for the present weights"


def test_a_generator_that_no_role_may_have_is_not_asked(tmp_path):
    states, (fake_score, generator) = SavedStates(tmp_path / "path"), nets()
    save(states, fake_score, generator, 4)
    assert states.find(fake_score, None)[0]["generator_updates"] == 4


def on_fsdp1(folder, saved):
    from torch.distributed.fsdp import FullyShardedDataParallel

    plain = [network.modules()[""] for network in nets()]
    networks = [
        ScoreNetwork(FullyShardedDataParallel(each, use_orig_params=True, device_id=torch.device("cpu")))
        for each in plain
    ]
    states = SavedStates(Path(folder) / "path")
    if saved:
        marks = {name: net.local_checksum() for name, net in zip(("fake_score", "generator"), networks, strict=True)}
        if torch.distributed.get_rank() == 0:
            states.append({"phase": "backtracking", "generator_updates": 7, "path": "p"} | marks)
    found, _ = states.find(*networks)
    train(networks[0])
    changed, _ = states.find(*networks)
    return [found is not None, changed is not None, states.file.read_text().count("of rank 0 of 2")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_fsdp1_finds_its_state_again_on_the_same_number_of_ranks(nursery, tmp_path):
    for saved in (True, False):
        assert returned(nursery.play(on_fsdp1, 2, str(tmp_path), saved)) == [[True, False, 2]] * 2
    assert returned(nursery.play(on_fsdp1, 3, str(tmp_path), False)) == [[False, False, 2]] * 3

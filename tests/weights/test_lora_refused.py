"""Adapters that are more than their matrices, that do not fit each other or move their base are refused with a cure."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from lora_worlds import SIGMA, TARGETS, X_T, Eps, LoraRun, adapted, config, inject
from peft import get_peft_model

import disback_plugin as disback
from disback_plugin.errors import MismatchError, OptionError, RoleError
from disback_plugin.weights.network import ScoreNetwork

REFUSED = {
    "no such adapter": (lambda: adapted("fake"), "no LoRA adapter 'fak'.*add_adapter"),
    "no adapters at all": (Eps, r"no LoRA adapter 'fak' in Eps, which has \[\]"),
    "DoRA": (lambda: inject_only(use_dora=True), "lora_magnitude_vector.*omit use_dora"),
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
    try:
        inject(model, "student", **options)
    except ValueError as error:
        pytest.skip(f"this peft refuses it itself: {error}")
    return model


def merged():
    model = get_peft_model(Eps(), config(init_lora_weights=False), "fak")
    model.merge_adapter()
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_is_more_than_its_matrices_is_refused_with_the_cure(case):
    make, reason = REFUSED[case]
    with pytest.raises(RoleError, match=re.compile(reason, re.DOTALL)):
        ScoreNetwork(make(), lora_adapter="fak")


def test_an_adapter_of_another_kind_is_refused():
    model = get_peft_model(Eps(), peft.LoHaConfig(r=2, target_modules=TARGETS), "fake")
    with pytest.raises(RoleError, match="no LoRA adapter"):
        ScoreNetwork(model, lora_adapter="fake")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"r": 8, "lora_alpha": 16}, r"lora_A.weight of shape \(4, 3\).*\(8, 3\).*lora.add_teacher"),
        ({"target_modules": ["0", "2"]}, "'on base .*of the same targets and scales.*lora.add_teacher"),
        ({"lora_alpha": 16}, "'on base .*of the same targets and scales"),
        ({"use_rslora": True}, "'on base .*of the same targets and scales"),
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
    with pytest.raises(RoleError, match="steps the adapters' base model"):
        disback.attach(**roles, path=tmp_path / "trained")


@pytest.mark.parametrize("whole", ["teacher", "fake_score"])
def test_an_adapter_and_a_whole_network_are_refused(tmp_path, whole):
    run, other = LoraRun(), Eps()
    other.body[0].bias.data += 1
    with pytest.raises(
        MismatchError, match=r"differs from the base|without 7 keys.*lora\.add_teacher.*lora_adapter=.* for both roles"
    ):
        disback.attach(**run.roles() | {whole: other}, path=tmp_path)


def test_a_standalone_recording_of_an_adapter_is_refused_with_the_cure(tmp_path):
    run = LoraRun()
    with pytest.raises(OptionError, match="fake_score and fake_step"):
        disback.record(run.adapter("teacher"), sample=lambda: X_T, loss=lambda s, x: s(x, SIGMA).sum(), path=tmp_path)

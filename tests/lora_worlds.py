"""Networks that are adapters of one base, and a run of them."""

from __future__ import annotations

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from worlds import Run, clone

from disback_plugin import lora
from disback_plugin.weights.network import ScoreNetwork

TARGETS = ["0", "2", "4"]
X_T, SIGMA = torch.linspace(-2, 2, 10).view(5, 2), torch.tensor([0.5])


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


def adapted(*names, wrapped=False, base=None, **options):
    """A base with adapters, as peft injects them or inside a PeftModel, and a teacher like the first of them."""
    base = Eps() if base is None else base
    model = get_peft_model(base, config(**options), names[0]) if wrapped else base
    for name in names[wrapped:]:
        (model.add_adapter(name, config(**options)) if wrapped else inject(base, name, **options))
    lora.add_teacher(model, like=names[0])
    return model


def inject(model, name, **options):
    peft.inject_adapter_in_model(config(**options), model, name)


def active_adapters(model):
    """The names of the adapters that a forward would use now; [] for the bare base."""
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    return [] if layer.disable_adapters else list(layer.active_adapters)


class Under:
    """The base under one adapter, to be called as a network of its own."""

    def __init__(self, model, adapter):
        self.model, self.adapter = model, adapter

    def __call__(self, *args):
        with lora.use_adapter(self.model, self.adapter):
            return self.model(*args)


class LoraRun(Run):
    """`Run` on one base: teacher, fake score and, with `shared`, the student are adapters of it."""

    dtype = torch.float32

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

    def parameters(self, name):
        found = [p for n, p in self.model.named_parameters() if f".{name}." in n]
        for parameter in found:
            parameter.requires_grad_(True)
        return found

    def adapter(self, name):
        return ScoreNetwork(self.model, lora_adapter=name)

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


class Kinds(nn.Module):
    """Every kind of layer, one of them transposed as in GPT-2, and a head that the teacher may lack."""

    def __init__(self, head=False):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.words, self.conv, self.image = (
            nn.Embedding(7, 4),
            nn.Conv1d(4, 4, 1),
            nn.Conv2d(4, 6, (3, 1), padding=(1, 0)),
        )
        self.out, self.gpt = nn.Linear(6, 4, bias=False), Conv1D(5, 4)
        if head:
            self.head = nn.Linear(2, 2)

    def forward(self, index):
        x = self.conv(self.words(index).transpose(1, 2))
        return self.gpt(self.out(self.image(x.unsqueeze(-1)).squeeze(-1).transpose(1, 2)))


def bits(state):
    state = dict(state.state_dict()) if isinstance(state, nn.Module) else state
    return {name: tensor.contiguous().view(torch.uint8).tolist() for name, tensor in state.items()}

"""A folder that looks like site-packages, what third parties may leave in it, a run and a trainer beside it."""

from __future__ import annotations

import torch
from torch import nn
from worlds import Run, clone

import disback_plugin as disback
from disback_plugin.schedules import Fixed


def install(folder, name, source, *, group="disback.hooks", distribution=None):
    """Leave in a folder what pip leaves there: a module, and a distribution whose entry point names it."""
    distribution = distribution or f"disback-{name}"
    module = f"{distribution.replace('-', '_')}_{name}"
    (folder / f"{module}.py").write_text("from disback_plugin import Adapter, hookimpl\n" + source)
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
    return module


def found(plugins, name):
    (plugin,) = [plugin for plugin in plugins.list_plugins() if plugin.name == name]
    return plugin


KNOWS = """
@hookimpl
def disback_adapter(trainer):
    if isinstance(trainer, dict) and "s_theta" in trainer:
        return Adapter(trainer["s_theta"], trainer["s_phi"], trainer["opt_g"], trainer["opt_f"])
"""

WELL = """
@hookimpl
def disback_after_node_swapped(position):
    pass
"""

# What a third party may do wrong before anything is called, and how that is named.
MISTAKES = {
    "raises": ("raise RuntimeError('no GPU here')", "RuntimeError: no GPU here"),
    "exits": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "imports": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("def", "SyntaxError: "),
    "misspelt": (
        "@hookimpl\ndef disback_after_node_swop(position): pass",
        "PluginValidationError: unknown hook 'disback_after_node_swop'",
    ),
    "argument": (
        "@hookimpl\ndef disback_log(values, stp): pass",
        "PluginValidationError: Plugin '",
    ),
    "unmarked": ("def disback_log(values, step): pass", "ValueError: disback_log is not marked with @hookimpl"),
    "wrapper": (
        "@hookimpl(wrapper=True)\ndef disback_log(values):\n    return (yield)",
        "ValueError: disback_log is a wrapper, which a plug-in cannot be",
    ),
    "empty": ("", "ValueError: it implements no hook"),
}


def a_run(folder, steps=9, **options):
    """Everything that a run leaves: what it recorded, where it ended, and what its trainer would save."""
    run = Run()
    options = {"record": 4, "every": 2, "schedule": Fixed(2)} | options
    with disback.attach(**run.roles(), path=folder, **options) as handle:
        run.steps(steps)
        state = handle.state_dict()
    state.pop("fake_score")
    return state, run.checkpoint() | {"teacher": clone(dict(run.teacher.state_dict()))}


class Dmd2Trainer:
    """A stand-in with the names of DMD2's trainers (main/train_sd.py:229-260, main/sd_guidance.py:45-58)."""

    def __init__(self, wrapper=lambda module: module):
        self.run = Run()
        guidance = nn.Module()
        guidance.real_unet, guidance.fake_unet = self.run.teacher, self.run.fake_score
        guidance.cls_pred_branch = nn.Linear(2, 1)
        self.model = nn.Module()
        self.model.guidance_model = wrapper(guidance)
        self.model.feedforward_model = self.run.generator
        self.optimizer_generator = self.run.optimizer_g
        # The guidance optimizer steps the discriminator's head too.
        trained = [p for p in guidance.parameters() if p.requires_grad]
        self.optimizer_guidance = self.run.optimizer_f = torch.optim.AdamW(trained, lr=1e-2)

    def train(self, steps):
        for step in range(steps):
            if step % 2 == 0:  # dfake_gen_update_ratio = 2, the generator's turn first
                self.run.generator_step()
            # sd_unified_model.py:304-310 flips the flags of the whole guidance model, the teacher's with them
            self.model.guidance_model.requires_grad_(True)
            self.run.fake_step()

"""Test an adapter with `check_adapter`. Importing this module loads nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check_adapter(adapter: str, make_trainer: Callable[[], tuple[object, Callable[[], object]]]) -> None:
    """Check that DisBack works on a live trainer with the roles that an adapter returns. Call it in a test.

    Args:
        adapter: Name of the adapter in the entry-point group `disback.adapters`.
        make_trainer: Returns a new trainer, as small as you like, and a function that does one round of its loop. Each
            call must give the same run: seed whatever it draws from. Both networks and the generator must be trained
            within 20 rounds.

    Raises:
        DisbackError: If the adapter does not find the roles, or these roles cannot be used.
        AssertionError: If a run without recording differs from the plain run in a bit, the generator moves while
            recording, the nodes are not visited in order, the teacher does not hold the node of its position, or the
            teacher is not itself again at the end.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> def make():
        ...     torch.manual_seed(0)
        ...     trainer = ...  # build it
        ...     return trainer, trainer.train_one_step
        >>> check_adapter("dmd2", make)  # doctest: +SKIP
    """
    import tempfile
    from contextlib import nullcontext

    import disback_plugin as disback
    from disback_plugin.loop.optimizers import parameters, unwrap
    from disback_plugin.weights.tensors import checksum

    def parts(trainer: object) -> tuple[disback.ScoreNetwork, disback.ScoreNetwork, dict[str, Any]]:
        roles = disback.plugins.find_adapter(trainer, adapter)
        optimizers = unwrap(roles.generator_optimizer, role="generator_optimizer")
        generator = {str(index): tensor.detach() for index, tensor in enumerate(parameters(optimizers))}
        given: Any = roles.fake_score  # the teacher where there is none
        teacher = disback.ScoreNetwork.of(roles.teacher, role="teacher")
        return teacher, teacher if given is None else disback.ScoreNetwork.of(given, role="fake score"), generator

    def run(attached: bool) -> str:
        trainer, step = make_trainer()
        teacher, fake_score, generator = parts(trainer)
        with disback.attach(trainer, adapter=adapter, record=0) if attached else nullcontext():
            for _ in range(20):
                step()
        return "".join(map(checksum, (teacher.state_dict(), fake_score.state_dict(), generator)))

    plain = run(attached=False)
    assert plain == run(attached=False), "make_trainer() does not give the same run twice: seed what it draws from"
    assert plain == run(attached=True), "a run with record=0 is not the trainer's own, bit for bit"

    trainer, step = make_trainer()
    teacher, _, generator = parts(trainer)
    original, still = teacher.checksum(), checksum(generator)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"record": 4, "every": 1, "codec": "exact", "schedule": "fixed:1,1,1"}
        visited: list[float] = []
        with disback.attach(trainer, adapter=adapter, path=folder, **options) as handle:
            for _ in range(400):
                if handle.phase == "recording" or handle.generator_updates == 0:
                    assert checksum(generator) == still, "the generator moves while recording: an optimizer is missing"
                elif not visited:
                    assert checksum(generator) != still, "the generator is not trained by its optimizer"
                if handle.phase != "recording" and handle.position not in visited[-1:]:
                    visited.append(handle.position)
                    node = checksum(disback.DegradationPath(folder)[int(handle.position)])
                    assert teacher.checksum() == node, f"the teacher is not node {handle.position:g}"
                if handle.phase == "done":
                    break
                step()
            assert visited == [3, 2, 1, 0], f"nodes were visited in the order {visited}, not 3, 2, 1, 0"
    assert teacher.checksum() == original, "the teacher is not itself again at the end"

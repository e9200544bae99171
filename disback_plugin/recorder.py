"""Updates of a network, counted and made into nodes: what every recording does, whoever steps the network."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from disback_plugin import distributed
from disback_plugin.convergence import EVERY, FitDetector
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["HASTE", "LEAST", "Recorder"]

logger = logging.getLogger(__name__)

# Fewer updates are no recording, however soon s' is fitted: a warm start of ten is worth its price (EVIDENCE.md).
LEAST = 10

# Until s' is fitted, a recording that ends then has so many times the learning rate, and takes half as long. What is
# left of the ten updates has the trainer's own (EVIDENCE.md).
HASTE = 2


class Recorder:
    """Turns updates of a network into nodes: call `update` after each of them.

    Args:
        path: An unfinished path; node files are added to it.
        network: s', the network that is fitted.
        training: Returns what the recording needs, beside the path, to go on from the current iteration bit for bit;
            None where the trainer's own checkpoint holds that.
        until_fitted: Whether to end as soon as the network is fitted (`convergence`), after ten updates or later.
        hastens: Whether the caller multiplies the learning rate of each update by `haste`.
        plugins: Who hears of the nodes.

    Attributes:
        hastens: As given.
        fit: What the gradients say of the fit.
        looked: Whether the gradients of the coming update were looked at.
    """

    def __init__(
        self,
        path: DegradationPath,
        network: ScoreNetwork,
        *,
        training: Callable[[], dict[str, Tensor]] | None = None,
        until_fitted: bool = False,
        hastens: bool = False,
        plugins: PluginManager | Sequence[object] = (),
    ) -> None:
        self.path, self.network, self._training = path, network, training
        self.fit, self._until_fitted = FitDetector(network), until_fitted
        self.hastens = hastens
        self._plugins = PluginManager.of(plugins)
        self.iteration = self._since = path.nodes[-1].iteration if path.nodes else 0
        self.looked = False
        self._told = 0  # cosines that the plug-ins know of
        self._losses: list[tuple[int, Tensor]] = []

    def start(self) -> None:
        """Write the last recorded node, the teacher at first, into the network.

        Raises:
            MismatchError: If the network's keys or shapes are not the teacher's. Then nothing was written.
            PathError: If the path is broken. Then nothing was written.
        """
        last = len(self.path) - 1
        distributed.on_every_rank(lambda: self.network.write(self.path.source(last)), "read the last node")

    @property
    def done(self) -> bool:
        """Whether node N is saved."""
        return self.iteration >= self.path.manifest.iterations

    @property
    def haste(self) -> int:
        """Factor on the learning rate of the next update."""
        known = self.path.manifest
        # What the path says may lie ahead, where the run goes on from an earlier checkpoint.
        fitted = known.fitted is not None and self.iteration >= known.fitted
        if fitted or self.done or not self.hastens:
            return 1
        if self.iteration or known.fitted is not None:
            return known.haste  # as it began, also where another schedule goes on with it
        return HASTE if self._until_fitted else 1

    def look(self) -> None:
        """Look at the gradients of an update, while they are there; `update` does so where nobody has."""
        known = self.path.manifest
        if not self.looked and known.fitted is None and known.ended is None:  # then nothing more is asked of them
            self.fit.observe()
        self.looked = True

    def update(self, loss: object = None) -> None:
        """Count one update of the network; save a node if it is due. After the last node nothing counts any more.

        Args:
            loss: Of this update, to be logged; what is no tensor of one element is nothing.

        Raises:
            PluginError: If a plug-in that was asked for raised. The node is saved.
        """
        if self.done:
            return
        iteration = self.iteration + 1
        self._keep(loss, iteration)
        self.look()
        self.looked = False
        if iteration == 1 and self.path.manifest.fitted is None and self.haste != self.path.manifest.haste:
            self.path.update_manifest(haste=self.haste)
        self._judge(iteration)
        due = self.path.manifest.due(iteration)
        if due:
            distributed.agree({"path": self.path.identity, "recording_iteration": iteration})
            training = None if self._training is None else self._training()
            self.path.append(
                self.network.full_state(),
                iteration=iteration,
                exactly=self.network.buffer_names(),
                training=training,
            )
            logger.info("recorded node %d at iteration %d", len(self.path) - 1, iteration)
        self.iteration = iteration  # only now: a node that could not be written is due again
        self._finish_if_done()
        if self.done or iteration % EVERY == 0:
            self._tell_losses()
        if self.done:
            self._tell()
            self._say_if_unfitted()
        if due:
            self._plugins.call("disback_after_node_recorded", path=self.path, node=self.path.nodes[-1])
        if self.done:
            self._plugins.call("disback_after_path_completed", path=self.path)

    def _judge(self, iteration: int) -> None:
        """See whether the network is fitted, and perhaps let the recording end for that."""
        known = self.path.manifest
        if known.ended is not None or iteration % EVERY:
            return
        fitted = known.fitted
        if fitted is None:
            fitted = iteration if distributed.on_main_process(self.fit.fitted_after) is not None else None
            self._tell()
        ended = iteration if self._until_fitted and fitted is not None and iteration >= LEAST else None
        if (fitted, ended) != (known.fitted, known.ended) and fitted is not None:
            self.path.update_manifest(fitted=fitted, ended=ended)

    def _keep(self, loss: object, iteration: int) -> None:
        if isinstance(loss, Tensor) and loss.numel() == 1 and distributed.is_main_process():
            self._losses.append((iteration, loss.detach().reshape(())))

    def _tell_losses(self) -> None:
        """Report the losses that were kept: one read of the device for several."""
        if self._losses:
            iterations, losses = zip(*self._losses, strict=True)
            self._losses.clear()
            for iteration, loss in zip(iterations, torch.stack(losses).tolist(), strict=True):
                values = {"disback/recording": iteration, "disback/loss": loss}
                self._plugins.call("disback_log", values=values, step=0)

    def resume(self, fit: Tensor) -> None:
        """Go on with the fit of an earlier process, whose weights the caller has restored."""
        self.fit.load_tensor(fit)
        self._told = len(self.fit.cosines())

    def _tell(self) -> None:
        """Report the cosines that have just been read from the device."""
        if not distributed.is_main_process():
            return
        cosines = self.fit.cosines()
        for i in range(self._told, len(cosines)):  # the first is between updates 1 and 2
            if math.isfinite(cosines[i]):
                values = {"disback/recording": i + 2, "disback/agreement": cosines[i]}
                self._plugins.call("disback_log", values=values, step=0)
        self._told = len(cosines)

    def _say_if_unfitted(self) -> None:
        known = self.path.manifest
        if known.fitted is not None or not distributed.is_main_process():
            return
        if self.iteration - self._since > EVERY and not any(map(math.isfinite, self.fit.cosines())):
            logger.warning(
                "no gradients of s' were seen at its %d updates, so that nobody knows whether it is fitted: "
                'schedule="auto" takes all of them for the time that this takes',
                self.iteration,
            )
        elif self._until_fitted:
            logger.warning(
                "s' was not seen to be fitted in its %d updates, and the walk takes as long as they did: is its "
                "learning rate still warming up? record at the rate to come, or with a larger record=",
                self.iteration,
            )

    def rewind(self, iteration: int) -> None:
        """Go back to `iteration`, whose weights the caller has restored; nodes after it will be recorded again."""
        self.path.remove_nodes_after(iteration)
        self.iteration = self._since = iteration
        self._told = len(self.fit.cosines())
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self.done and not self.path.complete:
            self.path.finish()

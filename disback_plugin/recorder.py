"""The recorder: counts the updates of s', decides when s' is fitted, and saves the nodes of a path.

Every recording uses it, whether `attach` or `record` runs it and whoever steps the network.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Set

import torch
from torch import Tensor

from disback_plugin import distributed
from disback_plugin.convergence import EVERY, NOBODY, FitDetector, fitted_after
from disback_plugin.errors import OptionError, PathError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.progress import Progress
from disback_plugin.weights.network import ScoreNetwork

logger = logging.getLogger(__name__)

# A recording that ends once s' is fitted has at least this many iterations: a warm start of ten costs less than it
# gains (benchmarks/EVIDENCE.md).
FEWEST_ITERATIONS = 10

# Factor on the learning rate in such a recording until s' is fitted, which then takes half as long. The rest of the ten
# iterations has the trainer's own rate (benchmarks/EVIDENCE.md).
LEARNING_RATE_FACTOR = 2


def open_or_create(
    folder: str | os.PathLike[str],
    teacher: ScoreNetwork,
    recording: Recording,
    *,
    generator: str | None = None,
    validate: Callable[[int], None] = lambda nodes: None,
    resumes: bool = False,
) -> DegradationPath:
    """Return the path in a folder: a finished one of this teacher, its unfinished one, or a new one. Collective.

    If the teacher holds another node of a finished path, as in a checkpoint that was written during backtracking, node
    0 is written into it.

    Args:
        folder: A folder that holds a path, is empty, or does not exist.
        teacher: The teacher s_theta.
        recording: How to record. A finished path is used however it was recorded; an unfinished one must agree.
        generator: Fingerprint of the initial generator, if known.
        validate: Called with the index N of the last node before anything is written; raises if N does not fit.
        resumes: Whether the run continues from a state. Then only a path that is there is opened, however it was
            recorded, and the teacher may hold other weights if the path holds node 0.

    Raises:
        PathError: If the folder holds something else, a path of another teacher, or an unfinished one of another
            recording or another initial generator.
    """
    if not resumes:
        distributed.on_every_rank(teacher.check_original, "find the teacher as it was")
    state = teacher.full_state()

    def verify(path: DegradationPath) -> int | None:
        """Return the node that the teacher holds instead of node 0, if the path holds node 0; else None."""
        kept = path.manifest.recording.keep_teacher
        try:
            if not (resumes and kept):
                path.verify_teacher(state)
        except PathError:
            node = path.node_held(state) if path.complete and kept else None
            if node is None:
                raise
            return node
        return None

    def prepare() -> tuple[DegradationPath, int | None]:
        if not (resumes or DegradationPath.exists(folder)):
            validate(recording.nodes)
            return DegradationPath.create(folder, state, recording, generator=generator), None
        path = DegradationPath(folder)
        with path.lock:
            if not path.complete:
                path.lock.acquire(resumes=resumes)
            node = verify(path)
            if not resumes:
                _compare_recordings(path, recording, generator, validate)
                path.write_teacher(state)
            path.remove_leftovers()
            path.verify()
            # A crash may have come between the last node and the mark of completion.
            if not path.complete and len(path) - 1 == path.manifest.last_node:
                path.finish()
        return path, node

    # Only rank 0 reads and writes the folder: the others must not see it half written.
    path, node = distributed.on_main_process(prepare, state)

    def read_last_node() -> None:
        # Rank 0 has compared the teacher already, and the other ranks' shards of it.
        if not (state.sharded or distributed.is_main_process()):
            verify(path)
        path.source(len(path) - 1)

    # Each rank decodes nodes for itself: all find the files and the same teacher, or all raise.
    distributed.on_every_rank(read_last_node, "find the path and the same teacher")
    if node is not None:
        logger.warning("the teacher held node %d of %s, as a checkpoint may: it is set to node 0", node, path)
        distributed.on_every_rank(lambda: teacher.write(path.teacher_source()), "read node 0")
    return path


def _compare_recordings(
    path: DegradationPath, recording: Recording, generator: str | None, validate: Callable[[int], None]
) -> None:
    """Warn if a finished path was recorded otherwise; raise if an unfinished one was, or if its length does not fit."""
    try:
        validate(len(path) - 1 if path.complete else recording.nodes)
    except OptionError as error:
        found = f"{error.found}: the one in {path.folder}, of {path.manifest.iterations} updates"
        raise OptionError(found, expected=error.expected, cure=f"{error.cure}, or pass another path=") from error
    recorded, differing = path.manifest, []
    if None not in (generator, recorded.generator) and generator != recorded.generator:
        differing.append("another initial generator")
    # The default asks a finished path for nothing.
    if recording != recorded.recording and not (path.complete and recording == Recording()):
        differing.append(str(recorded.recording))
    if differing and not path.complete:
        raise PathError(
            f"an unfinished recording of {' and '.join(differing)}",
            expected=f"the recording that {path.folder} began, to resume it, not {recording}",
            cure="pass the same generator, record=, every=, codec= and keep_teacher=, or another path=",
        )
    if differing:
        what = " and ".join(differing)
        logger.warning("%s is finished, and used as it is: recorded on %s, not %s", path.folder, what, recording)


class Recorder:
    """Turns updates of a network into nodes: call `update` after each of them.

    Args:
        path: An unfinished path, to which nodes are added.
        network: s', the network that is fitted.
        progress: The run's progress; `recorded` is set to the iteration of the last node, and counted from there.
        training: Returns the weights and all else that training needs to resume bit for bit at this iteration; None
            where the trainer's checkpoint holds that.
        until_fitted: Whether to end as soon as s' is fitted, after at least ten iterations.
        scales_rate: Whether the caller multiplies the learning rate of each update by `learning_rate_factor`.
        plugins: The plug-ins that are called for each node.

    Attributes:
        fit: The cosines of the gradients of s', which say whether s' is fitted.
        gradients_seen: Whether the gradients of the coming update have been observed.
        went_on: Whether the network was updated after node N was saved.
    """

    def __init__(
        self,
        path: DegradationPath,
        network: ScoreNetwork,
        progress: Progress,
        *,
        training: Callable[[], dict[str, Tensor]] | None = None,
        until_fitted: bool = False,
        scales_rate: bool = False,
        plugins: PluginManager,
    ) -> None:
        self.path, self.network, self.progress, self._training = path, network, progress, training
        self.fit, self._until_fitted, self._scales_rate = FitDetector(network), until_fitted, scales_rate
        self._plugins = plugins
        self.gradients_seen = self.went_on = False
        self._logged = 0  # number of cosines that have been logged
        self._losses: list[tuple[int, Tensor]] = []
        self._seconds: list[float] = []  # of each write of a node
        progress.recorded = self._resumed_at = path.nodes[-1].iteration if path.nodes else 0

    @property
    def done(self) -> bool:
        """Whether node N is saved."""
        return self.progress.recorded >= self.path.manifest.iterations

    @property
    def learning_rate_factor(self) -> int:
        """Factor on the learning rate of the next update."""
        known, recorded = self.path.manifest, self.progress.recorded
        # After resuming from an earlier checkpoint, the manifest may describe iterations not yet repeated.
        fitted = known.fitted is not None and recorded >= known.fitted
        if fitted or self.done or not self._scales_rate:
            return 1
        if recorded or known.fitted is not None:
            return known.learning_rate_factor  # the factor that the recording began with
        return LEARNING_RATE_FACTOR if self._until_fitted else 1

    # -- begin and resume ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Write the last recorded node, at first the teacher, into the network.

        Raises:
            MismatchError: If the network's keys or shapes are not the teacher's. Then nothing was written.
            PathError: If the path is broken. Then nothing was written.
        """
        last = len(self.path) - 1
        write = self.network.write  # the fake score may be a finer copy of the teacher
        distributed.on_every_rank(lambda: write(self.path.source(last), keep_finer=True), "read the last node")

    def load_fit(self, fit: Tensor | str) -> None:
        """Continue with the saved cosines of a process whose weights the caller has restored."""
        self.fit.load(fit)
        self._logged = len(self.fit.cosines())

    def go_back(self, iteration: int) -> None:
        """Go back to an iteration whose weights the caller has restored; later nodes will be recorded again."""
        self.path.remove_nodes_after(iteration)
        self.progress.recorded = self._resumed_at = iteration
        # The saved network may have been updated after node N: the scheduler compares the weights.
        self.went_on = self.done
        if self.done and not self.path.complete:
            self.path.finish()

    # -- an update ----------------------------------------------------------------------------------------------------

    def observe_gradients(self, idle: Set[int] = NOBODY) -> None:
        """Observe the gradients of the coming update before the loop clears them; else `update` does.

        Args:
            idle: Ids of weights that take no part in it, as those of another expert.
        """
        known = self.path.manifest
        if not self.gradients_seen and known.fitted is None and known.ended is None:
            self.fit.observe(idle)
        self.gradients_seen = True

    def update(self, loss: object = None) -> None:
        """Count one update of the network and save a node if one is due. After node N nothing is counted.

        Args:
            loss: The loss of this update, to be logged if it is a tensor of one element.

        Raises:
            PluginError: If a plug-in that was asked for raised. The node is saved.
        """
        if self.done:
            self.went_on = True
            return
        iteration = self.progress.recorded + 1
        if isinstance(loss, Tensor) and loss.numel() == 1 and distributed.is_main_process():
            self._losses.append((iteration, loss.detach().reshape(())))
        self.observe_gradients()
        self.gradients_seen = False
        known = self.path.manifest
        if iteration == 1 and known.fitted is None and self.learning_rate_factor != known.learning_rate_factor:
            self.path.update_manifest(learning_rate_factor=self.learning_rate_factor)
        self._decide(iteration)
        due = iteration == self.path.manifest.due_iteration(len(self.path))
        if due:
            self._save_node(iteration)
        self.progress.recorded = iteration  # only now: a node that could not be written is due again
        if self.done or iteration % EVERY == 0:
            self._log_losses()
        if self.done:
            if not self.path.complete:
                self.path.finish()
            self._log_cosines()
            self._log_end()
        if due:
            self._plugins.call("disback_after_node_recorded", path=self.path, node=self.path.nodes[-1])
        if self.done:
            self._plugins.call("disback_after_path_completed", path=self.path)

    def _decide(self, iteration: int) -> None:
        """Decide whether s' is fitted, and whether the recording ends because of that."""
        known = self.path.manifest
        if known.ended is not None or iteration % EVERY:
            return
        fitted = known.fitted
        if fitted is None:
            found = distributed.on_main_process(lambda: fitted_after(self.fit.cosines()))
            fitted = None if found is None else iteration
            self._log_cosines()
        ends = self._until_fitted and fitted is not None and iteration >= FEWEST_ITERATIONS
        ended = iteration if ends else None
        if fitted is not None and (fitted, ended) != (known.fitted, known.ended):
            self.path.update_manifest(fitted=fitted, ended=ended)

    def _save_node(self, iteration: int) -> None:
        distributed.agree({"path": self.path.identity, "recording_iteration": iteration})
        training = None if self._training is None else self._training() | {"fit": self.fit.to_tensor()}
        before = time.perf_counter()
        self.path.append(self.network.full_state(), iteration=iteration, training=training)
        self._seconds.append(time.perf_counter() - before)
        logger.info("recorded node %d at iteration %d", len(self.path) - 1, iteration)

    # -- the log ------------------------------------------------------------------------------------------------------

    def _log(self, iteration: int, values: dict[str, float]) -> None:
        self._plugins.call("disback_log", values={"disback/recording": iteration} | values, step=0)

    def _log_losses(self) -> None:
        """Log the losses since the last call with one read from the device."""
        if self._losses:
            iterations, losses = zip(*self._losses, strict=True)
            self._losses.clear()
            for iteration, loss in zip(iterations, torch.stack(losses).tolist(), strict=True):
                self._log(iteration, {"disback/loss": loss})

    def _log_cosines(self) -> None:
        if not distributed.is_main_process():
            return
        cosines = self.fit.cosines()
        for index in range(self._logged, len(cosines)):
            if math.isfinite(cosines[index]):  # cosine 0 compares updates 1 and 2
                self._log(index + 2, {"disback/agreement": cosines[index]})
        self._logged = len(cosines)

    def _log_end(self) -> None:
        """Log the length of the recording, the size of the path and the cost of a node; warn if s' was not fitted."""
        if not distributed.is_main_process():
            return
        known, iterations = self.path.manifest, self.progress.recorded
        size, seconds = sum(entry.bytes for entry in known.entries), sum(self._seconds) / len(self._seconds)
        fit = f"was fitted after {known.fitted}" if known.fitted else "was not seen to be fitted"
        message = "recorded %d iterations: s' %s; the path has %d bytes, and a node took %.2g s to write"
        logger.info(message, iterations, fit, size, seconds)
        self._log(iterations, {"disback/path_bytes": size, "disback/node_seconds": seconds})
        unseen = iterations - self._resumed_at > EVERY and not any(map(math.isfinite, self.fit.cosines()))
        if known.fitted is None and (unseen or self._until_fitted):
            why = "is its learning rate still warming up? Record at the rate to come, or with a larger record="
            logger.warning(
                's\' was not seen to be fitted in its %d updates, and backtracking under "auto" takes as long as they '
                "did: %s",
                iterations,
                "no gradients of s' were seen" if unseen else why,
            )

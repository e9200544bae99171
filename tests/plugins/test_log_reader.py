"""What is read from a run's log after kills, resumes and second runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disback_plugin.errors import PathError
from disback_plugin.plugins.log_reader import find, last_run, read
from disback_plugin.plugins.run_log import RunLog


def test_a_run_goes_on_from_one_of_its_own_path_not_from_the_last_one():
    def begin(path, resumed):
        return {"update": 5 if resumed else 0, "begin": "attach", "resumed": resumed, "path": path}

    ours, another = ({"update": 9, "loss": loss} for loss in (1.0, 2.0))
    early, early_of_another = ({"update": 4, "loss": loss} for loss in (3.0, 4.0))
    lines = [begin("a", False), early, ours, begin("b", False), early_of_another, another, begin("a", True)]
    assert last_run(lines).curves() == {"loss": [(4, 3.0)]}


def test_a_line_that_a_killed_process_left_half_does_not_hide_the_next(tmp_path):
    log = RunLog(tmp_path / "x.log.jsonl")
    log.begin("test")
    log.log({"loss": 1.0}, 1)
    log.file.write_text(log.file.read_text()[:-7])
    again = RunLog(log.file)
    again.begin("test", update=1, resumed=True)
    again.log({"loss": 2.0}, 2)
    history = read(log.file)
    assert history.curves() == {"loss": [(2, 2.0)]}
    assert history.torn == 1


@pytest.mark.parametrize("text", [None, "", "not json\n", '{"loss": 1}\n', '{"update": -1}\n', "[1]\n"])
def test_what_is_no_log_is_refused(text, tmp_path):
    file = tmp_path / "x.log.jsonl"
    if text is None:
        with pytest.raises(PathError, match="no log of a run"):
            find(file)
    else:
        file.write_text(text)
    with pytest.raises(PathError):
        read(file)


# A process: how it begins, how far it then gets, and which of the updates so far it leaves a checkpoint of.
PROCESSES = st.lists(
    st.tuples(st.sampled_from(["anew", "loaded", "given"]), st.integers(0, 12), st.floats(0, 1)), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=60)
@given(PROCESSES)
def test_whatever_is_killed_and_resumed_reads_as_one_run(processes):
    """Each process logs its number; the history has one number an update, the last process's that came there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.log.jsonl"
        checkpoint, counts = None, {}
        for number, (kind, steps, part) in enumerate(processes):
            log = RunLog(file)
            resumed = kind != "anew" and checkpoint is not None
            update = checkpoint if resumed else 0
            given_state = resumed and kind == "given"
            log.begin("attach", update=update if given_state else 0, resumed=given_state, path="the same")
            if resumed and kind == "loaded":
                log.log({"by": -1}, 0)  # attached before the state is loaded: it stands at the start for a moment
                log.resume(update=update)
            counts = {at: by for at, by in counts.items() if at <= update} if resumed else {}
            for at in range(update if not resumed else update + 1, update + steps + 1):
                log.log({"by": number}, at)
                counts[at] = number
            reached = max(counts, default=0)
            checkpoint = round(part * reached)
        curve = read(file).curves().get("by", [])
    assert [at for at, _ in curve] == sorted({at for at, _ in curve})
    assert dict(curve) == counts


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.sampled_from(["update", "recording", "begin", "resume", "resumed", "path", "x"]),
                                st.integers(0, 9)), max_size=12))  # fmt: skip
def test_any_lines_at_all_read_as_a_history_whose_updates_only_grow(lines):
    history = last_run([{"update": 0} | line for line in lines])
    for recording in (False, True):
        for curve in history.curves(recording=recording).values():
            assert [at for at, _ in curve] == sorted({at for at, _ in curve})

"""Folders as people have them: mounted ones that refuse an operation, foreign files, names of any language."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin.errors import PathError
from disback_plugin.path import files
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.run_log import RunLog

PLAN = {"record": 4, "every": 2, "schedule": "ramp:4", "codec": "exact"}


def whole_run(folder, steps=9):
    run = Run()
    with disback.attach(**run.roles(), path=folder, **PLAN) as handle:
        run.steps(steps)
        assert handle.phase == "done"
    return run


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def refuse(number):
    def refusing(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refusing


def without_flushing_folders(patch):
    flush = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    patch.setattr(os, "fsync", only_files)


def without_renaming_over(patch):
    rename = Path.replace

    def only_new(self, target):
        if Path(target).exists():
            raise OSError(errno.EEXIST, "File exists")
        return rename(self, target)

    patch.setattr(Path, "replace", only_new)


MOUNTS = {
    "no flushing of folders": (without_flushing_folders, "flush folders"),
    "no flushing": (lambda p: p.setattr(os, "fsync", refuse(errno.ENOSYS)), "flush files"),
    "no modes": (lambda p: p.setattr(Path, "chmod", refuse(errno.EPERM)), "change the mode of files"),
    "no renaming": (lambda p: p.setattr(Path, "replace", refuse(errno.ENOSYS)), "rename files: they are copied"),
    "no renaming over a file": (without_renaming_over, "rename files: they are copied"),
    "no mapping": (lambda p: p.setattr(files, "safe_open", refuse(errno.ENODEV)), "map files"),
}


@pytest.mark.parametrize(("mount", "said"), MOUNTS.values(), ids=MOUNTS)
def test_a_mounted_folder_does_without_what_it_cannot_and_says_so_once(tmp_path, monkeypatch, caplog, mount, said):
    whole_run(tmp_path / "plain")
    mount(monkeypatch)
    whole_run(tmp_path / "mounted")
    assert sum(said in message for message in caplog.messages) == 1
    found = content(tmp_path / "mounted")
    assert found == content(tmp_path / "plain")
    path = DegradationPath(tmp_path / "mounted")
    path.verify()
    assert difference(path[2], DegradationPath(tmp_path / "plain")[2]) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_that_loses_something_is_not_passed_over(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    run = Run()
    with pytest.raises(PathError, match="cannot be written"):
        disback.attach(**run.roles(), path=tmp_path / "path", **PLAN)
    assert not (tmp_path / "path").exists()


def test_a_crash_within_a_copy_of_the_manifest_loses_nothing(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", **PLAN):
        run.steps(3)
    manifest = tmp_path / "path" / "config.json"
    (tmp_path / "path" / ".config.json.tmp").write_bytes(manifest.read_bytes())
    os.truncate(manifest, 100)
    path = DegradationPath(tmp_path / "path")
    path.verify()
    assert len(path) == 2
    whole_run(tmp_path / "path")
    assert not (tmp_path / "path" / ".config.json.tmp").exists()


def test_a_torn_manifest_without_its_copy_is_refused(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", **PLAN):
        run.steps(3)
    os.truncate(tmp_path / "path" / "config.json", 100)
    (tmp_path / "path" / ".config.json.tmp").write_text("{")
    with pytest.raises(PathError, match=r"no readable .*/config\.json"):
        DegradationPath(tmp_path / "path")


# -- foreign files -----------------------------------------------------------------------------------------------------

FOREIGN = {
    "Thumbs.db": b"\0",
    ".DS_Store": b"\0",
    "report.html": b"<html>",
    "model.safetensors": b"\xff" * 8,
    "node-099.pt": b"\x80\x02.",
    ".syncthing.notes.txt.tmp": b"half",
    ".tmpAbCd12": b"another program's",
    "more/notes.txt": b"years",
}


@pytest.mark.parametrize("steps", [3, 9], ids=["unfinished", "finished"])
def test_foreign_files_are_neither_read_nor_deleted(tmp_path, steps):
    run, folder = Run(), tmp_path / "path"
    with disback.attach(**run.roles(), path=folder, **PLAN):
        run.steps(steps)
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text)
    DegradationPath(folder).verify()
    whole_run(folder)
    for name, text in FOREIGN.items():
        assert (folder / name).read_bytes() == text, name
    DegradationPath(folder).save_pretrained(tmp_path / "copy")
    assert not {name for name in FOREIGN if (tmp_path / "copy" / name).exists()}


def test_what_a_killed_write_left_is_removed(tmp_path):
    run, folder = Run(), tmp_path / "path"
    with disback.attach(**run.roles(), path=folder, **PLAN):
        run.steps(3)
    (folder / ".node-002.safetensors.tmp").write_bytes(b"")
    files.write_tensors(folder / "half", {"w": torch.zeros(2)}, metadata="{}")
    (folder / "half").rename(folder / ".tmpAbCd12")  # as safetensors writes it
    (folder / ".tmpEfGh34").touch()  # as safetensors begins it
    whole_run(folder)
    assert {name for name in content(folder) if name.startswith(".")} == set()


def test_a_hidden_file_does_not_make_a_folder_taken(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    whole_run(tmp_path)


# -- names -------------------------------------------------------------------------------------------------------------

NAMES = [
    "路径 и путь",
    "e\u0301té d'été",
    "a b;$(c)'\"",
    "n" * 255,
    "ö" * 120,
    b"caf\xe9".decode("utf-8", "surrogateescape"),
]


@pytest.mark.parametrize("name", NAMES, ids=["scripts", "combining", "shell", "longest", "long umlauts", "no utf-8"])
def test_a_folder_has_any_name(tmp_path, name, caplog):
    caplog.set_level("CRITICAL", logger="disback_plugin")  # pytest-xdist cannot send a log with such a name
    whole_run(tmp_path / name)
    again = Run()
    disback.attach(**again.roles(), path=tmp_path / name, **PLAN).detach()
    DegradationPath.from_pretrained(tmp_path / name).verify()


def test_a_name_that_is_too_long_is_one_named_error(tmp_path):
    run = Run()
    with pytest.raises(PathError, match="cannot be written"):
        disback.attach(**run.roles(), path=tmp_path / ("n" * 256), **PLAN)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PathError, match="neither a folder nor"):
        DegradationPath.from_pretrained("n" * 5000, local_files_only=True)


def test_a_report_has_a_long_name(tmp_path):
    files.write_text(tmp_path / f"{'r' * 250}.html", "page")
    assert (tmp_path / f"{'r' * 250}.html").read_text() == "page"


def test_a_log_whose_name_would_be_too_long_is_left_out(tmp_path, caplog):
    whole_run(tmp_path / ("n" * 250))
    assert not RunLog.beside(tmp_path / ("n" * 250)).file.parent.joinpath("n.log.jsonl").exists()
    assert sum("continues without its log" in message for message in caplog.messages) == 1

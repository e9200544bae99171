"""Calls after an import, beside the import hooks of other tools."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from disback_plugin.launch.hooks import call_after_import


class SearchesAgain:
    """An import hook of the usual form, as wrapt's: it asks all finders once more."""

    busy = False

    def find_spec(self, name, path=None, target=None):
        if name != "a_module_of_the_script" or self.busy:
            return None
        self.busy = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.busy = False


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "a_module_of_the_script.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "a_module_of_the_script"
    sys.modules.pop("a_module_of_the_script", None)


def test_a_hook_that_searches_again_is_followed_by_one_call(module, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [SearchesAgain(), *sys.meta_path])
    seen = []
    with call_after_import([module], lambda found: seen.append(found.value)):
        importlib.import_module(module)
    assert seen == [3]


def test_two_calls_after_one_import_are_both_made(module):
    seen = []
    outer = call_after_import([module], lambda _: seen.append("outer"))
    with outer, call_after_import([module], lambda _: seen.append("inner")):
        importlib.import_module(module)
    assert sorted(seen) == ["inner", "outer"]

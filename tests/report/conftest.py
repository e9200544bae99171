"""Two logs that have everything that a log can have, and their page."""

from __future__ import annotations

import pytest
from logs import a_log

from disback_plugin.plugins.log_reader import read
from disback_plugin.report import page


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return [read(a_log(folder, name, scale)) for name, scale in (("a <baseline>", 1.0), ("disback", 0.5))]


@pytest.fixture(scope="session")
def page_of_two(two):
    return page(two)

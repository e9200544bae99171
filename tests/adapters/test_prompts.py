"""Prompts as files have them, and names that a hub cannot have."""

from __future__ import annotations

import pytest
from disback_adapters.lcm_lora.prompts import prompts_of
from disback_adapters.lcm_lora.roles import Options

from disback_plugin.errors import OptionError


def test_prompts_come_from_a_file_or_a_list(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    assert prompts_of(str(tmp_path / "prompts.txt")) == prompts_of(["one", "two"]) == ["one", "two"]
    for wrong in ([" "], "someone/prompts"):
        with pytest.raises(OptionError, match="no prompt in"):
            prompts_of(wrong)


FILES = {
    "a mark and Windows' ends": ("\ufeffa red cube\r\na blue ball\r\n".encode(), ["a red cube", "a blue ball"]),
    "a line separator in a caption": ("a red cube\u2028in a room\n".encode(), ["a red cube\u2028in a room"]),
    "a form feed and a next line": ("a\x0cb\x85c\nd".encode(), ["a\x0cb\x85c", "d"]),
    "a mark alone": ("\ufeff\nnight".encode(), ["night"]),
}


@pytest.mark.parametrize(("content", "prompts"), FILES.values(), ids=FILES)
def test_a_line_of_a_file_is_a_prompt_whatever_it_holds(tmp_path, content, prompts):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert prompts_of(str(tmp_path / "prompts.txt")) == prompts


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_another_encoding_is_refused_with_the_cure(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_bytes("a caf\u00e9\n".encode(encoding))
    with pytest.raises(OptionError, match="save it in UTF-8"):
        prompts_of(str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize("name", ["my student", "a--b", "-student", "x" * 97, "a/b/c", "student.git"])
def test_a_hub_name_that_cannot_be_is_refused_before_training(name):
    with pytest.raises(OptionError, match="the hub name"):
        Options(teacher="sd15", prompts="p.txt", output="out", push_to_hub=True, hub_id=name)


def test_the_output_folders_name_is_the_hub_name_only_where_it_is_published():
    Options(teacher="sd15", prompts="p.txt", output="runs/my student")
    Options(teacher="sd15", prompts="p.txt", output="runs/my student", push_to_hub=True, hub_id="me/student_1.0")
    with pytest.raises(OptionError, match="'my student'"):
        Options(teacher="sd15", prompts="p.txt", output="runs/my student/", push_to_hub=True)

"""The command line of a program: what it takes, and what it says of mistakes."""

import re
import sys
from dataclasses import dataclass

import jsonargparse
import pytest

from mole_vl.program import command


@dataclass
class Loop:
    """A loop.

    Args:
        steps: How long.
        clip: How much; None for all.
    """

    steps: int = 3
    clip: float | None = 1.0


def taught(loop: Loop, name: str = "ann") -> tuple[Loop, str]:
    """A program.

    Args:
        loop: Its loop.
        name: Its name.
    """
    return loop, name


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the program with a file of settings."""

    def run(settings, *arguments):
        file = tmp_path / "file.yaml"
        file.write_text(settings, encoding="latin-1")
        monkeypatch.setattr(sys, "argv", ["taught", "--config", str(file), *arguments])
        return command(taught)

    return run


def test_settings_come_from_a_file_and_from_what_is_typed(run):
    assert run("loop: {steps: 5}\nname: bob\n", "--loop.steps", "7") == (Loop(7), "bob")
    assert run("loop: {clip: null}\n") == (Loop(clip=None), "ann")


def test_hyphens_in_a_settings_name_are_underscores(monkeypatch):
    @dataclass
    class Counted:
        """Counts.

        Args:
            top_k: How many.
            name: Whose.
        """

        top_k: int = 1
        name: str = "-"

    monkeypatch.setattr(sys, "argv", ["counted", "--top-k", "3", "--name=a--b-c"])
    assert command(Counted) == Counted(3, "a--b-c")


def test_settings_may_be_typed_in_place_of_a_file(monkeypatch):
    name = "b" * 300
    monkeypatch.setattr(sys, "argv", ["taught", "--config", f"name: {name}"])
    assert command(taught) == (Loop(), name)


@dataclass
class Asked:
    """Ask it.

    Args:
        loud: Whether it shouts.
    """

    loud: bool = False


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["teach", "--steps", "5"], Loop(5)),
        (["ask"], Asked()),
        (["ask", "--loud"], Asked(True)),
        (["ask", "--loud", "false"], Asked()),
        (["ask", "--loud=True"], Asked(True)),
    ],
)
def test_one_word_chooses_among_commands_and_a_switch_needs_no_value(monkeypatch, typed, expected):
    monkeypatch.setattr(sys, "argv", ["file.py", *typed])
    assert command({"teach": Loop, "ask": Asked}) == expected


@pytest.mark.parametrize(
    ("typed", "usage", "told"),
    [
        ([], "school [--config CONFIG] {teach,ask} ...", "one of {teach,ask}"),
        (["sing"], "school [--config CONFIG] {teach,ask} ...", "invalid choice: 'sing'"),
        (["ask", "--loud", "often"], "school [options] ask", "Got value: often"),
        (["teach", "--step", "5"], "school [options] teach", "arguments: --step 5"),
        (["ask", "--steps", "5"], "school [options] ask", "arguments: --steps 5"),
    ],
)
def test_a_mistake_names_its_command(monkeypatch, capsys, typed, usage, told):
    monkeypatch.setattr(sys, "argv", ["file.py", *typed])
    with pytest.raises(SystemExit) as ended:
        command({"teach": Loop, "ask": Asked}, "school")
    assert ended.value.code == 2
    first, *_, last = capsys.readouterr().err.rstrip("\n").split("\n")
    assert first.startswith(f"usage: {usage}")
    assert last.startswith("error: ") and told in last


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("loop: {steps: null}", r"loop.steps.*Got value: None"),
        ("loop: {}\nname:", r"name.*Got value: None"),
        ("loop: {steps: many}", r"loop.steps.*Got value: many"),
        ("loop: {stepz: 1}", r"'loop' does not accept option 'stepz'"),
        ("size: 3", r"'size' is not accepted"),
        ("", r"file.yaml is empty, expected settings with values"),
        ("# later", r"file.yaml is empty, expected settings with values"),
        ("many words", r"file.yaml holds 'many words', expected settings"),
        ("loop: [1", r"file.yaml is no YAML: while parsing a flow sequence"),
        ("name: ann\xff", r"file.yaml: no UTF-8 text \(at byte 9: invalid start byte\)"),
    ],
)
def test_a_mistake_ends_it_with_one_line_that_names_the_setting(run, capsys, settings, told):
    with pytest.raises(SystemExit) as ended:
        run(settings)
    assert ended.value.code == 2
    usage, _, last = capsys.readouterr().err.rstrip("\n").split("\n", 2)
    assert usage == "usage: taught [--config FILE] [--SETTING VALUE ...]"
    assert "\n" not in last
    assert last.startswith("error: ")
    assert re.search(told, last)


def test_other_parsers_of_the_process_stay_as_they_are(run):
    run("name: bob")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--size", type=int)
    assert parser.parse_args([]).size is None

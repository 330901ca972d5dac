"""The command line of a program: what it takes, and what it says of mistakes."""

import re
import sys
from dataclasses import dataclass, field

import jsonargparse
import pytest

from mole_vl.faults import at_least, refuse
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


@pytest.mark.parametrize("typed", [(), ("--name", "bob"), ("--loop.clip", "much")])
def test_all_that_is_wrong_in_a_file_is_told_at_once(run, capsys, typed):
    with pytest.raises(SystemExit) as ended:
        run("loop: {steps: many, stepz: 3}\nnames: [a]\nname: ann\n", *typed)
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    for fault in ('Parser key "loop.steps": Expected', "'stepz'", "'names'"):
        assert told.count(fault) == 1, told
    assert "required" not in told


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


@dataclass(frozen=True)
class Form:
    """A form.

    Args:
        rank: Its rank.
    """

    rank: int = 1

    def __post_init__(self) -> None:
        refuse("Form", [at_least("rank", self.rank, 1)])


@dataclass(frozen=True)
class Trained:
    """A training.

    Args:
        form: What is trained.
        loop: How long.
        rows: On how many rows.
    """

    form: Form = Form()
    loop: Loop = field(default_factory=Loop)
    rows: int = 1

    def __post_init__(self) -> None:
        refuse(
            "Trained",
            [at_least("rows", self.rows, 1), at_least("form.rank", self.form.rank, self.rows)],
        )


def test_faults_of_settings_within_settings_are_told_at_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--form.rank", "0", "--rows", "-1"])
    told = "^Form: rank is 0, expected at least 1; Trained: rows is -1, expected at least 1$"
    with pytest.raises(ValueError, match=told):
        command(Trained)
    monkeypatch.setattr(sys, "argv", ["school", "train", "--form.rank", "0", "--rows", "-1"])
    with pytest.raises(ValueError, match=told):
        command({"train": Trained, "ask": Asked}, "school")


def test_a_function_is_not_called_with_settings_that_are_refused(monkeypatch):
    called = []

    def train(form: Form, name: str = "ann") -> None:
        """Train.

        Args:
            form: What is trained.
            name: Whose.
        """
        called.append(form)

    monkeypatch.setattr(sys, "argv", ["train", "--form.rank", "0"])
    with pytest.raises(ValueError, match=r"^Form: rank is 0, expected at least 1$"):
        command(train)
    monkeypatch.setattr(sys, "argv", ["train", "--form.rank", "2"])
    command(train)
    assert called == [Form(2)]


def test_what_a_faulty_part_breaks_is_no_fault_of_the_house(monkeypatch):
    @dataclass(frozen=True)
    class Divided:
        """Divided.

        Args:
            form: By what.
        """

        form: Form = Form()

        def __post_init__(self) -> None:
            assert self.form.rank

    monkeypatch.setattr(sys, "argv", ["divide", "--form.rank", "0"])
    with pytest.raises(ValueError, match=r"^Form: rank is 0, expected at least 1$"):
        command(Divided)


def test_help_tells_all_that_a_docstring_says_and_no_default_of_what_must_be_given(
    monkeypatch, capsys
):
    def draw(kind: str, size: int = 3) -> None:
        """Draw something.

        It is drawn by hand: a second paragraph says so.

        Args:
            kind: What.
            size: How large.
        """

    def told(*arguments, about=None):
        monkeypatch.setattr(sys, "argv", ["school", *arguments, "--help"])
        with pytest.raises(SystemExit):
            command({"draw": draw, "ask": Asked} if arguments else draw, "school", about)
        return " ".join(capsys.readouterr().out.split())

    said = told("draw")
    assert "Draw something. It is drawn by hand: a second paragraph says so. options:" in said
    assert "What. (required, type: str)" in said
    assert "How large. (type: int, default: 3)" in said
    assert "Ask it. options:" in told("ask")
    assert "It is drawn by hand" in told()
    assert "By itself. options:" in told(about="By itself.")


def test_other_parsers_of_the_process_stay_as_they_are(run):
    run("name: bob")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--size", type=int)
    assert parser.parse_args([]).size is None

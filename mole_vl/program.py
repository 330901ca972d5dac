"""The command line of a program: its settings, from YAML files and from what is typed."""

import re
import sys
from argparse import Action, ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import wraps
from inspect import getdoc, isfunction
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jsonargparse import ArgumentParser, DefaultHelpFormatter, auto_cli, set_parsing_settings

from mole_vl.files import read_text

T = TypeVar("T")

_USAGE = "%(prog)s [--config FILE] [--SETTING VALUE ...]"


class _Help(DefaultHelpFormatter):
    """Help in which indented lines of what a program is about, its examples, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip().split("\n\n")
        return "\n\n".join(
            part if part.startswith("    ") else super(_Help, self)._fill_text(part, width, indent)
            for part in parts
        )

    def _get_help_string(self, action: Action) -> str:
        told = super()._get_help_string(action)
        # What must be given has no default.
        return told.replace(", default: %(default)s", "") if action.required else told


class _Made:
    """Makes settings; what their checks refuse is told of all of them at once."""

    def __init__(self) -> None:
        self._faults: list[ValueError] = []

    def make(self, class_type: type[T], *args: Any, **how: Any) -> T:
        """An object of a class of settings; of any other class, as jsonargparse makes it."""
        if not is_dataclass(class_type):
            return class_type(*args, **how)
        found: Any = class_type.__new__(class_type)
        try:
            found.__init__(*args, **how)
        # The fields are there when they are checked: what it is a part of can be checked as well.
        except ValueError as fault:
            self._faults.append(fault)
        return found

    def checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is called only if nothing is wrong with what it is given."""

        @wraps(function)
        def call(*args: Any, **how: Any) -> Any:
            self.refuse()
            return function(*args, **how)

        return call

    def refuse(self) -> None:
        """Raise one ValueError for all that is wrong."""
        if len(self._faults) == 1:
            raise self._faults[0]
        if self._faults:
            raise ValueError("; ".join(dict.fromkeys(map(str, self._faults))))


class _Parser(ArgumentParser):
    """Says what is wrong in one line; takes hyphens in a setting's name for underscores."""

    def __init__(self, *args: Any, **how: Any) -> None:
        # An abbreviation would be another setting's as soon as there is a new one.
        own = {"usage": _USAGE, "allow_abbrev": False, "formatter_class": _Help}
        super().__init__(*args, **{**own, **how})
        self._files: list[Path] = []

    def add_argument(self, *names: Any, **how: Any) -> Any:
        """As jsonargparse does; what is true or false may stand without a value, and is true."""
        bare = {"nargs": "?", "const": True} if how.get("type") is bool else {}
        return super().add_argument(*names, **{**bare, **how})

    def add_function_arguments(self, function: Callable[..., Any], *args: Any, **how: Any) -> Any:
        """As jsonargparse does; the help tells all that the docstring says of the function."""
        self._tell(function)
        return super().add_function_arguments(function, *args, **how)

    def add_class_arguments(self, theclass: type, *args: Any, **how: Any) -> Any:
        """As jsonargparse does; the help tells all that the docstring says of the class."""
        if not args and how.get("nested_key") is None:
            self._tell(theclass)
        return super().add_class_arguments(theclass, *args, **how)

    def _tell(self, component: Callable[..., Any]) -> None:
        said = re.split(r"\n\n\w+:\n", getdoc(component) or "")[0]
        # jsonargparse would take the first lines alone; what a program says of itself stays.
        if said.startswith(self.description or ""):
            self.description = said

    def add_subcommands(self, *args: Any, **how: Any) -> Any:
        """As jsonargparse does; the usage tells the words then."""
        self.usage = None
        return super().add_subcommands(*args, **how)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **how: Any) -> Any:
        """As jsonargparse does, after a look at the files of settings, which it would not name."""
        typed = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
        files = list(_configs(typed))
        for file in files:
            if fault := _fault(file):
                self.error(fault)
        self._files = files
        return super().parse_args(typed, *rest, **how)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says what stopped the parser, and what else is wrong in the files of settings."""
        told = [" ".join(message.split())]
        for other in self._others():
            if not any(one in other or other in one for one in told):
                told.append(other)
        super().error("; ".join(told), ex)

    def _others(self) -> Iterator[str]:
        """What is wrong with each setting of the files, each looked at by itself."""
        files, self._files = self._files, []
        exits, self.exit_on_error = self.exit_on_error, False
        try:
            for file in files:
                for setting in _one_by_one(_settings(file)):
                    try:
                        self.parse_object(setting, defaults=False)
                    except ArgumentError as fault:
                        said = " ".join(str(fault).split())
                        # Alone, a setting lacks all others.
                        if "is required" not in said:
                            yield said
        finally:
            self.exit_on_error = exits


def _one_by_one(settings: Any) -> Iterator[dict[str, Any]]:
    """Each setting alone, within what it is a part of; what names its class stays whole."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict) and value and "class_path" not in value:
            for part in _one_by_one(value):
                yield {name: part}
        else:
            yield {name: value}


def _underscored(word: str) -> str:
    """A setting's name as it is in the code, where it was typed with hyphens."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


def _configs(arguments: Sequence[str]) -> Iterator[Path]:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        given = [value] if equals else arguments[place + 1 : place + 2]
        if name == "--config" and given:
            yield Path(given[0])


def _fault(file: Path) -> str | None:
    """What is wrong with a file's settings as such."""
    try:
        found = _settings(file)
    except ValueError as error:
        return str(error)
    except yaml.YAMLError as error:
        return f"{file} is no YAML: {error}"
    if found is None:
        return f"{file} is empty, expected settings with values"
    return None if isinstance(found, dict) else f"{file} holds {found!r}, expected settings"


def _settings(file: Path) -> Any:
    """What a file holds; nothing at all, {}, of one that cannot be read, which is told elsewhere.

    Raises:
        ValueError: It is no text.
        YAMLError: It is no YAML.
    """
    try:
        return yaml.safe_load(read_text(file)) if file.is_file() else {}
    except OSError:
        return {}


def command(
    component: Callable[..., Any] | Mapping[str, Any],
    name: str | None = None,
    about: str | None = None,
) -> Any:
    """Call a function, or make a settings object, with what the command line says.

    Every parameter is a setting, of its own type: a setting without a value is no `None`, unless
    its type has one; one that is true or false is true then. Faults of the command line and of the
    files that it names end the program with a message and exit code 2.

    Args:
        component: The function or class; its docstring tells its settings. Or several, by the word
            that chooses among them; or groups of several, whose `_help` says what they are.
        name: What the program calls itself; its file if not given.
        about: What `--help` says of it first; what the docstring says if not given.

    Returns:
        What it returns.
    """
    # Left to itself, a process that is told to keep to the CPU would not look for its fellows.
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        PartialState(cpu=True)
    made = _Made()
    how: dict[str, Any] = {"prog": name, "description": about}
    # jsonargparse has this setting for all parsers of the process alone.
    set_parsing_settings(unset_sentinel=True)
    try:
        found = auto_cli(
            _with_checks(component, made),
            as_positional=False,
            return_instance=True,
            parser_class=_Parser,
            instantiators=[(made.make, object, True)],
            **how,
        )
    except Exception:
        # Settings that were refused may be more than what they are a part of can bear.
        made.refuse()
        raise
    finally:
        set_parsing_settings(unset_sentinel=False)
    made.refuse()
    return found


def _with_checks(component: Any, made: _Made) -> Any:
    if isinstance(component, Mapping):
        return {word: _with_checks(part, made) for word, part in component.items()}
    return made.checked(component) if isfunction(component) else component

"""The command line of a program: its settings, from YAML files and from what is typed."""

from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings

_USAGE = "%(prog)s [--config FILE] [--SETTING VALUE ...]"


class _Parser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(" ".join(message.split()), ex)


def command(component: Callable[..., Any]) -> Any:
    """Call a function, or make a settings object, with what the command line says.

    Every parameter is a setting, of its own type: a setting without a value is no `None`, unless
    its type has one. Faults of the command line and of the files that it names end the program with
    a message and exit code 2.

    Args:
        component: The function or class; its docstring tells its settings.

    Returns:
        What it returns.
    """
    # jsonargparse has this setting for all parsers of the process alone.
    set_parsing_settings(unset_sentinel=True)
    try:
        return auto_cli(component, as_positional=False, parser_class=_Parser, usage=_USAGE)
    finally:
        set_parsing_settings(unset_sentinel=False)

"""Errors as sentences for the person at a page; what nobody expected goes to the terminal."""

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from apps.stopping import Stopped

# What checks raise: their messages are written for people. OSErrors are full disks and the Hub's.
_SPOKEN = (ValueError, FileNotFoundError, RuntimeError, OSError, FloatingPointError)


def sentence(error: BaseException, root: Path) -> str:
    """What to tell the person at the page.

    Args:
        error: What was raised.
        root: Folder of all sessions: paths in it are shortened to the file's name.
    """
    if isinstance(error, Stopped):
        return "Stopped."
    if not isinstance(error, _SPOKEN):
        return (
            f"The program made a mistake of its own ({type(error).__name__}); its terminal says "
            "more. Nothing was changed."
        )
    words = " ".join(
        Path(word.rstrip(",:;")).name + word[len(word.rstrip(",:;")) :]
        if word.startswith(str(root))
        else word
        for word in str(error).split()
    )
    # A file's or a key's name keeps its spelling.
    first = words.partition(" ")[0].rstrip(",:;")
    return (f"{words[:1].upper()}{words[1:]}" if first.isalpha() else words)[:600]


def spoken(root: Path) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for a page's functions and generators: they raise sentences alone."""

    def told(error: Exception) -> gr.Error:
        if not isinstance(error, (*_SPOKEN, Stopped)):
            traceback.print_exception(error)
        return gr.Error(escape(sentence(error, root)), duration=12, print_exception=False)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generating(*args: Any) -> Iterator[Any]:
                try:
                    yield from function(*args)
                except Exception as error:
                    raise told(error) from None

            return generating

        @functools.wraps(function)
        def calling(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                raise told(error) from None

        return calling

    return decorate

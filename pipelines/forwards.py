"""Contexts around each forward of a module."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

Contexts = Callable[[tuple[Any, ...], Mapping[str, Any]], Iterable[AbstractContextManager[object]]]


@contextmanager
def around_forwards(module: nn.Module, contexts: Contexts) -> Iterator[None]:
    """A context in which each forward of a module runs inside contexts of its own.

    The module is hooked, not changed: arguments and output pass as they are. What a broken-off
    forward leaves open is closed at the end.

    Args:
        module: What is called, by whomever.
        contexts: From a forward's arguments and keywords to its contexts, the outermost first.
    """
    opened: list[ExitStack] = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        opened.append(ExitStack())
        for context in contexts(args, kwargs):
            opened[-1].enter_context(context)

    def leave(*_forward: object) -> None:
        if opened:
            opened.pop().close()

    # Before the mixture's own hook, which takes note of the conditions; and after it.
    hooks = [
        module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while opened:
            opened.pop().close()

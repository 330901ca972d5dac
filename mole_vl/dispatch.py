"""The traffic between a model's forward, its gates and its mixture layers.

The model's own hooks open and close a pass, the sites' hooks evaluate gates in it, the mixture
layers ask for the result (`mole_vl.answers`). Re-runs of checkpointed parts during backward find
the pass of the forward that they repeat.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mole_vl.answers import Answers
from mole_vl.calls import Calls
from mole_vl.fanned import Fanned
from mole_vl.features import Features, read_features
from mole_vl.gates import GateOutput
from mole_vl.inputs import site_input, swapped
from mole_vl.layers import Chosen
from mole_vl.locks import Lock
from mole_vl.passes import EVERYWHERE, Conditions, Pass, Passes, replaying
from mole_vl.sites import NETWORK


class Seen(Exception):  # noqa: N818 (no error: the way out of a forward)
    """Ends a preview: the gate's block was reached, with the input `x`.

    `features` are what the model was told, where the gate is conditioned on it.
    """

    def __init__(self, x: Tensor, features: Tensor | None) -> None:
        super().__init__("the preview has seen what its gate reads")
        self.x = x
        self.features = features


class Dispatch:
    """A model's hooks, what its forwards are told, and the pass that each of them is.

    Args:
        answers: The gates.
        blocks: Where the model's blocks stand.
        features: What the model itself is told and the gates read; None for nothing.
        calls: Reads what a forward's arguments tell of its rows; None for nothing.
    """

    def __init__(
        self,
        answers: Answers,
        blocks: Iterable[str],
        features: Features | None = None,
        calls: Calls | None = None,
    ) -> None:
        self.answers = answers
        self.blocks = tuple(blocks)
        self.features = features
        self.calls = calls
        # What row gates found, by the thread of forwards that it holds for.
        self.threads: WeakKeyDictionary[Any, dict[str, GateOutput]] = WeakKeyDictionary()
        self.conditions = Conditions()
        self.silent = False
        self.passes = Passes()
        self.lock = Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Dispatch":
        # A copy is told nothing yet: the contexts in force are those of the model they are on.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        fresh = self._untold()
        for name, value in vars(self).items():
            setattr(twin, name, fresh[name] if name in fresh else deepcopy(value, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **self._untold(), "threads": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **self._untold())

    @staticmethod
    def _untold() -> dict[str, Any]:
        return {"conditions": Conditions(), "threads": WeakKeyDictionary()}

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook into a model; the handles undo it."""
        hooks: list[RemovableHandle] = []
        for part in (model, *self._parts(model)):
            begin = partial(self._begin, part is model)
            hooks.append(part.register_forward_pre_hook(begin, with_kwargs=True))
            hooks.append(part.register_forward_hook(self._end, always_call=True))
        for name, site in self.answers.sites.items():
            if site.entry is None or not (name in self.answers.reading or site.feedforward):
                continue
            entry = model.get_submodule(site.entry)
            enter, leave = partial(self._enter, name), partial(self._leave, name)
            hooks.append(entry.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(entry.register_forward_hook(leave, always_call=True))
        for site in self.answers.sites.values():
            if site.feedforward is not None and site.feedforward.outlet not in site.matrices:
                outlet = model.get_submodule(site.feedforward.outlet)
                hooks.append(outlet.register_forward_pre_hook(partial(self._sum, site.name)))
        return hooks

    def _parts(self, model: nn.Module) -> list[nn.Module]:
        """What stands above the model's blocks and may be called by itself.

        So `generate` calls an encoder, before its decoder runs.
        """
        above = {
            block.rsplit(".", depth)[0]
            for block in self.blocks
            for depth in range(1, block.count(".") + 1)
        }
        return [
            part
            for path in sorted(above)
            if not isinstance(part := model.get_submodule(path), nn.ModuleList | nn.ModuleDict)
        ]

    @contextmanager
    def told(self, **changes: Any) -> Iterator[None]:
        """A context in which forwards are told other conditions.

        Raises:
            RuntimeError: The mixture is baked, so that no condition would be heard.
        """
        self._check_heard()
        with self.lock:
            before = self.conditions
            self.conditions = replace(before, **changes)
            try:
                yield
            finally:
                self.conditions = before

    def _check_heard(self) -> None:
        if self.silent:
            raise RuntimeError("this mixture is baked into the base: call unmix() first")

    def preview(self, forward: Callable[[], Any]) -> None:
        """Find the weights of the forwards to come: `forward` runs the model up to the gate."""
        with self.lock:
            told = self.conditions
            if (
                not self.answers.previews
                or told.disabled
                or self.answers.pinned(NETWORK, told) is not None
            ):
                return
            self._check_heard()
            if told.held is None:
                raise RuntimeError(
                    "preview: nothing would keep what the gate finds; enter condition(hold=True) "
                    "first"
                )
            told.held[NETWORK] = self._found(forward, told)

    def _found(self, forward: Callable[[], Any], told: Conditions) -> GateOutput:
        x = features = None
        try:
            with self.told(preview=True), torch.no_grad():
                forward()
        except Seen as seen:
            x, features = seen.x, seen.features
        if x is None:
            raise RuntimeError(f"preview: the forward never ran {self.answers.reading[NETWORK]}")
        output = self.answers.ask(NETWORK, x, told, features)
        if output.weights.dim() > 2:
            raise ValueError(
                "site 'preview' finds weights for rows, and this gate's vary by position: use "
                "over='row', or another site"
            )
        return output

    def weights_of(self, path: str, rows: int) -> Chosen | None:
        """The weights, strength included, that the layer at `path` applies to its rows.

        Raises:
            RuntimeError: It runs outside of a forward of the model.
        """
        running = self._running(f"the mixed layer {path}")
        return self.answers.chosen(path, rows, running, again=replaying())

    def _running(self, what: str) -> Pass:
        """The pass that code runs in: of the forward, or of the one that a backward repeats."""
        if replaying():
            return self.passes.of_backward()
        if self.passes.current is None:
            raise RuntimeError(
                f"{what} ran outside of a forward of the mixed model: call the model itself, not "
                "its parts, or unmix it first"
            )
        return self.passes.current

    def _begin(self, whole: bool, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if replaying():
            return
        self.lock.acquire()
        running = self.passes.current
        if running is not None:
            # Broken off from the keyboard, it never ended: that forward's hold is still ours.
            self.lock.release()
            if not whole and module is not running.opener:
                return
        if not whole and self.features is not None and not self.features.held:
            # Only the model is told them: its part cannot run alone.
            self.lock.release()
            return
        try:
            told = self._conditions_of(whole, module, args, kwargs)
        except BaseException:
            # No pass was opened, so that none will end.
            self.lock.release()
            raise
        opened = self.passes.open(told, module)
        if told.disabled:
            return
        if self.features is not None and self._told_of_features(told):
            opened.features = read_features(self.features, args, kwargs)
        if told.preview:
            return
        for name in self.answers.sites:
            if self.answers.previews or name not in self.answers.reading:
                self.answers.evaluate(name, None, opened)

    def _told_of_features(self, told: Conditions) -> bool:
        """Whether gates read features in a forward: those that a preview holds, in it alone."""
        return told.preview if self.answers.previews else EVERYWHERE not in (told.pinned or {})

    def _conditions_of(
        self, whole: bool, model: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> Conditions:
        """The conditions in force; where nobody told of the rows, what the call itself tells."""
        told = replace(self.conditions, disabled=True) if self.silent else self.conditions
        if self.calls is None or not whole or told.told or told.disabled or told.preview:
            return told
        call = self.calls(model, args, kwargs)
        held: dict[str, GateOutput] | None = None
        if call.thread is not None:
            if call.first:
                self.threads.pop(call.thread, None)
            held = self.threads.setdefault(call.thread, {})
        if self.answers.previews and NETWORK not in (held or {}) and call.preview:
            held = {} if held is None else held
            with self.told(told=True, masks=call.masks, held=held):
                self.preview(lambda: model(**call.preview))
        return replace(told, told=True, masks=call.masks, held=held)

    def _end(self, module: nn.Module, _args: Any, output: Any) -> None:
        running = self.passes.current
        if running is not None and running.opener is module and not replaying():
            self.passes.close(output)
            self.lock.release()

    def _enter(
        self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any] | None:
        again = replaying()
        current = self._running(f"site {name!r}")
        told = current.conditions
        if told.disabled or (self.answers.previews and not told.preview):
            return None
        x = site_input(module, args, kwargs, name)
        if told.preview:
            raise Seen(x, current.features)
        if again:
            current.replayed[name] = self.answers.result(name, x, current)
        elif name in self.answers.reading:
            self.answers.evaluate(name, x, current)
        if self.answers.sites[name].feedforward is None:
            return None
        output = (current.replayed if again else current.results)[name]
        fanned = self.answers.fanned(name, x, output, current)
        (current.refanned if again else current.fanned)[name] = fanned
        return swapped(args, kwargs, x, fanned.inputs)

    def _sum(self, name: str, _module: nn.Module, args: Any) -> Any:
        """What a feed-forward's last layer reads that no expert changes: summed over experts."""
        if not replaying() and self.passes.current is None:
            return None
        current = self._running(f"site {name!r}")
        fanned = (current.refanned if replaying() else current.fanned).get(name)
        return None if fanned is None else (fanned.summed(args[0]), *args[1:])

    def _leave(self, name: str, _module: nn.Module, _args: Any, output: Any) -> Any:
        if replaying():
            # Called on errors too: the one that `_enter` raised must not be raised again.
            with suppress(RuntimeError):
                current = self.passes.of_backward()
                current.replayed.pop(name, None)
                return _unfolded(current.refanned.pop(name, None), output)
        elif self.passes.current is not None:
            return _unfolded(self.passes.current.fanned.pop(name, None), output)
        return None


def _unfolded(fanned: Fanned | None, output: Any) -> Tensor | None:
    """A feed-forward's output as its caller knows it; None where nothing was fanned out."""
    return fanned.unfolded(output) if fanned is not None and isinstance(output, Tensor) else None

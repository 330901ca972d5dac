"""Which weights a layer applies in the forward that it is in.

The model's own hooks open and close a pass, the sites' hooks evaluate gates in it, the mixture
layers ask for the result. Re-runs of checkpointed parts during backward find the pass of the
forward that they repeat.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mole_vl.bank import GateBank, spread
from mole_vl.calls import Calls
from mole_vl.fanned import Fanned, fan
from mole_vl.features import Features, read_features
from mole_vl.gates import GateOutput
from mole_vl.gates.gate import Previewed
from mole_vl.layers import Chosen, MixtureLayer
from mole_vl.passes import EVERYWHERE, Conditions, Pass, Passes, Record, replaying
from mole_vl.sites import NETWORK, Layout


class Lock:
    """A re-entrant lock that a copied or unpickled model gets anew."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()


class Seen(Exception):  # noqa: N818 (no error: the way out of a forward)
    """Ends a preview: the gate's block was reached, with the input `x`.

    `features` are what the model was told, where the gate is conditioned on it.
    """

    def __init__(self, x: Tensor, features: Tensor | None) -> None:
        super().__init__("the preview has seen what its gate reads")
        self.x = x
        self.features = features


class Dispatch:
    """The traffic between a model's forward, its gates and its mixture layers.

    Args:
        layout: Where gates sit.
        bank: The gates.
        reads_input: Whether the gates look at their site's input, where it has one to read.
        experts: The experts' names.
        shows: What site preview shows its gate: the base, or the experts' average.
        features: What the model itself is told and the gates read; None for nothing.
        calls: Reads what a forward's arguments tell of its rows; None for nothing.
    """

    def __init__(
        self,
        layout: Layout,
        bank: GateBank,
        reads_input: bool,
        experts: Sequence[str],
        shows: Previewed = "base",
        features: Features | None = None,
        calls: Calls | None = None,
    ) -> None:
        self.bank = bank
        self.experts = tuple(experts)
        self.shows: Previewed = shows
        self.features = features
        self.calls = calls
        # What row gates found, by the thread of forwards that it holds for.
        self.threads: WeakKeyDictionary[Any, dict[str, GateOutput]] = WeakKeyDictionary()
        self.sites = {site.name: site for site in layout.sites}
        self.reading = {
            name: site.entry
            for name, site in self.sites.items()
            if reads_input and site.entry is not None
        }
        self.previews = layout.kind == "preview" and bool(self.reading)
        self.blocks = layout.blocks
        self.site_of = {path: site for site in layout.sites for path in site.matrices}
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
        for name, site in self.sites.items():
            if site.entry is None or not (name in self.reading or site.feedforward):
                continue
            entry = model.get_submodule(site.entry)
            enter, leave = partial(self._enter, name), partial(self._leave, name)
            hooks.append(entry.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(entry.register_forward_hook(leave, always_call=True))
        for site in self.sites.values():
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
            if not self.previews or told.disabled or self._pinned(NETWORK, told) is not None:
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
            raise RuntimeError(f"preview: the forward never ran {self.reading[NETWORK]}")
        masks = told.masks_at(self.reading[NETWORK])
        output = self.bank.ask(NETWORK, x, told, masks, features)
        if output.weights.dim() > 2:
            raise ValueError(
                "site 'preview' finds weights for rows, and this gate's vary by position: use "
                "over='row', or another site"
            )
        return output

    def weights_of(self, path: str, rows: int) -> Chosen | None:
        """The weights, strength included, that the layer at `path` applies to its rows."""
        site, name = self.site_of[path], self.site_of[path].name
        if replaying():
            current = self.passes.of_backward()
            output = current.replayed.get(name, current.results.get(name))
            fanned = current.refanned.get(name)
        elif self.passes.current is not None:
            current = self.passes.current
            output = current.results.get(name, current.held.get(name))
            fanned = current.fanned.get(name)
        else:
            raise RuntimeError(_outside(f"the mixed layer {path}"))
        if current.conditions.disabled:
            return None
        if current.conditions.preview:
            return self._previewed(current.conditions)
        if output is not None and output.weights.requires_grad and current.grad:
            self._check_gradient(path)
        if output is None or (site.feedforward is not None and fanned is None):
            raise RuntimeError(
                f"the mixed layer {path} runs before its gate {name!r}, which reads the input of "
                f"{site.entry}; use site 'matrix' for layers that run that early"
            )
        if fanned is None:
            output = self._for_rows(name, output, rows, current)
        told = current.conditions
        seeds = None if told.seeds is None or fanned else spread(told.seeds, rows)
        return Chosen(output.weights * told.strength, output.experts, fanned, seeds)

    def _for_rows(self, name: str, output: GateOutput, rows: int, current: Pass) -> GateOutput:
        """A site's result, multiplied as `generate` multiplies the rows that it is for."""
        told = current.conditions
        given = told.pinned is not None and told.held is not None
        # What tenants' gates found without an input knows nothing of beams either.
        unread = told.tenant is not None and told.pinned is None and name not in self.reading
        held = output is current.held.get(name)
        if not (given or held or unread) or output.weights.dim() != 2:
            return output
        # Where weights hold for an answer, those that are given, or that a preview or an encoder
        # found, are one for each row, however often `generate` multiplies it. What the first layer
        # runs counts: a later one that reads other rows must not pass for beams.
        places = None if output.experts is None else spread(output.experts, rows)
        output = replace(output, weights=spread(output.weights, rows), experts=places)
        current.results[name] = output
        return output

    def _previewed(self, told: Conditions) -> Chosen | None:
        """What a preview runs under: nothing, or the average of the experts that are kept."""
        if self.shows == "base":
            return None
        kept = torch.ones(len(self.experts)) if told.kept is None else told.kept.float()
        if isinstance(told.strength, Tensor):
            kept = kept.to(told.strength.device)
        return Chosen(kept / kept.sum() * told.strength, None)

    def _check_gradient(self, where: str) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"{where} runs without gradient inside a forward that has one: re-entrant "
                "checkpointing would lose the gates' gradient; enable checkpointing with "
                "use_reentrant=False"
            )

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
        for name in self.sites:
            if self.previews or name not in self.reading:
                self._evaluate(name, None, opened)

    def _told_of_features(self, told: Conditions) -> bool:
        """Whether gates read features in a forward: those that a preview holds, in it alone."""
        return told.preview if self.previews else EVERYWHERE not in (told.pinned or {})

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
        if self.previews and NETWORK not in (held or {}) and call.preview:
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
        current = self.passes.of_backward() if again else self.passes.current
        if current is None:
            raise RuntimeError(_outside(f"site {name!r}"))
        told = current.conditions
        if told.disabled or (self.previews and not told.preview):
            return None
        x = site_input(module, args, kwargs, name)
        if told.preview:
            raise Seen(x, current.features)
        if again:
            current.replayed[name] = self._result(name, x, current)
        elif name in self.reading:
            self._evaluate(name, x, current)
        if self.sites[name].feedforward is None:
            return None
        output = (current.replayed if again else current.results)[name]
        fanned = self._fanned(name, x, output, current)
        (current.refanned if again else current.fanned)[name] = fanned
        return _swapped(args, kwargs, x, fanned.inputs)

    def _fanned(self, name: str, x: Tensor, output: GateOutput, current: Pass) -> Fanned:
        output = self._for_rows(name, output, x.shape[0], current)
        site = [place for place, one in enumerate(self.experts) if one in self.sites[name].experts]
        told = current.conditions
        seeds = None if told.seeds is None else spread(told.seeds.to(x.device), x.shape[0])
        return fan(x, output.weights, output.experts, site, told.strength, seeds, name)

    def _sum(self, name: str, _module: nn.Module, args: Any) -> Any:
        """What a feed-forward's last layer reads that no expert changes: summed over experts."""
        current = self.passes.of_backward() if replaying() else self.passes.current
        if current is None:
            return None
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

    def _evaluate(self, name: str, x: Tensor | None, current: Pass) -> None:
        told = current.conditions
        output = self._result(name, x, current)
        current.results[name] = output
        # Weights by position belong to the positions of one forward.
        if told.held is not None and told.pinned is None and output.weights.dim() < 3:
            told.held.setdefault(name, output)
        if told.records is not None:
            real = told.masks_at(self.sites[name].entry).real
            told.records.append(Record(name, output, real, told.strength, told.tenant))

    def _result(self, name: str, x: Tensor | None, current: Pass) -> GateOutput:
        told = current.conditions
        weights = self._pinned(name, told)
        if weights is not None:
            return GateOutput(weights, None, weights)
        gate = self.bank.gates[name]
        learns = current.grad and any(p.requires_grad for p in gate.parameters())
        if name in current.held:
            if learns and not current.held[name].weights.requires_grad:
                raise RuntimeError(
                    f"the weights of site {name!r} were found without gradient, and this forward "
                    "has one: their gate would not learn; run the first forward, or the preview, "
                    "with gradient too"
                )
            return current.held[name]
        if self.previews:
            raise RuntimeError(
                "the gate of site 'preview' has seen nothing of these rows: enter "
                "condition(hold=True) and call preview(...) with the model's arguments first, or "
                "a context that does both, such as nlp.adapter.bound"
            )
        if learns:
            self._check_gradient(f"site {name!r}")
        masks = told.masks_at(self.sites[name].entry)
        return self.bank.ask(name, x, told, masks, current.features)

    def _pinned(self, name: str, told: Conditions) -> Tensor | None:
        return None if told.pinned is None else told.pinned.get(name, told.pinned.get(EVERYWHERE))


def _outside(what: str) -> str:
    return (
        f"{what} ran outside of a forward of the mixed model: call the model itself, not its "
        "parts, or unmix it first"
    )


def _unfolded(fanned: Fanned | None, output: Any) -> Tensor | None:
    """A feed-forward's output as its caller knows it; None where nothing was fanned out."""
    return fanned.unfolded(output) if fanned is not None and isinstance(output, Tensor) else None


def _swapped(args: Any, kwargs: Mapping[str, Any], x: Tensor, new: Tensor) -> tuple[Any, Any]:
    """A call's arguments with another tensor in x's place."""
    return (
        tuple(new if value is x else value for value in args),
        {name: new if value is x else value for name, value in kwargs.items()},
    )


def site_input(module: nn.Module, args: Any, kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The tensor that a site's module is called with."""
    for value in (*args, kwargs.get("hidden_states"), kwargs.get("x"), kwargs.get("input")):
        if isinstance(value, Tensor):
            return module.positions(value) if isinstance(module, MixtureLayer) else value
    raise RuntimeError(
        f"site {name!r}: {type(module).__name__} was called without a tensor that its gate could "
        f"read (keywords: {', '.join(kwargs) or 'none'})"
    )

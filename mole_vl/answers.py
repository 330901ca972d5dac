"""What gates say in a pass, and what of that a layer applies."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mole_vl.bank import GateBank, spread
from mole_vl.fanned import Fanned, fan
from mole_vl.gates import GateOutput
from mole_vl.gates.gate import Previewed
from mole_vl.layers import Chosen
from mole_vl.passes import EVERYWHERE, Conditions, Pass, Record
from mole_vl.sites import Layout


class Answers:
    """The gates of a mixture, asked once in each pass, under what the pass was told.

    Args:
        layout: Where gates sit.
        bank: The gates.
        reads_input: Whether the gates look at their site's input, where it has one to read.
        experts: The experts' names.
        shows: What site preview shows its gate: the base, or the experts' average.
    """

    def __init__(
        self,
        layout: Layout,
        bank: GateBank,
        reads_input: bool,
        experts: Sequence[str],
        shows: Previewed = "base",
    ) -> None:
        self.bank = bank
        self.experts = tuple(experts)
        self.shows: Previewed = shows
        self.sites = {site.name: site for site in layout.sites}
        self.site_of = {path: site for site in layout.sites for path in site.matrices}
        self.reading = {
            name: site.entry
            for name, site in self.sites.items()
            if reads_input and site.entry is not None
        }
        self.previews = layout.kind == "preview" and bool(self.reading)

    def ask(
        self, name: str, x: Tensor | None, told: Conditions, features: Tensor | None
    ) -> GateOutput:
        """What the gate of a site says of its input; other arguments as of `GateBank.ask`."""
        return self.bank.ask(name, x, told, told.masks_at(self.sites[name].entry), features)

    def evaluate(self, name: str, x: Tensor | None, current: Pass) -> None:
        """Find a site's result in a pass that runs for the first time."""
        told = current.conditions
        output = self.result(name, x, current)
        current.results[name] = output
        # Weights by position belong to the positions of one forward.
        if told.held is not None and told.pinned is None and output.weights.dim() < 3:
            told.held.setdefault(name, output)
        if told.records is not None:
            real = told.masks_at(self.sites[name].entry).real
            told.records.append(Record(name, output, real, told.strength, told.tenant))

    def result(self, name: str, x: Tensor | None, current: Pass) -> GateOutput:
        """A site's result in a pass: given, held from before, or what its gate says."""
        told = current.conditions
        weights = self.pinned(name, told)
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
            _check_gradient(f"site {name!r}")
        return self.ask(name, x, told, current.features)

    def fanned(self, name: str, x: Tensor, output: GateOutput, current: Pass) -> Fanned:
        """A feed-forward's input, fanned out as its site's result says."""
        output = self._for_rows(name, output, x.shape[0], current)
        site = [place for place, one in enumerate(self.experts) if one in self.sites[name].experts]
        told = current.conditions
        seeds = None if told.seeds is None else spread(told.seeds.to(x.device), x.shape[0])
        return fan(x, output.weights, output.experts, site, told.strength, seeds, name)

    def chosen(self, path: str, rows: int, current: Pass, again: bool) -> Chosen | None:
        """The weights, strength included, that the layer at `path` applies to its rows.

        Args:
            path: The layer's.
            rows: How many rows it reads.
            current: The pass that it is in.
            again: Whether a part of that pass runs again, during backward.

        Raises:
            RuntimeError: The layer runs before its gate, or where its gate's gradient is lost.
        """
        site, name = self.site_of[path], self.site_of[path].name
        earlier = (current.replayed, current.results) if again else (current.results, current.held)
        output = earlier[0].get(name, earlier[1].get(name))
        fanned = (current.refanned if again else current.fanned).get(name)
        if current.conditions.disabled:
            return None
        if current.conditions.preview:
            return self._previewed(current.conditions)
        if output is not None and output.weights.requires_grad and current.grad:
            _check_gradient(path)
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

    def pinned(self, name: str, told: Conditions) -> Tensor | None:
        """The weights that are given for a site in its gate's place."""
        return None if told.pinned is None else told.pinned.get(name, told.pinned.get(EVERYWHERE))

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


def _check_gradient(where: str) -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"{where} runs without gradient inside a forward that has one: re-entrant "
            "checkpointing would lose the gates' gradient; enable checkpointing with "
            "use_reentrant=False"
        )

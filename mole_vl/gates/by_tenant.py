"""Several mixtures on one base: each row is one tenant's, and goes to that tenant's experts alone.

Shape legend: r rows, P positions, E experts, K chosen ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mole_vl.faults import refuse
from mole_vl.gates.gate import Gate, GateInput, GateSpec
from mole_vl.gates.output import NOBODY, GateOutput
from mole_vl.layers import MixtureLayer
from mole_vl.plans import in_order
from mole_vl.sites import Site


def tenant_key(name: str) -> str:
    """Where a tenant's gate lies in that of all: a module's name has no points and is no method."""
    return f"of {name}".replace(".", "/")


class TenantsGate(Gate):
    """A site's gate of each tenant that has experts there.

    Args:
        gates: By tenant's name.
        tenants: The names of all tenants, in order.
        places: The places of each tenant's experts among all, by its name.
        experts: E.
    """

    def __init__(
        self,
        gates: Mapping[str, Gate],
        tenants: Sequence[str],
        places: Mapping[str, Sequence[int]],
        experts: int,
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleDict({tenant_key(name): gate for name, gate in gates.items()})
        self.order = {name: place for place, name in enumerate(tenants) if name in gates}
        self.experts = experts
        for name in gates:
            own = torch.tensor(places[name])
            self.register_buffer(f"places_{self.order[name]}", own, persistent=False)

    def own(self, name: str) -> Tensor:
        """The places of a tenant's experts among all."""
        return self.get_buffer(f"places_{self.order[name]}")

    def forward(self, given: GateInput, matrices: Sequence[MixtureLayer]) -> GateOutput:
        """Weights and places (r, K), or (r, P, K) where a tenant's vary by position; logits too."""
        if given.tenant is None:
            raise RuntimeError(
                f"rows are those of the tenants {', '.join(self.order)}: say whose each is, by "
                "condition(tenant=...)"
            )
        found = {}
        for name, number in self.order.items():
            rows = (given.tenant == number).nonzero().squeeze(-1)
            if len(rows):
                found[name] = rows, self._one(name, rows, given, matrices)
        return self._joined(found, given)

    def _one(
        self, name: str, rows: Tensor, given: GateInput, matrices: Sequence[MixtureLayer]
    ) -> GateOutput:
        """What a tenant's gate says of its rows, of its own experts: (rows, ..., K)."""
        x, pool, real, seeds = (
            None if one is None else one[rows]
            for one in (given.x, given.pool, given.real, given.seeds)
        )
        kept = None if given.kept is None else given.kept[self.own(name)]
        told = replace(given, x=x, pool=pool, real=real, kept=kept, tenant=None, seeds=seeds)
        output = self.gates[tenant_key(name)](told, matrices)
        if output.weights.dim() == 1:
            wide = [one.expand(len(rows), -1) for one in (output.weights, output.logits)]
            output = replace(output, weights=wide[0], logits=wide[1])
        if output.experts is None:
            every = torch.arange(output.weights.shape[-1], device=output.weights.device)
            output = replace(output, experts=every.expand(output.weights.shape))
        return output

    def _joined(
        self, found: Mapping[str, tuple[Tensor, GateOutput]], given: GateInput
    ) -> GateOutput:
        assert given.tenant is not None
        outputs = [output for _, output in found.values()]
        by_place = given.x is not None and any(one.weights.dim() == 3 for one in outputs)
        lead = [
            len(given.tenant),
            *(given.x.shape[1:2] if by_place and given.x is not None else ()),
        ]
        k = max((one.weights.shape[-1] for one in outputs), default=1)
        device = given.tenant.device
        weights = torch.zeros(*lead, k, device=device)
        experts = torch.full((*lead, k), NOBODY, device=device)
        logits = torch.full((*lead, self.experts), -math.inf, device=device)
        for name, (rows, output) in found.items():
            own = self.own(name)
            assert output.experts is not None
            chosen = own[output.experts.clamp_min(0)].masked_fill(output.experts < 0, NOBODY)
            scores = torch.full((*output.logits.shape[:-1], self.experts), -math.inf, device=device)
            scores = scores.index_copy(-1, own, output.logits.float())
            size = output.weights.shape[-1]
            parts = (
                nn.functional.pad(output.weights, (0, k - size)),
                nn.functional.pad(chosen, (0, k - size), value=NOBODY),
                scores,
            )
            if by_place and output.weights.dim() == 2:
                parts = tuple(one.unsqueeze(1).expand(-1, lead[1], -1) for one in parts)
            weights = weights.index_copy(0, rows, parts[0].float())
            experts = experts.index_copy(0, rows, parts[1])
            logits = logits.index_copy(0, rows, parts[2])
        return GateOutput(weights, experts, logits)

    def of(self, name: str, output: GateOutput, rows: Tensor) -> GateOutput | None:
        """A tenant's part of what the gate said, as its own gate would have said it alone.

        Args:
            name: The tenant.
            output: What the gate said.
            rows: The tenant's rows.

        Returns:
            Of its own experts; None where it has none at this site.
        """
        if name not in self.order:
            return None
        own = self.own(name)
        assert output.experts is not None
        weights, experts, logits = (
            one[rows] for one in (output.weights, output.experts, output.logits)
        )
        if getattr(self.gates[tenant_key(name)], "constant", False):
            every = in_order(weights, experts, self.experts)[..., own]
            return GateOutput(every, None, every)
        match = experts.unsqueeze(-1) == own
        local = torch.where(match.any(-1), match.int().argmax(-1), NOBODY)
        return GateOutput(weights, local, logits[..., own])


@dataclass(frozen=True, kw_only=True)
class ByTenant(GateSpec):
    """The gates of several mixtures, and whose experts are whose.

    Args:
        gates: The specification of each tenant's gates, by its name.
        experts: Names of each tenant's experts.
    """

    gates: Mapping[str, GateSpec]
    experts: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        listed = [name for names in self.experts.values() for name in names]
        twice = sorted({name for name in listed if listed.count(name) > 1})
        refuse(
            "ByTenant",
            [
                None if self.gates else "gates is empty, expected a tenant at least",
                None
                if self.gates.keys() == self.experts.keys()
                else f"gates are of {', '.join(self.gates)}, experts of {', '.join(self.experts)}",
                f"the experts {', '.join(twice)} have two tenants" if twice else None,
            ],
        )

    @property
    def reads_input(self) -> bool:
        """Whether any tenant's gates look at their sites' inputs."""
        return any(spec.reads_input for spec in self.gates.values())

    def blind(self) -> GateSpec:
        """Those of the tenants."""
        return replace(self, gates={name: spec.blind() for name, spec in self.gates.items()})

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module."""
        places = {name: [experts.index(one) for one in own] for name, own in self.experts.items()}
        gates = {}
        for name, spec in self.gates.items():
            here = tuple(one for one in self.experts[name] if one in site.experts)
            if here:
                gates[name] = spec.build(self.experts[name], replace(site, experts=here), matrices)
        return TenantsGate(gates, list(self.gates), places, len(experts))

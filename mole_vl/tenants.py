"""Several LoRAs and mixtures on one base: trained together, served together, each by itself.

Every row of a batch is one tenant's. What is one tenant's never meets another's rows, so that each
learns, and answers, as it would alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from mole_vl.build import check_unmixed, mix
from mole_vl.calls import Calls
from mole_vl.experts import Expert
from mole_vl.faults import plain_word, refuse
from mole_vl.files import check_replaceable, new_folder
from mole_vl.gate_file import GateFile, write_gates
from mole_vl.gates import ByTenant, GateSpec, Sum, TenantsGate
from mole_vl.gates.by_tenant import tenant_key
from mole_vl.method import Method
from mole_vl.mixture import Mixture
from mole_vl.mixture_folder import EXPERTS, GATES, PARTS, read_mixture
from mole_vl.passes import Record
from mole_vl.peft_folder import CONFIG, WEIGHTS, read_peft, write_peft
from mole_vl.sites import SiteKind
from mole_vl.stack import Learning


def mix_tenants(
    model: nn.Module,
    methods: Mapping[str, Method],
    *,
    blocks: Mapping[str, int],
    calls: Calls | None = None,
) -> Mixture:
    """Put several new LoRAs and mixtures into one model, in place, to learn together.

    Forwards then say whose each row is: `mixture.condition(tenant=[...])`.

    Args:
        model: The base, which is frozen.
        methods: The tenants by name.
        blocks: As for `mole_vl.mix`.
        calls: As for `mole_vl.mix`.

    Raises:
        ValueError: No tenant; some whose gates share other layers (MixLoRA and MoLA), or with other
            dropouts; what a method refuses.
    """
    check_unmixed(model)
    refuse("tenants", ["none is given, expected one at least" if not methods else None])
    plans = {name: method.plan(model, blocks) for name, method in methods.items()}
    dropouts = {name: plan.learning.dropout for name, plan in plans.items()}
    refuse(
        "tenants",
        [
            *(plain_word("name", name) for name in methods),
            f"their dropouts differ ({_listed(dropouts)}): give all the same"
            if len(set(dropouts.values())) > 1
            else None,
        ],
    )
    experts = {name: plan.experts for name, plan in plans.items()}
    return _mixed(
        model,
        experts,
        {name: plan.gate for name, plan in plans.items()},
        {name: plan.site for name, plan in plans.items()},
        blocks,
        calls,
        Learning(
            dropout=next(iter(dropouts.values())),
            teams=tuple(len(own) for own in experts.values()),
        ),
    )


def mix_saved_tenants(
    model: nn.Module,
    folders: Mapping[str, str | Path],
    *,
    blocks: Mapping[str, int],
    calls: Calls | None = None,
) -> Mixture:
    """Load several LoRAs and mixtures onto one model, frozen: each row of a batch names its own.

    Args:
        model: The base.
        folders: A PEFT folder, or one that `save_mixture` or `save_tenant` wrote, by tenant.
        blocks: As for `mole_vl.mix`.
        calls: As for `mole_vl.mix`.

    Raises:
        FileNotFoundError: A folder that is none of these.
        ValueError: One that is damaged, or made for another base; mixtures whose gates share
            other layers (MixLoRA and MoLA). The model is as it was then.
    """
    empty = None if folders else "none is given, expected one at least"
    refuse("tenants", [empty, *(plain_word("name", name) for name in folders)])
    experts: dict[str, Sequence[Expert]] = {}
    found: dict[str, GateFile] = {}
    for name, folder in folders.items():
        if (Path(folder) / CONFIG).exists():
            experts[name] = [read_peft(folder)]
            continue
        file, experts[name] = read_mixture(Path(folder))
        # A sum is one wherever its gates stand, and has nothing to load.
        if file.spec != Sum():
            found[name] = file
    mixture = _mixed(
        model,
        experts,
        {name: found[name].spec if name in found else Sum() for name in folders},
        {name: found[name].site if name in found else None for name in folders},
        blocks,
        calls,
        None,
    )
    state = mixture.gates.state_dict()
    given = {
        _shared_key(key, name): tensor
        for name, file in found.items()
        for key, tensor in file.tensors.items()
    }
    faults = [
        f"{key} is no gate of this model, or of another shape"
        for key in given
        if key not in state or given[key].shape != state[key].shape
    ]
    faults += [
        f"{key} is missing in {file.source}"
        for name, file in found.items()
        for key in state
        if _infix(name) in key and key not in given
    ]
    if faults:
        mixture.unmix()
        refuse("tenants", faults[:1])
    mixture.gates.load_state_dict({**state, **given})
    return mixture


def check_tenants_place(name: str, folder: Path) -> None:
    """Raise ValueError unless a tenant can be written there and nothing else would be lost.

    Args:
        name: The setting, for messages.
        folder: The folder, which need not be there.
    """
    check_replaceable(name, folder, (*PARTS, CONFIG, WEIGHTS), "a LoRA or a mixture")


def save_tenant(mixture: Mixture, name: str, folder: str | Path, base: str | None = None) -> None:
    """Write one tenant as it would have been written alone, in one rename.

    A LoRA becomes a PEFT folder; a mixture what `mole_vl.mixture_folder.save_mixture` writes.

    Args:
        mixture: A mixture of tenants.
        name: The tenant.
        folder: Where to.
        base: The base's name, which the experts' folders tell.

    Raises:
        ValueError: There is no such tenant, or a file is in the folder's place.
    """
    spec = _spec(mixture)
    _number(spec, name)
    own = [one for one in mixture.experts() if one.name in spec.experts[name]]
    own = [replace(one, name=one.name.removeprefix(f"{name}."), base=base) for one in own]
    if spec.gates[name] == Sum() and len(own) == 1:
        write_peft(own[0], folder)
        return
    state = mixture.gates.state_dict()
    tensors = {
        key.replace(_infix(name), ".", 1): tensor
        for key, tensor in state.items()
        if _infix(name) in key
    }
    layout = mixture.layout
    with new_folder(Path(folder)) as partial:
        for expert in own:
            write_peft(expert, partial / EXPERTS / expert.name)
        digests = {expert.name: expert.digest for expert in own}
        write_gates(partial / GATES, digests, layout.kind, layout.after, spec.gates[name], tensors)


def tenant_parameters(mixture: Mixture, name: str) -> dict[str, nn.Parameter]:
    """What one tenant has to learn: its experts' factors, its gates' weights."""
    own = mixture.parameters_of_experts(_number(_spec(mixture), name))
    gates = {
        f"gates.{key}": parameter
        for key, parameter in mixture.gates.named_parameters()
        if _infix(name) in key
    }
    return {**own, **gates}


def tenant_records(mixture: Mixture, name: str, records: Sequence[Record]) -> list[Record]:
    """One tenant's part of what gates said, as its mixture alone would have recorded it.

    Args:
        mixture: A mixture of tenants.
        name: The tenant.
        records: What `record()` listed.
    """
    number, found = _number(_spec(mixture), name), []
    for record in records:
        gate = mixture.gate(record.site)
        assert isinstance(gate, TenantsGate) and record.tenant is not None
        rows = (record.tenant.to(record.output.weights.device) == number).nonzero().squeeze(-1)
        output = gate.of(name, record.output, rows)
        if output is not None and len(rows):
            real = None if record.real is None else record.real[rows.to(record.real.device)]
            found.append(replace(record, output=output, real=real, tenant=None))
    return found


def _mixed(
    model: nn.Module,
    experts: Mapping[str, Sequence[Expert]],
    gates: Mapping[str, GateSpec],
    sites: Mapping[str, SiteKind | None],
    blocks: Mapping[str, int],
    calls: Calls | None,
    learning: Learning | None,
) -> Mixture:
    kinds: dict[str, SiteKind] = {n: kind for n, kind in sites.items() if kind is not None}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"tenants: their gates share other layers ({_listed(kinds)}), which one model cannot "
            "have at once: put them in several"
        )
    renamed = {
        name: [replace(one, name=f"{name}.{one.name}") for one in own]
        for name, own in experts.items()
    }
    spec = ByTenant(
        gates=gates, experts={name: tuple(e.name for e in own) for name, own in renamed.items()}
    )
    every = [one for own in renamed.values() for one in own]
    kind: SiteKind = next(iter(kinds.values())) if kinds else "network"
    return mix(model, every, gate=spec, site=kind, blocks=blocks, calls=calls, learning=learning)


def _spec(mixture: Mixture) -> ByTenant:
    if not isinstance(mixture.spec, ByTenant):
        raise ValueError("this is no mixture of tenants: make it with mix_tenants")
    return mixture.spec


def _number(spec: ByTenant, name: str) -> int:
    """A tenant's place among all."""
    names = list(spec.gates)
    if name not in names:
        raise ValueError(f"tenant {name!r} is none of this mixture's, which are {', '.join(names)}")
    return names.index(name)


def _shared_key(key: str, name: str) -> str:
    """Where a gate's tensor lies among the tenants': behind its site's name."""
    site, dot, rest = key.partition(".")
    return f"{site}{_infix(name).rstrip('.')}{dot}{rest}"


def _infix(name: str) -> str:
    """What stands in the key of a tenant's gate tensor, behind its site's."""
    return f".gates.{tenant_key(name)}."


def _listed(told: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in told.items())

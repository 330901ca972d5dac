"""`mix`: put experts and gates into a model that is already there."""

from collections.abc import Mapping, Sequence

from torch import nn

from mole_vl.calls import Calls
from mole_vl.experts import Expert, check_fit, check_names
from mole_vl.faults import at_least, instance_of, refuse
from mole_vl.features import Features
from mole_vl.gates import GateSpec
from mole_vl.layers import layer_shapes
from mole_vl.mixture import Mixture
from mole_vl.sites import Layout, SiteKind, find_sites
from mole_vl.slots import Slots
from mole_vl.stack import Learning
from mole_vl.wiring import ATTRIBUTE


def mix(
    model: nn.Module,
    experts: Sequence[Expert],
    *,
    gate: GateSpec,
    site: SiteKind = "block",
    after: int = 0,
    blocks: Mapping[str, int] | None = None,
    slots: Mapping[str, Sequence[str]] | None = None,
    features: Features | None = None,
    calls: Calls | None = None,
    learning: Learning | None = None,
) -> Mixture:
    """Mix experts into a model, in place: its base is frozen, its layers get their experts.

    Args:
        model: Any torch model; its linear layers and convolutions at the experts' paths are
            replaced.
        experts: At least one; ranks, alphas and targets may differ.
        gate: What decides the weights.
        site: Which layers share one gate.
        after: With site network or preview, how many of the blocks that carry experts run before
            the gate reads: deeper states tell more. With network the blocks before have constant
            (learned) weights; with preview they run twice (see `Mixture.preview`).
        blocks: Width of each of the model's blocks, by path (`nlp.blocks`, `dreambooth.blocks`).
        slots: The names of the experts that may fill each slot, by the slot's name, for gates that
            weigh slots: every row says who fills its own (`Mixture.condition`). Their file names
            slots, so that `mix_from` takes any expert under a slot's name.
        features: What the model itself is told at each forward and all gates read beside their
            sites' input, starting at zero (`dreambooth.conditioning`).
        calls: Reads what a forward's own arguments tell of its rows, where no `condition` does: so
            a gate over rows holds for a whole answer in anybody's loop (`nlp.calls.TextCalls`).
        learning: How the experts learn with their gates (`mole_vl.fresh.fresh_experts` makes new
            ones); None for frozen experts.

    Returns:
        The handle, also found as `model.mixture`. Nothing of the model has changed on an error.

    Raises:
        ValueError: Experts that share a name or do not fit the model, a gate that is no
            specification; sites that need blocks; features for gates that read none.
        RuntimeError: The model is mixed already.
    """
    check_unmixed(model)
    check_names(experts)
    refuse("mix", [instance_of("gate", gate, GateSpec)])
    if features is not None:
        refuse("mix", _faults_with(features, gate, site))
    shapes = layer_shapes(model)
    check_fit(experts, shapes)
    paths = {
        path: model.get_submodule(path)
        for path in shapes
        if any(path in expert.layers for expert in experts)
    }
    widths = {path: shapes[path][1] for path in paths}
    layout = find_sites(site, model, widths, blocks or {}, after)
    layout = layout.staffed({expert.name: expert.layers for expert in experts})
    if gate.preview != "base":
        refuse("mix", _faults_of_preview(gate, layout, slots))
    if features is not None:
        layout = layout.conditioned(features.width)
    roles = None if slots is None else Slots.of(slots, [expert.name for expert in experts])
    mixture = Mixture(experts, gate, layout, paths, roles, features, calls, learning)
    mixture.wire(model)
    return mixture


def check_unmixed(model: nn.Module) -> None:
    """Raise RuntimeError if the model has a mixture."""
    if hasattr(model, ATTRIBUTE):
        raise RuntimeError("this model is mixed already: call model.mixture.unmix() first")


def _faults_of_preview(
    gate: GateSpec, layout: Layout, slots: Mapping[str, Sequence[str]] | None
) -> list[str | None]:
    where = f"the gate's preview is {gate.preview!r}, "
    if layout.kind != "preview":
        return [f"{where}which is for site 'preview', not {layout.kind!r}"]
    inside = tuple(f"{block}." for block in layout.blocks)
    early = any(not path.startswith(inside) for path in layout.sites[0].matrices)
    return [
        None if slots is None else f"{where}and slots have no average: use 'base'",
        None if gate.reads_input else f"{where}and the gate reads nothing: use 'base'",
        None
        if layout.after > 0 or early
        else f"{where}and with after 0 the gate reads before any expert speaks: set after",
    ]


def _faults_with(features: Features, gate: GateSpec, site: SiteKind) -> list[str | None]:
    constant = (
        f"features {features.name!r} are given, and the gate {type(gate).__name__} reads none: "
        "leave them out, or use a gate that learns, such as MoLE()"
    )
    previews = site == "preview" and gate.reads_input
    changing = (
        f"features {features.name!r} change with every forward, and site 'preview' finds weights "
        "before the forwards that they serve: leave them out, or use another site"
    )
    held = (
        f"features {features.name!r} are told once for all forwards of a row, by what site "
        "'preview' is shown: use that site, and a gate that reads its input, or leave them out"
    )
    return [
        at_least("features.width", features.width, 1),
        None if gate.takes_features else constant,
        changing if site == "preview" and not features.held else None,
        held if features.held and not previews else None,
    ]

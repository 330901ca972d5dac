"""The handle of a mixed model: gates, contexts, and the way back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mole_vl import given
from mole_vl.answers import Answers
from mole_vl.bank import GateBank
from mole_vl.calls import Calls
from mole_vl.dispatch import Dispatch
from mole_vl.experts import Expert
from mole_vl.faults import some
from mole_vl.features import Features
from mole_vl.feedforward import layer_kind
from mole_vl.gates import ByTenant, Gate, GateSpec
from mole_vl.layers import Chosen, MixtureLayer
from mole_vl.passes import EVERYWHERE, Masks, Record
from mole_vl.sites import Layout
from mole_vl.slots import Slots
from mole_vl.stack import Learning
from mole_vl.wiring import Wiring


class Mixture(nn.Module):
    """A mixed model's handle, registered on it as `model.mixture`. Made by `mix`.

    Contexts hold for the forwards begun inside them by the thread that entered; another thread's
    forward waits.

    Args:
        experts: The experts in order.
        spec: The gates' specification.
        layout: Where gates sit.
        paths: The layers that are to carry experts, with their frozen base layers.
        slots: What the gates weigh, if it is not the experts themselves.
        features: What the model itself is told and the gates read; the layout knows their width.
        calls: Reads what a forward's arguments tell of its rows.
        learning: How the experts learn; None for frozen ones.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        spec: GateSpec,
        layout: Layout,
        paths: Mapping[str, nn.Module],
        slots: Slots | None = None,
        features: Features | None = None,
        calls: Calls | None = None,
        learning: Learning | None = None,
    ) -> None:
        super().__init__()
        self.slots = slots
        self.names = tuple(expert.name for expert in experts)
        self.learning = learning
        self._digests = tuple(expert.digest for expert in experts)
        self.spec = spec
        self.layout = layout
        self.sites = {site.name: site for site in layout.sites}
        owners = {path: site.feedforward for site in layout.sites for path in site.matrices}
        layers = {
            path: layer_kind(path, base, owners[path])(
                path,
                base,
                [expert.layers.get(path) for expert in experts],
                partial(self._weights_of, path),
                learning,
            )
            for path, base in paths.items()
        }
        gates, readers = {}, {}
        for site in layout.sites:
            members = [layers[path] for path in site.matrices]
            readers[site.name] = tuple(m for m in members if m.in_features == site.width)
            own = spec if site.entry is not None else spec.blind()
            gate = own.build(self.weighed, site, readers[site.name])
            gates[site.name] = gate.to(members[0].a.device)
        # A ModuleDict key must hold no dots (a module's path holds no slash), and be no method.
        self.gates = nn.ModuleDict({f"at {name}".replace(".", "/"): g for name, g in gates.items()})
        bank = GateBank(gates, readers, slots)
        self._answers = Answers(layout, bank, spec.reads_input, self.names, spec.preview)
        self._dispatch = Dispatch(self._answers, layout.blocks, features, calls)
        # In a plain dict: the model registers the layers, the handle must not do it again.
        self.layers: Mapping[str, MixtureLayer] = layers
        self._wiring: Wiring | None = None

    def wire(self, model: nn.Module) -> None:
        """Put the mixture layers into the model, hook the gates in, freeze the base."""
        self._wiring = Wiring(model, self, self.layers, self._dispatch)
        self.train(model.training)

    @property
    def digests(self) -> tuple[str, ...]:
        """A hash of each expert's factors, as they are now."""
        if self.learning is None:
            return self._digests
        return tuple(expert.digest for expert in self.experts())

    def experts(self) -> list[Expert]:
        """The experts as they are now, in order; copies where they learn."""
        return [
            Expert(
                name,
                {
                    path: factors
                    for path, layer in self.layers.items()
                    if (factors := layer.factors(place)) is not None
                },
            )
            for place, name in enumerate(self.names)
        ]

    def parameters_of_experts(self, team: int | None = None) -> dict[str, nn.Parameter]:
        """What experts that learn have to learn, by layer, factor and team.

        Args:
            team: The one that is meant (`Learning.teams`); all of them if not given.
        """
        return {
            f"{path}.{name}": layer.get_parameter(name)
            for path, layer in self.layers.items()
            for name in layer.own_names
            if team is None or name.endswith(f".{team}")
        }

    def train(self, mode: bool = True) -> "Mixture":
        """Gates and experts in training, or not; the base stays in the mode that it is in."""
        for layer in self.layers.values():
            layer.training = mode
        return super().train(mode)

    def _weights_of(self, path: str, rows: int) -> Chosen | None:
        return self._dispatch.weights_of(path, rows)

    def _wired(self) -> Wiring:
        if self._wiring is None:
            raise RuntimeError("this mixture was unmixed: mix the model again")
        return self._wiring

    def _told(self, **changes: Any) -> AbstractContextManager[None]:
        self._wired()
        return self._dispatch.told(**changes)

    # Contexts

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the base speaks alone."""
        return self._told(disabled=True)

    def scaled(self, strength: float | Tensor) -> AbstractContextManager[None]:
        """A context in which the whole mixture is multiplied by `strength`, within others too.

        Raises:
            ValueError: The strength is no number, or more than one.
        """
        given.check_strength(strength)
        return self._told(strength=self._dispatch.conditions.strength * strength)

    def masked(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """A context without the named experts; what the others get is the normaliser's to say.

        Inside another such context, both hold. Weights held from before are found anew inside.

        Raises:
            ValueError: An unknown name, or no expert left; gates that weigh slots.
        """
        if self.slots is not None:
            raise ValueError(
                "masked: these gates weigh slots, and a slot is not without its expert; pin the "
                "weights, or load the gates over the slots' own experts"
            )
        if isinstance(names, str):
            names = [names]
        given.check_known(names, self.names)
        kept = torch.tensor([name not in names for name in self.names], device=self._device())
        if self._dispatch.conditions.kept is not None:
            kept = kept & self._dispatch.conditions.kept
        if not kept.any():
            raise ValueError("masked: no expert is left; disabled() lets the base speak alone")
        held = None if self._dispatch.conditions.held is None else {}
        return self._told(kept=kept, held=held)

    def pinned(self, weights: Tensor | Mapping[str, Any]) -> AbstractContextManager[None]:
        """A context in which given weights replace the gates'.

        Args:
            weights: (E,) or (rows, E) in the order of `names`; or a weight by expert's name, zero
                for the others; or one of these by site's name, the other sites keeping their gates.

        Raises:
            ValueError: A name that is neither an expert's nor a site's, or a wrong length.
        """
        if isinstance(weights, Mapping) and weights and set(weights) <= set(self.sites):
            return self._told(pinned={k: self._vector(v) for k, v in weights.items()})
        return self._told(pinned={EVERYWHERE: self._vector(weights)})

    def condition(
        self,
        *,
        real: Tensor | None = None,
        pool: Tensor | None = None,
        source: Tensor | None = None,
        filled: Tensor | None = None,
        tenant: Sequence[str] | None = None,
        seeds: Tensor | None = None,
        streams: Mapping[str, Masks] | None = None,
        hold: bool = False,
    ) -> AbstractContextManager[None]:
        """A context that tells the gates of the rows that the forwards inside carry.

        It says all there is to say of them: nothing of an outer `condition` holds inside.

        Args:
            real: Positions that are no padding, (rows, positions) bool.
            pool: Positions that a row's features average over; the real ones if not given.
            source: For each row, the row whose gate result it takes, (rows,) long: a picture's
                negative row takes its positive row's.
            filled: For each row, the place among `names` of the expert in each slot, (rows, S)
                long: for a mixture whose gates weigh slots.
            tenant: The name of each row's tenant: for a mixture of several (`mole_vl.tenants`).
            seeds: What each row's dropout and jitter are drawn from in training, (rows,) int64, so
                that it does not matter who runs beside it; torch's own generator if not given.
            streams: Other masks for parts of the model that read another sequence, such as a
                decoder, by the part's path; the nearest part decides.
            hold: Whether the first forward's row weights serve all forwards inside: a prompt's,
                while its answer is generated.

        Raises:
            ValueError: `filled` for gates that weigh experts, or an expert in a wrong slot; an
                unknown tenant; a stream of a part that the model lacks.
        """
        strange = [path for path in streams or () if path not in self._wired().paths]
        if strange:
            raise ValueError(
                f"condition: streams names {strange[0]!r}, and the model has no such part"
            )
        if filled is not None:
            if self.slots is None:
                raise ValueError("condition: filled is for gates that weigh slots; mix with slots")
            filled = self.slots.checked(filled)
        return self._told(
            told=True,
            masks=Masks(real, pool),
            streams=streams or {},
            source=source,
            filled=filled,
            tenant=None if tenant is None else given.tenants(tenant, self.tenants),
            seeds=seeds,
            held={} if hold else None,
        )

    def preview(self, *args: Any, **kwargs: Any) -> None:
        """With site preview, find the weights that the forwards to come take.

        The base alone runs, or the experts' average (`MoLE.preview`), its graph unkept, up to the
        block whose input the gate reads. Where the gate learns, call this with gradient enabled:
        its weights have one. Other sites need no preview: nothing runs then.

        Args:
            args: As for a forward of the model. It must leave no trace, so no cache.
            kwargs: As for a forward of the model.

        Raises:
            RuntimeError: Called outside of `condition(hold=True)`, whose forwards take the weights.
        """
        model = self.model
        self._dispatch.preview(lambda: model(*args, **kwargs))

    @contextmanager
    def record(self) -> Iterator[list[Record]]:
        """A context that lists each gate's result, once a forward; an outer one lists it too."""
        records: list[Record] = []
        outer = self._dispatch.conditions.records
        with self._told(records=records):
            try:
                yield records
            finally:
                if outer is not None:
                    outer.extend(records)

    def _vector(self, weights: Any) -> Tensor:
        return given.vector(weights, self.names, self._device())

    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).a.device

    # The model

    @property
    def weighed(self) -> tuple[str, ...]:
        """What the gates weigh: the experts, or the slots."""
        return self.names if self.slots is None else self.slots.names

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names of the tenants, for a mixture of several (`mole_vl.tenants`); none otherwise."""
        return tuple(self.spec.gates) if isinstance(self.spec, ByTenant) else ()

    @property
    def model(self) -> nn.Module:
        """The mixed model."""
        return self._wired().model

    @property
    def baked(self) -> bool:
        """Whether constant weights are folded into the base, and no context is heard."""
        return self._dispatch.silent

    @property
    def features(self) -> Features | None:
        """What the model itself is told and the gates read."""
        return self._dispatch.features

    @property
    def reads(self) -> str | None:
        """What the gates' weights vary with, in words; None for constant ones."""
        told = [] if self.features is None else [self.features.name]
        return " and ".join(["their input"] * self.spec.reads_input + told) or None

    def base_state_dict(self) -> dict[str, Tensor]:
        """The base model's own state under its own keys: what saving the base must write."""
        return self._wired().base_state_dict()

    def bake(self, weights: Tensor | Mapping[str, Any] | None = None) -> None:
        """Fold constant weights into the base's own; the gates are silent from then on.

        Args:
            weights: As for `pinned`, without rows; None for the gates' own weights, which must
                not vary then.

        Raises:
            ValueError: The gates' weights vary with the input and none are given, or a base
                weight is quantised.
            RuntimeError: The mixture is baked already.
        """
        wiring = self._wired()
        wiring.check_foldable()
        wiring.fold(self.constant_weights(weights))
        self._dispatch.silent = True

    @torch.no_grad()
    def constant_weights(
        self, weights: Tensor | Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """The weights (E,) of each layer, by its path, as `bake` would fold them in.

        Args:
            weights: As for `bake`.

        Raises:
            ValueError: The gates' weights vary with the input and none are given.
        """
        return {path: self._constant(path, weights) for path in self.layers}

    def _constant(self, path: str, told: Tensor | Mapping[str, Any] | None) -> Tensor:
        name = self._answers.site_of[path].name
        if isinstance(told, Mapping) and name in told:
            weights = self._vector(told[name])
        elif told is not None:
            weights = self._vector(told)
        elif self.slots is not None:
            raise ValueError("these gates weigh slots, whose experts change: give the weights")
        elif self.reads:
            raise ValueError(
                f"these gates read {self.reads}, so their weights vary; give the weights to "
                "bake, such as the mean of what record() lists"
            )
        else:
            weights = self._answers.bank.constant(name)
        if weights.dim() != 1:
            raise ValueError(f"weights of shape {tuple(weights.shape)}, expected (experts,)")
        site = self._answers.site_of[path]
        named = zip(self.names, weights.tolist(), strict=True)
        speaking = [weight for name, weight in named if weight and name in site.experts]
        if site.feedforward is not None and speaking not in ([], [1.0]):
            raise ValueError(
                f"{site.name}: its experts each run the whole feed-forward, and no sum of updates "
                "does that for several: give weight 1 to one of them and 0 to the others"
            )
        return weights

    def unmix(self) -> nn.Module:
        """Give the base model back, bit for bit, and return it; the handle is of no use then."""
        model = self._wired().undo()
        self._wiring = None
        return model

    def forward(self, x: Any) -> Any:
        """Its input: in a model that calls all its children in turn, the handle stands aside."""
        return x

    def gate(self, site: str) -> Gate:
        """The gate of a site, by the site's name."""
        return self._answers.bank.gates[site]

    def extra_repr(self) -> str:
        """Experts, gate and sites with their layers, for `print(mixture)`."""
        lines = [
            f"experts: {', '.join(self.names)}",
            f"gate: {self.spec}",
            *([] if self.features is None else [f"features: {self.features.name}"]),
            f"{self.layout.kind} sites:",
        ]
        for site in self.sites.values():
            paths = [path.removeprefix(f"{site.name}.") for path in site.matrices]
            shared = f": {len(paths)} layers ({some(paths)})"
            lines.append(f"  {site.name}{shared if paths != [site.name] else ''}")
        return "\n".join(lines)

"""The adapters that MoE-PEFT publishes for MixLoRA, read: `peft_type: MIXLORA`.

    FOLDER/adapter_config.json
    FOLDER/adapter_model.bin, or adapter_model.safetensors

Of the three ways in which its versions spell keys, whichever fits (layer 0, expert 3):

| | router | expert | names |
|---|---|---|---|
| MoE-PEFT; mixlora 0.2 | layers.0.mlp.moe_gate | layers.0.mlp.up_proj.experts.3 | today's |
| mixlora 0.1 | layers.0.gate | layers.0.experts.3.up_proj | today's |
| m-LoRA | layers.0.gate | layers.0.experts.3.w3_proj | w1, w2, w3 for gate, down, up |

The arithmetic is that of MoE-PEFT's training forward, but for:

- Noise and dropout are of training alone. (There, dropout stays on when an adapter is asked.)
- Switch: a position whose expert is full is the base's own; there it is the module's input. When an
  adapter is asked, every position has its expert; there the experts' results are thrown away.
- Top-p, switch: where a position's weights do not sum to 1, a bias of the feed-forward's last layer
  still counts once.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mole_vl.build import mix
from mole_vl.calls import Calls
from mole_vl.experts import Expert, Factors
from mole_vl.faults import refuse, some, told
from mole_vl.feedforward import FeedForward, feed_forwards
from mole_vl.files import read_pickled_tensors, read_tensors
from mole_vl.fresh import Form
from mole_vl.gates.router import RouterGate
from mole_vl.layers import layer_shapes
from mole_vl.mixlora import SHARED, MixLoRA
from mole_vl.mixlora_header import TODAY, read_header
from mole_vl.mixture import Mixture
from mole_vl.nonlinearity import fault_of_nonlinearity
from mole_vl.peft_folder import CONFIG, WEIGHTS
from mole_vl.stack import Learning
from mole_vl.targets import target_layers

_PICKLED = "adapter_model.bin"
_SHARED = "mixlora.layers.{layer}.self_attn.{name}.lora_{letter}.weight"


class _Spelling(NamedTuple):
    router: str
    expert: str
    names: Mapping[str, str]


_FIRST = "mixlora.layers.{layer}.gate.weight"
_SECOND = "mixlora.layers.{layer}.experts.{expert}.{name}.lora_{letter}.weight"
_SPELLINGS = (
    _Spelling(
        "mixlora.layers.{layer}.mlp.moe_gate.weight",
        "mixlora.layers.{layer}.mlp.{name}.experts.{expert}.lora_{letter}.weight",
        {},
    ),
    _Spelling(_FIRST, _SECOND, {}),
    _Spelling(_FIRST, _SECOND, {today: older for older, today in TODAY.items()}),
)


@dataclass(frozen=True)
class Published:
    """A MixLoRA adapter as it was published, for one model.

    Args:
        method: Its kind; what the files do not tell of its training is MoE-PEFT's default.
        experts: expert0, expert1 ..., and, where it changes other layers than feed-forwards,
            `shared`.
        routers: Each feed-forward's router, (E, width), by the feed-forward's path.
        source: Its folder.
    """

    method: MixLoRA
    experts: tuple[Expert, ...]
    routers: Mapping[str, Tensor]
    source: str

    @torch.no_grad()
    def mix(
        self,
        model: nn.Module,
        *,
        blocks: Mapping[str, int],
        calls: Calls | None = None,
        learning: Learning | None = None,
    ) -> Mixture:
        """Mix the model that it was read for, in place.

        Args:
            model: The base.
            blocks: As for `mole_vl.mix`.
            calls: As for `mole_vl.mix`.
            learning: How the experts go on learning; None for frozen ones.

        Raises:
            ValueError: Another model than it was read for.
        """
        mixture = mix(
            model,
            self.experts,
            gate=self.method.gate,
            site="feedforward",
            blocks=blocks,
            calls=calls,
            learning=learning,
        )
        for path, weight in self.routers.items():
            gate = mixture.gate(path)
            assert isinstance(gate, RouterGate)
            gate.weight.copy_(weight)
        return mixture


def read_mixlora(folder: str | Path, model: nn.Module, *, blocks: Mapping[str, int]) -> Published:
    """Read a published MixLoRA adapter.

    Layer N of the files is the Nth of the model's blocks that hold all of the adapter's layers, and
    a layer is the one in its block whose path ends with its name.

    Args:
        folder: Folder with adapter_config.json and adapter_model.bin or .safetensors.
        model: The base that it is for, not mixed.
        blocks: Width of each of the model's blocks, by path.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A damaged file; a config whose arithmetic is not known here, or another one than
            the model's; tensors that are missing, unknown, or of another shape.
    """
    folder = Path(folder)
    method, config = read_header(folder)
    file, tensors = _read_tensors(folder)
    layers = _layers_by_block(model, method, blocks, str(folder / CONFIG))
    owners = feed_forwards(model, (path for own in layers for path in own.values()), blocks)
    if not owners:
        raise ValueError(
            f"{folder / CONFIG}: target_modules ({', '.join(config['target_modules'])}) lie in no "
            "feed-forward of this model, so that the experts change nothing"
        )
    if config.get("act_fn") is not None:
        faults = {
            fault_of_nonlinearity(model, owner, config["act_fn"])
            for owner in dict.fromkeys(owners.values())
        }
        refuse(f"{folder / CONFIG}: act_fn", sorted(fault for fault in faults if fault)[:1])
    if any(len({owners[path] for path in own.values() if path in owners}) != 1 for own in layers):
        raise ValueError(
            f"{folder / CONFIG}: target_modules name layers of several feed-forwards in one block, "
            "and the files have one router for each"
        )
    found = _placed(str(file), tensors, method, layers, owners, layer_shapes(model))
    base = config.get("base_model_name_or_path")
    return Published(
        method=method,
        experts=tuple(
            Expert(name, own, base, str(folder)) for name, own in _factors(found, method).items()
        ),
        routers={place.path: tensor.float() for place, tensor in found.items() if not place.letter},
        source=str(folder),
    )


class _Place(NamedTuple):
    """Where a tensor belongs: to an expert's factor at a layer, or, without a letter, a router."""

    owner: str
    path: str
    letter: str


def _places(
    spelling: _Spelling,
    method: MixLoRA,
    layers: list[dict[str, str]],
    owners: Mapping[str, FeedForward],
) -> Iterator[tuple[str, _Place]]:
    """Every key that a file so spelt has, and the place of its tensor."""
    for number, own in enumerate(layers):
        owner = next(owners[path] for path in own.values() if path in owners)
        yield spelling.router.format(layer=number), _Place("", owner.path, "")
        for name, path in own.items():
            spelt = {"layer": number, "name": spelling.names.get(name, name)}
            for letter in "AB":
                if path not in owners:
                    yield _SHARED.format(**spelt, letter=letter), _Place(SHARED, path, letter)
                    continue
                for expert in range(method.experts):
                    key = spelling.expert.format(**spelt, letter=letter, expert=expert)
                    yield key, _Place(f"expert{expert}", path, letter)


def _placed(
    file: str,
    tensors: Mapping[str, Tensor],
    method: MixLoRA,
    layers: list[dict[str, str]],
    owners: Mapping[str, FeedForward],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[_Place, Tensor]:
    """The tensors by their places, all of them and no others."""
    spelt = [dict(_places(spelling, method, layers, owners)) for spelling in _SPELLINGS]
    places = max(spelt, key=lambda own: len(own.keys() & tensors.keys()))

    widths = {owner.path: owner.width for owner in owners.values()}

    def shape(place: _Place) -> tuple[int, ...]:
        if not place.letter:
            return method.experts, widths[place.path]
        form = _form(method, place.owner)
        out, width = shapes[place.path]
        return (form.rank, width) if place.letter == "A" else (out, form.rank)

    faults = [
        f"{key} is missing, expected {shape(place)}"
        for key, place in places.items()
        if key not in tensors
    ]
    faults += [f"{key} is unknown" for key in tensors if key not in places]
    for key, place in places.items():
        if key in tensors and tuple(tensors[key].shape) != shape(place):
            faults.append(f"{key} is {tuple(tensors[key].shape)}, expected {shape(place)}")
        elif key in tensors and not tensors[key].isfinite().all():
            faults.append(f"{key} holds NaN or infinite numbers")
    if faults:
        listed = [*told(faults, 3), f"of {method.experts} experts in {len(layers)} layers"]
        refuse(f"{file} does not fit its config and this model", listed)
    return {place: tensors[key] for key, place in places.items()}


def _factors(found: Mapping[_Place, Tensor], method: MixLoRA) -> dict[str, dict[str, Factors]]:
    """Factors by expert and layer, the shared expert last."""
    experts: dict[str, dict[str, Factors]] = {}
    for place, a in found.items():
        if place.letter == "A":
            b, scale = found[place._replace(letter="B")], _form(method, place.owner).scale
            experts.setdefault(place.owner, {})[place.path] = Factors(a, b, scale)
    return {name: experts[name] for name in sorted(experts, key=_order)}


def _form(method: MixLoRA, owner: str) -> Form:
    return method.shared or method.form if owner == SHARED else method.form


def _order(name: str) -> float:
    return math.inf if name == SHARED else int(name.removeprefix("expert"))


def _layers_by_block(
    model: nn.Module, method: MixLoRA, blocks: Collection[str], where: str
) -> list[dict[str, str]]:
    """The paths of an adapter's layers by their names, in each block that holds them all."""
    names, shapes = method.targets or (), layer_shapes(model)
    held: dict[str, dict[str, list[str]]] = {}
    for name in names:
        for path in target_layers(model, [name]):
            if path in shapes and len(shapes[path]) == 2:
                for block in blocks:
                    if path.startswith(f"{block}."):
                        held.setdefault(block, {}).setdefault(name, []).append(path)
    whole = [own for block in blocks if len(own := held.get(block, {})) == len(names)]
    if not whole:
        missing = [name for name in names if not any(name in own for own in held.values())]
        raise ValueError(
            f"{where}: target_modules names {some(missing or names)}, and no block of this model "
            "has such linear layers; it was made for another kind of base"
        )
    twice = [f"{name} names {', '.join(p)}" for own in whole for name, p in own.items() if p[1:]]
    refuse(f"{where}: target_modules", [f"{one}, expected one layer" for one in twice[:1]])
    return [{name: own[name][0] for name in names} for own in whole]


def _read_tensors(folder: Path) -> tuple[Path, Mapping[str, Tensor]]:
    for name, read in ((WEIGHTS, read_tensors), (_PICKLED, read_pickled_tensors)):
        if (folder / name).is_file():
            return folder / name, read(folder / name)
    raise FileNotFoundError(
        f"{folder / _PICKLED} is missing, and {WEIGHTS} too: copy one there, beside {CONFIG}"
    )

"""Gates on disk: one safetensors file whose header needs nothing retyped.

The header names the experts in order with a hash of each one's factors, the site kind, and the
gate's specification. Loading matches experts by name and reorders them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mole_vl.build import mix
from mole_vl.calls import Calls
from mole_vl.experts import Expert, check_names
from mole_vl.faults import instance_of, one_of, refuse
from mole_vl.features import Features
from mole_vl.files import new_file
from mole_vl.gates import GateSpec
from mole_vl.mixture import Mixture
from mole_vl.sites import SiteKind
from mole_vl.specs import from_data, to_data

FORMAT = "mole-vl gates 1"


@dataclass(frozen=True)
class GateFile:
    """What a gate file holds: the experts' names and digests in order, site kind, gates.

    A slot stands as an expert without a digest: any expert may take its name. `features` names what
    the model itself is told and the gates read; None for nothing.
    """

    source: str
    names: tuple[str, ...]
    digests: tuple[str | None, ...]
    site: SiteKind
    after: int
    spec: GateSpec
    tensors: Mapping[str, Tensor]
    features: str | None = None


def save_gates(mixture: Mixture, path: str | Path) -> None:
    """Write a mixture's gates, in one rename."""
    slots = mixture.slots
    named = (
        dict(zip(mixture.names, mixture.digests, strict=True))
        if slots is None
        else dict.fromkeys(slots.names)
    )
    write_gates(
        path,
        named,
        mixture.layout.kind,
        mixture.layout.after,
        mixture.spec,
        mixture.gates.state_dict(),
        None if mixture.features is None else mixture.features.name,
    )


def write_gates(
    path: str | Path,
    experts: Mapping[str, str | None],
    site: SiteKind,
    after: int,
    spec: GateSpec,
    tensors: Mapping[str, Tensor],
    features: str | None = None,
) -> None:
    """Write a gate file, in one rename; arguments as of `GateFile`, `experts` by name."""
    header = {
        "format": FORMAT,
        "experts": [{"name": name, "sha256": digest} for name, digest in experts.items()],
        "site": site,
        "after": after,
        "gate": to_data(spec),
    }
    if features is not None:
        header["features"] = features
    stored = {key: value.cpu().contiguous() for key, value in tensors.items()}
    with new_file(Path(path)) as partial:
        save_file(stored, partial, metadata={"mole_vl": json.dumps(header)})


def read_gates(path: str | Path) -> GateFile:
    """Read a gate file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or no gate file of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such gate file")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("mole_vl")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    broken = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ValueError(f"{path}: the gates' tensor {broken[0]} holds NaN or infinite values")
    if header is None:
        raise ValueError(f"{path} is no gate file: its header has no 'mole_vl' entry")
    data = _header(path, header)
    try:
        found = GateFile(
            source=str(path),
            names=tuple(entry["name"] for entry in data["experts"]),
            digests=tuple(entry["sha256"] for entry in data["experts"]),
            site=data["site"],
            after=data["after"],
            spec=from_data(data["gate"]),
            tensors=tensors,
            features=data.get("features"),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: the header of the gates lacks or garbles {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: the header's gate is no specification: {error}") from error
    refuse(str(path), _header_faults(found))
    return found


def mix_from(
    model: nn.Module,
    experts: Sequence[Expert],
    path: str | Path,
    *,
    blocks: Mapping[str, int] | None = None,
    allow_changed: bool = False,
    features: Features | None = None,
    calls: Calls | None = None,
) -> Mixture:
    """Mix a model as a gate file says: its experts in its order, its site, its gates.

    Args:
        model: The base.
        experts: The experts by their names, in any order; more than the file names are an error.
        path: The gate file.
        blocks: As for `mix`.
        allow_changed: Whether an expert whose factors differ from those that the gates were
            trained with is taken all the same.
        features: What the model itself is told and the gates read: what `read_gates` names.
        calls: As for `mix`.

    Raises:
        ValueError: A missing or unknown expert, changed factors, other features, gates for other
            sites. The model is left as it was.
    """
    found = read_gates(path)
    _check_features(found, features)
    check_names(experts)
    by_name = {expert.name: expert for expert in experts}
    missing = [name for name in found.names if name not in by_name]
    if missing:
        slots = None in found.digests
        raise ValueError(
            f"{path} gates the experts {', '.join(found.names)}; missing: {', '.join(missing)} "
            f"(given: {', '.join(by_name)})"
            + ("; they are slots: any expert may take a slot's name" if slots else "")
        )
    strange = [name for name in by_name if name not in found.names]
    if strange:
        raise ValueError(f"{path} has no gate for {', '.join(strange)}; leave them out")
    ordered = [by_name[name] for name in found.names]
    if not allow_changed:
        check_unchanged(found, ordered, ", or allow_changed=True")
    mixture = mix(
        model,
        ordered,
        gate=found.spec,
        site=found.site,
        after=found.after,
        blocks=blocks,
        features=features,
        calls=calls,
    )
    try:
        load_gates(mixture, found)
    except BaseException:
        mixture.unmix()
        raise
    return mixture


def check_unchanged(found: GateFile, experts: Sequence[Expert], advice: str = "") -> None:
    """Raise ValueError unless the experts are those that a file's gates were trained with.

    Args:
        found: The file.
        experts: The experts in its order.
        advice: What else can be done.
    """
    changed = [
        expert.name
        for expert, digest in zip(experts, found.digests, strict=True)
        if digest is not None and expert.digest != digest
    ]
    if changed:
        raise ValueError(
            f"{found.source} was trained with other factors of {', '.join(changed)}; use the same "
            f"files{advice}"
        )


@torch.no_grad()
def load_gates(mixture: Mixture, found: GateFile) -> None:
    """Copy a file's gates into a mixture with the same experts in the same order.

    Raises:
        ValueError: Other features, or a gate is missing, unknown, or of another shape; nothing is
            copied then.
    """
    _check_features(found, mixture.features)
    own = mixture.gates.state_dict()
    faults = [f"{key} is missing" for key in own if key not in found.tensors]
    faults += [f"{key} is unknown here" for key in found.tensors if key not in own]
    faults += [
        f"{key} has shape {tuple(tensor.shape)}, expected {tuple(own[key].shape)}"
        for key, tensor in found.tensors.items()
        if key in own and own[key].shape != tensor.shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"{found.source} does not fit this model's sites: {'; '.join(faults[:3])}{more}"
        )
    mixture.gates.load_state_dict(dict(found.tensors))


def _header(path: Path, header: str) -> dict[str, Any]:
    try:
        data = json.loads(header)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the header of the gates is damaged: {error}") from error
    found = data.get("format") if isinstance(data, dict) else data
    if found != FORMAT:
        raise ValueError(f"{path}: format is {found!r}, expected {FORMAT!r}")
    return data


def _header_faults(found: GateFile) -> list[str | None]:
    words = all(isinstance(name, str) for name in found.names)
    return [
        None if words else f"the experts are called {list(found.names)}, expected words",
        one_of("site", found.site, get_args(SiteKind)),
        instance_of("after", found.after, int),
        instance_of("gate", found.spec, GateSpec),
        None if found.features is None else instance_of("features", found.features, str),
    ]


def _check_features(found: GateFile, given: Features | None) -> None:
    own = None if given is None else given.name
    if own != found.features:
        wanted = "no features" if found.features is None else f"the features {found.features!r}"
        raise ValueError(
            f"{found.source}: its gates were trained with {wanted}, and "
            f"{'none are' if own is None else f'{own!r} is'} given: hand `features` what "
            "read_gates(...).features names"
        )

"""Specifications as plain data and back: the headers of gate files."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from mole_vl import gates

# What a header may name: nothing else is ever built from a file.
_KNOWN = {
    kind.__name__: kind
    for kind in (
        gates.Arrow,
        gates.Average,
        gates.BySite,
        gates.Constants,
        gates.Free,
        gates.Hidden,
        gates.KeptArrow,
        gates.LoRAHub,
        gates.MoLE,
        gates.Nearest,
        gates.Phatgoose,
        gates.Responses,
        gates.Router,
        gates.ScaledSoftmax,
        gates.Sigmoid,
        gates.Softmax,
        gates.Sum,
        gates.Switch,
        gates.TopK,
        gates.TopP,
        gates.Usefulness,
    )
}


def to_data(spec: Any) -> Any:
    """A specification as JSON data: `{"kind": "MoLE", "score": {"kind": "Hidden"}, ...}`."""
    if is_dataclass(spec) and not isinstance(spec, type):
        values = {field.name: to_data(getattr(spec, field.name)) for field in fields(spec)}
        return {"kind": type(spec).__name__, **values}
    if isinstance(spec, Mapping):
        return {key: to_data(value) for key, value in spec.items()}
    return spec


def from_data(data: Any) -> Any:
    """The specification that `to_data` wrote.

    Raises:
        ValueError: A kind that is not known here, or settings that it does not take.
    """
    if not isinstance(data, Mapping):
        return data
    if "kind" not in data:
        return {key: from_data(value) for key, value in data.items()}
    kind = _KNOWN.get(data["kind"])
    if kind is None:
        raise ValueError(f"unknown kind {data['kind']!r}, expected one of {', '.join(_KNOWN)}")
    try:
        return kind(**{key: from_data(value) for key, value in data.items() if key != "kind"})
    except TypeError as error:
        raise ValueError(f"{data['kind']}: {error}") from error

"""How a picture was made, kept in the picture's own file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from torch import Tensor

from mole_vl import Mixture
from mole_vl.files import new_file
from mole_vl.specs import to_data

KEY = "mole_vl"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What it takes to draw a picture again.

    Args:
        pipeline: Class of the pipeline.
        base: Where the base came from; None if it was put together by hand.
        experts: SHA-256 of each expert's factors, by component and name.
        gates: SHA-256 of the gates, by component.
        scheduler: Class of the scheduler.
        prompt: What was asked for.
        seed: Of the generator.
        steps: Inference steps.
        guidance_scale: Strength of guidance.
        settings: The call's other arguments, as plain data.
    """

    pipeline: str
    base: str | None
    experts: Mapping[str, Mapping[str, str]]
    gates: Mapping[str, str]
    scheduler: str
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    settings: Mapping[str, Any]


def gates_digest(mixture: Mixture) -> str:
    """SHA-256 of a mixture's gates: kind, site, features and numbers (as fp32)."""
    layout = mixture.layout
    told = [] if mixture.features is None else [mixture.features.name]
    how = [to_data(mixture.spec), layout.kind, layout.after, *told]
    state = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
    for key, tensor in sorted(mixture.gates.state_dict().items()):
        state.update(f"{key} {tuple(tensor.shape)}".encode())
        state.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def as_data(name: str, value: Any) -> Any:
    """An argument as plain data.

    Raises:
        ValueError: It is none that a file can hold.
    """
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **asdict(value)}
    if isinstance(value, Mapping):
        return {key: as_data(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(name, item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ValueError(
        f"recipe: {name} is a {type(value).__name__}, which a file cannot hold; expected numbers, "
        "words, tensors, or lists of them"
    )


def save_picture(picture: Image.Image, path: str | Path, recipe: Recipe) -> None:
    """Write a picture as PNG with its recipe inside, in one rename."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(asdict(recipe)))
    with new_file(Path(path)) as partial:
        picture.save(partial, format="PNG", pnginfo=info)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a picture.

    Raises:
        ValueError: It has none.
    """
    with Image.open(path) as picture:
        text = picture.info.get(KEY)
    if not isinstance(text, str):
        raise ValueError(f"{path} has no recipe: its PNG metadata lack {KEY!r}")
    return Recipe(**json.loads(text))

"""The class pictures of prior preservation: given, or drawn by the base before it is trained."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from tqdm.auto import tqdm

from dreambooth.base import Base
from dreambooth.data import SUFFIXES, Example, picture_files
from dreambooth.drawing import DrawConfig, draw
from dreambooth.grid import to_image
from mole_vl.faults import at_least, positive, refuse
from mole_vl.files import new_file
from mole_vl.training import mix_seed

_DRAWN = "drawn-"
_RECIPE = "drawn.json"
# A stream of random numbers of its own.
_STREAM = 3


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Prior preservation: pictures of the class, so that it stays what it is.

    Args:
        prompt: What the class is called, without the identifier: `a photo of a dog`.
        pictures: Folder of class pictures. What it lacks of `count` the base draws into it before
            the training; broken off, that goes on where it was.
        count: How many there should be; 0 for those that are there.
        weight: Factor of their loss.
    """

    prompt: str
    pictures: Path
    count: int = 100
    weight: float = 1.0

    def __post_init__(self) -> None:
        refuse(
            "PriorConfig",
            [
                None if self.prompt.strip() else "prompt is empty, expected the class in words",
                at_least("count", self.count, 0),
                positive("weight", self.weight),
            ],
        )


def missing_pictures(prior: PriorConfig) -> list[Path]:
    """The files that are still to be drawn."""
    return [file for file in _wanted(prior) if not file.exists()]


def class_examples(prior: PriorConfig) -> list[Example]:
    """The class pictures under the class's prompt, once all are there.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No pictures, or files that are none.
    """
    drawn = set(_wanted(prior))
    files = picture_files(prior.pictures)
    # Of pictures that were drawn for a greater count, as many as this one says.
    kept = [file for file in files if not file.name.startswith(_DRAWN) or file in drawn]
    return [Example(file, prior.prompt) for file in kept]


def draw_class(base: Base, prior: PriorConfig, resolution: int, config: DrawConfig) -> None:
    """Draw what is missing; every process its part.

    Raises:
        ValueError: The folder's drawn pictures were drawn otherwise.
    """
    missing = missing_pictures(prior)
    if not missing:
        return
    accelerator = Accelerator()
    prior.pictures.mkdir(parents=True, exist_ok=True)
    _agree(base, prior, resolution, config)
    accelerator.wait_for_everyone()
    base.to(accelerator.device)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    seeds = [mix_seed(int(file.stem.removeprefix(_DRAWN)), _STREAM) for file in mine]
    pictures = draw(base, [prior.prompt] * len(mine), seeds, resolution, config)
    hidden = not accelerator.is_main_process
    for file, picture in zip(
        mine, tqdm(pictures, prior.prompt, len(mine), disable=hidden), strict=True
    ):
        with new_file(file) as partial:
            to_image(picture).save(partial, format="PNG")
    accelerator.wait_for_everyone()


def check_recipe(base: str, prior: PriorConfig, resolution: int, config: DrawConfig) -> None:
    """Raise ValueError if the folder's drawn pictures were drawn otherwise than now asked."""
    file = prior.pictures / _RECIPE
    if not file.exists():
        return
    then, now = json.loads(file.read_text()), _recipe(base, prior, resolution, config)
    faults = [
        f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in now if then.get(key) != now[key]
    ]
    refuse(f"the pictures drawn in {prior.pictures} (take another folder, or remove them)", faults)


def _agree(base: Base, prior: PriorConfig, resolution: int, config: DrawConfig) -> None:
    check_recipe(base.name, prior, resolution, config)
    if PartialState().is_main_process:
        with new_file(prior.pictures / _RECIPE) as partial:
            recipe = _recipe(base.name, prior, resolution, config)
            partial.write_text(json.dumps(recipe, indent=1) + "\n")


def _recipe(base: str, prior: PriorConfig, resolution: int, config: DrawConfig) -> dict[str, Any]:
    return {
        "base": base,
        "prompt": prior.prompt,
        "negative": config.negative,
        "resolution": resolution,
        "steps": config.steps,
        "guidance": config.guidance,
    }


def _wanted(prior: PriorConfig) -> list[Path]:
    """The files of the drawn pictures that bring the folder up to its count."""
    there = prior.pictures.iterdir() if prior.pictures.is_dir() else ()
    given = [
        file
        for file in there
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(_DRAWN)
    ]
    lacking = max(0, prior.count - len(given))
    return [prior.pictures / f"{_DRAWN}{index:05d}.png" for index in range(lacking)]

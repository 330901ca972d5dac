"""Side by side: one noise under every way to mix."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from apps.session import Drawn, Session
from apps.shelf import Lora
from apps.studio import Pipe, Studio
from mole_vl.faults import between, refuse
from pipelines import Recording, Switch, save_picture

BASE, SUM, NLA, SWITCH, GATES = "base", "sum", "NLA", "Switch", "gates"
_WAYS = (BASE, SUM, NLA, SWITCH, GATES)
_MAX_LETTERS = 1000


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a person asks to be drawn.

    Args:
        prompt: With the LoRAs' trigger words.
        negative: Negative prompt.
        seed: Of the noise that all pictures start from.
        steps: Inference steps.
        guidance: Strength of classifier-free guidance.
        strength: Multiplies every mixture.
        masked: LoRAs that are silent.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    strength: float = 1.0
    masked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        long = max(len(self.prompt), len(self.negative)) > _MAX_LETTERS
        refuse(
            "drawing",
            [
                None if self.prompt.strip() else "the prompt is empty, expected some words",
                f"a prompt is longer than {_MAX_LETTERS} letters" if long else None,
                between("seed", self.seed, 0, 2**32 - 1),
                between("steps", self.steps, 1, 150),
                between("guidance", self.guidance, 1, 30),
                between("strength", self.strength, 0, 3),
            ],
        )

    def call(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """A pipeline's arguments, without prompt and seed."""
        return {
            "negative_prompt": self.negative,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "strength": self.strength,
            **changes,
        }


def arms(names: Sequence[str], masked: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each way to mix changes in a call: base, each LoRA, sum, NLA, Switch, gates.

    Merges are left out where fewer than two LoRAs speak: they would be that one.

    Raises:
        ValueError: All LoRAs are masked, and there were some.
    """
    spoken = [name for name in names if name not in masked]
    refuse("masks", [None if spoken or not names else "every LoRA is masked: tick at least one"])
    found: dict[str, dict[str, Any]] = {BASE: {"strength": 0.0} if names else {}}
    found |= {_arm_of(name): {"weights": {name: 1.0}} for name in spoken}
    if len(spoken) > 1:
        found[SUM] = {"weights": dict.fromkeys(spoken, 1.0)}
        found[NLA] = {"weights": dict.fromkeys(spoken, 1 / len(spoken))}
        found[SWITCH] = {"mixing": Switch(), "masked": tuple(masked)}
    if spoken:
        found[GATES] = {"masked": tuple(masked)}
    return found


def _arm_of(name: str) -> str:
    """A LoRA's arm: one that is called as a way to mix is told apart from it."""
    return f"{name}, the LoRA" if name in _WAYS else name


State = Literal["waiting", "drawing", "done"]


@dataclass(frozen=True)
class Look:
    """How far a side by side is.

    Args:
        state: Whether it waits for its turn, draws, or is done.
        arm: What is drawn.
        share: How much of the whole is done, from 0 to 1.
        pictures: Files so far, by arm.
        weights: The gates' weights, once they have drawn.
    """

    state: State
    arm: str
    share: float
    pictures: Mapping[str, Path]
    weights: Recording | None = None


def side_by_side(
    studio: Studio,
    session: Session,
    loras: Sequence[Lora],
    wish: Wish,
    look: Callable[[Look], None],
) -> None:
    """Draw every arm from the same noise, each into a file that keeps its recipe.

    Args:
        studio: Whose pipeline draws.
        session: Where the files go; its switch ends the drawing.
        loras: What is mixed.
        wish: What is asked for.
        look: Told after every step.

    Raises:
        Stopped: The session's switch said so.
        ValueError: LoRAs, gates or masks that do not fit.
    """
    names = [lora.name for lora in loras]
    todo = arms(names, wish.masked)
    gates = session.gates_of(frozenset(names))

    def waiting() -> None:
        session.drawing.check()
        look(Look("waiting", "", 0.0, {}))

    with session.working(), studio.holding(loras, gates, waiting) as pipe:
        pictures: dict[str, Path] = {}
        weights = None

        def step(arm: str, done: float) -> None:
            session.drawing.check()
            share = (len(pictures) + done) / len(todo)
            look(Look("drawing", arm, share, dict(pictures)))

        for arm, changes in todo.items():
            file = session.new_path(f"{arm}.png")
            with pipe.record() as recorded:
                _draw(pipe, wish, wish.call(changes), file, partial(step, arm))
            pictures[arm] = file
            if arm == GATES:
                weights = recorded
                session.drawn = Drawn(tuple(loras), gates, recorded)
        look(Look("done", "", 1.0, pictures, weights))


def _draw(
    pipe: Pipe, wish: Wish, call: dict[str, Any], file: Path, step: Callable[[float], None]
) -> None:
    def stepped(_pipe: Any, index: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        step((index + 1) / wish.steps)
        return values

    step(0.0)
    noise = torch.Generator().manual_seed(wish.seed)
    drawn = pipe(wish.prompt, generator=noise, callback_on_step_end=stepped, **call)
    save_picture(drawn.images[0], file, pipe.recipe(wish.prompt, seed=wish.seed, **call))

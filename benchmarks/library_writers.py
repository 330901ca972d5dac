"""Processes that change a library at random until they are killed, or for a while.

Each change is told before it begins and when it is done, so that whoever listens knows what must
be there, and what may.
"""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from mole_vl import Expert, Factors
from mole_vl.library import ExpertLibrary, MissingExpertError, NameTakenError

ACTS = ("add", "remove", "rename", "clone", "replace", "restore")
NAMES = tuple(f"e{number}" for number in range(12))
WIDTH = 64


@dataclass(frozen=True)
class Place:
    """How a library is reached; its clones lie beside it."""

    uri: str
    token: str | None = None

    def open(self, *, clone: str = "") -> ExpertLibrary:
        """The library, or a clone of this name."""
        return ExpertLibrary.open(self.beside(clone), self.token, create=True)

    def beside(self, clone: str) -> str:
        """The address of a clone."""
        return f"{self.uri}/{clone}" if clone else f"{self.uri}/library"


@dataclass(frozen=True)
class Step:
    """One change: what is done to a name; with a seed for the expert, or another name."""

    act: str
    name: str
    seed: int
    other: str


@dataclass
class Shelf:
    """What the names of a library should stand for: the digest of each one's expert."""

    present: dict[str, str] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)

    def after(self, step: Step) -> "Shelf":
        """The shelf after a change."""
        present, removed = dict(self.present), dict(self.removed)
        if step.act in ("add", "replace"):
            present[step.name] = expert(step.name, step.seed).digest
            removed.pop(step.name, None)
        elif step.act == "remove":
            removed[step.name] = present.pop(step.name)
        elif step.act == "restore":
            present[step.name] = removed.pop(step.name)
        elif step.act == "rename":
            removed.pop(step.other, None)
            present[step.other] = removed[step.name] = present.pop(step.name)
        return Shelf(present, removed)

    def step(self, chance: random.Random, acts: tuple[str, ...]) -> Step:
        """A change that can be made now."""
        free = [name for name in NAMES if name not in self.present]
        sources: Mapping[str, Any] = {
            "add": free, "restore": self.removed, "remove": self.present,
            "rename": self.present if free else (), "replace": self.present,
            "clone": self.present and ("all",),
        }  # fmt: skip
        act = chance.choice([act for act in acts if sources[act]])
        # A library that grows and shrinks about its middle.
        name = chance.choice(sorted(sources[act]))
        other = chance.choice(free) if free else ""
        return Step(act, name, chance.randrange(2**31), other)


def expert(name: str, seed: int) -> Expert:
    """An expert of mixed ranks, scales and targets."""
    chance = torch.Generator().manual_seed(seed)
    layers = {}
    for number in range(1 + seed % 3):
        rank = 1 + int(torch.randint(8, (1,), generator=chance))
        a = torch.randn(rank, WIDTH, generator=chance)
        b = torch.randn(WIDTH, rank, generator=chance)
        layers[f"layers.{number}.{'qkv'[seed % 3]}"] = Factors(a, b, 0.5 * 2**number)
    return Expert(name, layers, "toy")


def change(library: ExpertLibrary, place: Place, step: Step) -> None:
    """Make a change."""
    if step.act in ("add", "replace"):
        getattr(library, step.act)(expert(step.name, step.seed), task=f"task {step.seed}")
    elif step.act == "rename":
        library.rename(step.name, step.other)
    elif step.act == "clone":
        library.clone(place.beside(f"clone{step.seed}"), place.token)
    else:
        getattr(library, step.act)(step.name)


def write_till_killed(
    place: Place, shelf: Shelf, seed: int, acts: tuple[str, ...], told: Connection
) -> None:
    """Change a library for ever; each change is told before and after."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    library = place.open()
    # Connected, and with all read that is kept, so that the time goes into changes.
    library.list()
    told.send("ready")
    while True:
        step = shelf.step(chance, acts)
        told.send(step)
        change(library, place, step)
        shelf = shelf.after(step)
        told.send("done")


def write_for(place: Place, seconds: float, seed: int, told: Connection) -> None:
    """Change a library beside others for a while; tell what was done, and how often it was refused.

    A change that another writer made impossible must be refused with the error that says so.
    """
    torch.set_num_threads(1)
    chance = random.Random(seed)
    library = place.open()
    done, refused, ends = [], 0, time.monotonic() + seconds
    while time.monotonic() < ends:
        listing = library.list()
        digests = {name: info.digest for name, info in listing.experts.items()}
        shelf = Shelf(digests, dict.fromkeys(listing.removed, ""))
        step = shelf.step(chance, ("add", "remove", "rename", "replace", "restore"))
        try:
            change(library, place, step)
        except (NameTakenError, MissingExpertError):
            refused += 1
        else:
            done.append(step)
    told.send((done, refused))

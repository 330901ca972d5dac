"""Slots: gates that weigh parts to be played (a subject's, a style's) instead of experts.

Trained over several experts in each slot, row by row, such gates serve experts that they never saw:
they read what the site reads, and learn what a part is good for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mole_vl.faults import refuse, some
from mole_vl.gates import GateOutput


@dataclass(frozen=True)
class Slots:
    """Which experts may fill which slot.

    Args:
        names: The slots, in the order of the gates' scores.
        places: For each slot, the places of its experts among all.
        experts: The number of all experts.
    """

    names: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]
    experts: int

    @classmethod
    def of(cls, slots: Mapping[str, Sequence[str]], experts: Sequence[str]) -> "Slots":
        """Slots by name, each with its experts' names.

        Raises:
            ValueError: No slots, an empty one, or an expert that is unknown, in two, or in none.
        """
        listed = [name for names in slots.values() for name in names]
        twice = sorted({name for name in listed if listed.count(name) > 1})
        left = [name for name in experts if name not in listed]
        strange = [name for name in listed if name not in experts]
        refuse(
            "slots",
            [
                None if slots else "none are given, expected at least one",
                *(f"{slot!r} has no expert" for slot, names in slots.items() if not names),
                f"{some(twice)} stands more than once" if twice else None,
                f"{some(left)} is in no slot" if left else None,
                f"there is no expert {some(strange)}" if strange else None,
            ],
        )
        places = tuple(tuple(experts.index(name) for name in names) for names in slots.values())
        return cls(tuple(slots), places, len(experts))

    def checked(self, filled: Tensor) -> Tensor:
        """The expert in each row's slots, (rows, S) long.

        Raises:
            ValueError: Another shape, or an expert that may not fill its slot.
        """
        if filled.dim() != 2 or filled.shape[1] != len(self.names):
            raise ValueError(
                f"filled is of shape {tuple(filled.shape)}, expected (rows, {len(self.names)}): an "
                f"expert's place for each of {', '.join(self.names)}"
            )
        for slot, places, column in zip(self.names, self.places, filled.T.tolist(), strict=True):
            wrong = sorted(set(column) - set(places))
            if wrong:
                raise ValueError(f"filled: the slot {slot!r} has experts {places}, not {wrong[0]}")
        return filled

    def told(self, output: GateOutput, filled: Tensor) -> GateOutput:
        """Weights of slots (S,) or (rows, ..., S) with the expert that each is for.

        Args:
            output: What a gate over slots found.
            filled: The expert in each row's slots, (rows, S).
        """
        weights = output.weights
        if weights.dim() == 1:
            weights = weights.expand(len(filled), -1)
        fill = (1,) * (weights.dim() - 2)
        places = filled.to(weights.device).view(len(filled), *fill, -1).expand(weights.shape)
        return GateOutput(weights, places, output.logits, slots=True)

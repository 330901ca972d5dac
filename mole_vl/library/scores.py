"""How good experts are on tasks: a file for each score, so that no writer overwrites another's."""

import math
from collections.abc import Callable

from mole_vl.faults import refuse
from mole_vl.library.auxiliary import read_kind
from mole_vl.library.batch import Batch
from mole_vl.library.catalogue import Catalogue
from mole_vl.library.errors import MissingScoreError
from mole_vl.library.seals import sha256, to_json

_KIND = "scores"


class Scores:
    """The scores of a library's experts, by task and measure; as of the experts' versions.

    Args:
        catalogue: What is known of the experts.
        batch: How a batch is begun.
    """

    def __init__(self, catalogue: Catalogue, batch: Callable[[], Batch]) -> None:
        self._catalogue = catalogue
        self._batch = batch

    def put(self, task: str, values: dict[str, float], measure: str = "accuracy") -> None:
        """Note how good experts are on a task.

        Args:
            task: The task, in any words.
            values: The score of each expert by name.
            measure: What was measured.

        Raises:
            MissingExpertError: There is no such expert.
            ValueError: A score is no finite number.
        """
        refuse(
            f"scores for {task!r}",
            [
                f"{name}'s is {value!r}, expected a finite number"
                for name, value in values.items()
                if not isinstance(value, int | float) or not math.isfinite(value)
            ],
        )
        notes = {
            name: {"task": task, "measure": measure, "score": value}
            for name, value in values.items()
        }
        with self._batch() as batch:
            batch.attach(_kind(task, measure), notes)

    def get(self, task: str, measure: str = "accuracy") -> dict[str, float]:
        """The scores of all experts that have one for a task, by name."""
        notes = read_kind(self._catalogue, _kind(task, measure))
        return {name: note["score"] for name, note in notes.items()}

    def ranked(
        self, task: str, measure: str = "accuracy", *, highest: bool = True
    ) -> dict[str, float]:
        """The scores of all experts that have one for a task, best first; of equals, by name.

        Args:
            task: The task.
            measure: What was measured.
            highest: Whether more is better.

        Raises:
            MissingScoreError: No expert has one.
        """
        scores = self.get(task, measure)
        if not scores:
            raise MissingScoreError(
                f"{self._catalogue.store.address}: no expert has a score of {measure!r} for the "
                f"task {task!r}: note some with scores.put, or mole transform scores"
            )
        order = sorted(sorted(scores), key=scores.__getitem__, reverse=highest)
        return {name: scores[name] for name in order}

    def best(self, task: str, measure: str = "accuracy", *, highest: bool = True) -> str:
        """The name of the expert with the best score for a task; arguments as of `ranked`."""
        return next(iter(self.ranked(task, measure, highest=highest)))


def _kind(task: str, measure: str) -> str:
    # Tasks have names that no store would take as a part of an address.
    return f"{_KIND}/{sha256(to_json([task, measure], 'task and measure'))[:32]}"

"""Experts of a library over their base: what all programs about libraries ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel

from mole_vl import Expert
from mole_vl.faults import at_least, refuse
from mole_vl.library import ExpertInfo, ExpertLibrary
from mole_vl.library.transforms import common_base, members
from nlp.data import EncodedRow, Style, TextRow, Tokenizer
from nlp.forms import form_of
from nlp.models import Bits, load_base
from nlp.task_sources import Tasks, listed


@dataclass(frozen=True, kw_only=True)
class ShelfConfig:
    """Experts of a library over their base.

    Args:
        library: Address of the library.
        experts: Names of experts with commas between; all but merges if not given.
        base: A Hub id, a folder, or smollm2-135m-instruct (by pip); the one that the experts were
            trained on if not given.
        style: Prompts as they stand (plain), or in the model's chat template (chat).
        context: The most tokens that a row may have.
        batch_rows: Rows in one forward.
        quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
    """

    library: str
    experts: str = ""
    base: str | None = None
    style: Style = "plain"
    context: int = 1024
    batch_rows: int = 16
    quantise: Bits | None = None

    def __post_init__(self) -> None:
        refuse(type(self).__name__, self.faults())

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [
            None if self.library else "library is empty, expected an address",
            at_least("context", self.context, 2),
            at_least("batch_rows", self.batch_rows, 1),
        ]


class Shelf(NamedTuple):
    """A library, and those of its experts that are meant, for one base.

    Args:
        library: The library.
        infos: What is known of the experts.
        base: The base's name.
    """

    library: ExpertLibrary
    infos: Sequence[ExpertInfo]
    base: str

    @property
    def names(self) -> list[str]:
        """The experts' names."""
        return [info.name for info in self.infos]

    def experts(self) -> list[Expert]:
        """The experts, with their weights."""
        return [self.library[name].expert for name in self.names]


def open_shelf(config: ShelfConfig) -> Shelf:
    """The experts that a configuration means.

    Raises:
        FileNotFoundError: There is no library.
        MissingExpertError: There is no expert of a name.
        ValueError: Damaged experts; experts for several bases, or none that tells its base.
    """
    library = ExpertLibrary.open(config.library)
    infos = members(library, listed(config.experts))
    base = config.base or common_base(infos)
    if base is None:
        raise ValueError("the experts do not tell their base: say it by base")
    return Shelf(library, infos, base)


def load_shelf_base(config: ShelfConfig, shelf: Shelf) -> tuple[PreTrainedModel, Tokenizer]:
    """The base of a shelf, and its tokenizer."""
    return load_base(shelf.base, quantise=config.quantise)


def tasks_of(info: ExpertInfo) -> tuple[str, ...]:
    """The tasks that an expert was trained for; if it tells none, the one that is called as it."""
    return tuple(dict.fromkeys(listed(info.task or ""))) or (info.name,)


def rows_by_expert(
    infos: Sequence[ExpertInfo], tasks: Tasks, limit: int | None
) -> dict[str, list[TextRow]]:
    """The first rows of each expert's tasks, by the expert's name.

    Raises:
        ValueError: An expert whose task has no rows.
    """
    refuse(
        "data",
        [
            f"there are no rows of {task!r}, the task of {info.name}"
            for info in infos
            for task in tasks_of(info)
            if task not in tasks.names
        ],
    )
    return {
        info.name: [row for task in tasks_of(info) for row in list(tasks.rows(task))[:limit]]
        for info in infos
    }


def encoded_by_name(
    rows: Mapping[str, Sequence[TextRow]],
    config: ShelfConfig,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
) -> dict[str, list[EncodedRow]]:
    """Rows as token ids.

    Raises:
        ValueError: Rows that are too long.
    """
    return form_of(model).encode_each(
        rows, tokenizer, style=config.style, context=config.context, source="rows of"
    )

"""What a private library is made of: its settings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mole_vl.faults import at_least, refuse, some
from mole_vl.fresh import Form
from mole_vl.library.names import word_fault
from mole_vl.lora import LoRA
from mole_vl.training import FitConfig
from nlp.data import Style
from nlp.dataset import RowSource
from nlp.models import BUILT_IN, Bits
from nlp.task_sources import listed


@dataclass(frozen=True, kw_only=True)
class PrivateLibraryConfig:
    """A library of experts over one base.

    Args:
        library: Address of the library; one is begun where there is none.
        data: Address of a library of tasks (nlp.prepare_tasks); or where each task's rows come
            from, by task: files of JSON lines with prompt, answer and task, or datasets with their
            templates (`nlp.dataset.DatasetRows`).
        fit: The training loop of each expert; a run lies in a folder of its own under its `output`.
        experts: The task that each expert learns, or several with commas between, by the expert's
            name; one expert for each task, called as it is, if not given.
        lora: The form of the experts.
        together: Whether all experts are trained in one pass, each on its own rows of every step's
            batch, instead of one after the other. Without dropout both end with the same weights.
            A pass that breaks off is gone on with one after the other, so that one task's fault is
            not the others'.
        base: A Hub id, a folder, or smollm2-135m-instruct (by pip).
        style: Prompts as they stand (plain), or in the model's chat template (chat).
        context: The most tokens that a row may have.
        only: Names of the experts to train; all of them if empty.
        licence: The terms that the experts come under.
        quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
    """

    library: str
    data: str | Mapping[str, RowSource]
    fit: FitConfig
    experts: Mapping[str, str] = field(default_factory=dict)
    lora: LoRA = LoRA(form=Form(rank=4, alpha=16), dropout=0.0)
    together: bool = False
    base: str = BUILT_IN
    style: Style = "plain"
    context: int = 1024
    only: tuple[str, ...] = ()
    licence: str | None = None
    quantise: Bits | None = None

    def __post_init__(self) -> None:
        refuse(
            "PrivateLibraryConfig",
            [
                None if self.library else "library is empty, expected an address",
                None if self.data else "data is empty, expected an address, or tasks",
                *(word_fault("expert", name) for name in self.experts),
                *(
                    f"expert {name!r} has no task"
                    for name, tasks in self.experts.items()
                    if not listed(tasks)
                ),
                *(
                    f"expert {name!r} has the task {task} twice"
                    for name, tasks in self.experts.items()
                    for task, times in Counter(listed(tasks)).items()
                    if times > 1
                ),
                f"library and data are both {self.library!r}, expected an address each"
                if self.library and self.library == self.data
                else None,
                at_least("context", self.context, 2),
                "fit.micro_rows is set, and together all experts' rows run as one batch: take "
                "fewer rows, or fewer experts at once by only"
                if self.together and self.fit.micro_rows is not None
                else None,
            ],
        )


def experts_of(config: PrivateLibraryConfig, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each expert's tasks, by its name.

    Raises:
        ValueError: Tasks that there are no rows of, names that no library takes, or `only` names
            no expert.
    """
    asked = {name: listed(own) for name, own in config.experts.items()}
    wanted = asked or {task: (task,) for task in tasks}
    strange = sorted({task for own in wanted.values() for task in own} - set(tasks))
    refuse(
        "experts",
        [
            *(word_fault("expert", name) for name in wanted),
            *(f"there are no rows of the task {task!r}; there are {some(tasks)}"
              for task in strange),
            *(
                f"only names {name!r}, expected one of {some(wanted)}"
                for name in config.only
                if name not in wanted
            ),
        ],
    )  # fmt: skip
    return {name: own for name, own in wanted.items() if not config.only or name in config.only}

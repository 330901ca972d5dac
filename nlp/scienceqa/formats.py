"""ScienceQA's prompts and answers by name, such as CQM-A or QCM-ALE.

A name is INPUT-OUTPUT. Its letters: Q question, C context (the hint), M options, L lecture, E
explanation (the row's solution), A answer, G a rationale that was generated before.

The texts are those of lupantech/ScienceQA (`models/base_prompt.py`), with the inputs and outputs
that amazon-science/mm-cot adds; answers are cleaned as they are there. In both, and so here, AL
tells the solution and AE the lecture, the other way round than their letters say: whoever compares
results by these names wants these texts. The second full stop of LE is mm-cot's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter, ascii_uppercase as LETTERS

from mole_vl.faults import one_of, refuse

_INPUTS: Mapping[str, str] = {
    "CQM": "{C}{Q}{M}",
    "QCM": "{Q}{C}{M}",
    "QM": "{Q}{M}",
    "QC": "{Q}{C}",
    "QCML": "{Q}{C}{M}BECAUSE: {L}\n",
    "QCME": "{Q}{C}{M}BECAUSE: {E}\n",
    "QCMLE": "{Q}{C}{M}BECAUSE: {LE}\n",
    "QCLM": "{Q}{C}BECAUSE: {L}\n{M}",
    "QCEM": "{Q}{C}BECAUSE: {E}\n{M}",
    "QCLEM": "{Q}{C}BECAUSE: {LE}\n{M}",
    "QCMA": "{Q}{C}{M}Answer: {A}\n",
    "QCA": "{Q}{C}Answer: {A} \nBECAUSE:",
    "CQMG": "{C}{Q}{M}{G}\n",
    "QCMG": "{Q}{C}{M}{G}\n",
}
_OUTPUTS: Mapping[str, str] = {
    "A": "Answer: {A}",
    "AL": "Answer: {A} BECAUSE: {E}",
    "AE": "Answer: {A} BECAUSE: {L}",
    "ALE": "Answer: {A} BECAUSE: {LE}",
    "AEL": "Answer: {A} BECAUSE: {EL}",
    "LA": "Answer: {L} {A}",
    "EA": "Answer: {E} {A}",
    "LEA": "Answer: {LE} {A}",
    "ELA": "Answer: {EL} {A}",
    "LE": "Solution: {LE}.",
    "E": "Solution: {E}",
}
INPUTS = tuple(_INPUTS)
"""Names of the inputs."""
OUTPUTS = tuple(_OUTPUTS)
"""Names of the outputs."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A multiple-choice question.

    Args:
        question: What is asked.
        choices: The options, which get the letters from A on.
        answer: The place of the right one, from 0.
        hint: The context; empty for none.
        lecture: What one must know.
        solution: How one comes to the answer.
        rationale: A line of reasons that a model gave before, for the inputs with G; lecture and
            solution in its place if empty.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    lecture: str = ""
    solution: str = ""
    rationale: str = ""

    @property
    def letter(self) -> str:
        """The right option's letter."""
        return LETTERS[self.answer]


@dataclass(frozen=True)
class Format:
    """How a question is asked and answered.

    Args:
        input: One of `INPUTS`.
        output: One of `OUTPUTS`.
    """

    input: str
    output: str

    def __post_init__(self) -> None:
        refuse(
            "prompt_format",
            [one_of("input", self.input, INPUTS), one_of("output", self.output, OUTPUTS)],
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """Of lecture and solution, those that stand in the texts."""
        fields = _fields(_INPUTS[self.input] + _OUTPUTS[self.output])
        columns = {"lecture": "LG", "solution": "EG"}
        return tuple(name for name, letters in columns.items() if fields & set(letters))

    @property
    def open(self) -> bool:
        """Whether question, choices and hint are enough to ask."""
        return _fields(_INPUTS[self.input]) <= set("CQM")

    def prompt(self, one: Question) -> str:
        """The question as it is asked; each line ends, but for QCA's last."""
        return _INPUTS[self.input].format_map(_pieces(one))

    def answer(self, one: Question) -> str:
        """What is to be said; where there is nothing to tell, no BECAUSE is left."""
        text = _OUTPUTS[self.output].format_map(_pieces(one)).replace("  ", " ").strip()
        return text.removesuffix("BECAUSE:").strip()


def format_of(name: str) -> Format:
    """The format of a name such as CQM-A.

    Raises:
        ValueError: No such name.
    """
    parts = name.split("-")
    if len(parts) != 2:
        raise ValueError(
            f"prompt_format is {name!r}, expected INPUT-OUTPUT such as CQM-A, with an input of "
            f"{', '.join(INPUTS)} and an output of {', '.join(OUTPUTS)}"
        )
    return Format(*parts)


def _fields(template: str) -> set[str]:
    """The letters of what stands in a template."""
    return set("".join(name or "" for _, name, _, _ in Formatter().parse(template)))


def _pieces(one: Question) -> dict[str, str]:
    lecture, solution = (text.replace("\n", "\\n") for text in (one.lecture, one.solution))
    both = " ".join(filter(None, (lecture, solution)))
    options = " ".join(f"({x}) {choice}" for x, choice in zip(LETTERS, one.choices, strict=False))
    return {
        "C": f"Context: {one.hint.strip() or 'N/A'}\n",
        "Q": f"Question: {one.question}\n",
        "M": f"Options: {options}\n",
        "A": f"The answer is {one.letter}.",
        "G": one.rationale or f"Solution: {both}",
        "L": lecture,
        "E": solution,
        "LE": both,
        "EL": " ".join(filter(None, (solution, lecture))),
    }

"""One text that says how a data set's columns become a task's prompts and answers.

Such a text is

    Question: {question}
    Answer: ||| {answer}

`|||` is where the prompt ends and the answer begins, spaces and line ends around it aside; before
and behind it are templates over columns as `nlp.dataset.DatasetRows` fills them, in which `{{` and
`}}` are braces.
"""

from dataclasses import dataclass, replace
from string import Formatter

from nlp.data import TextRow
from nlp.dataset import DatasetRows, rows_of

DIVIDER = "|||"


@dataclass(frozen=True)
class Asked:
    """A row, and what of it a user would type (see `Template`)."""

    question: str
    row: TextRow


class Template:
    """The form of one task's prompts.

    With one column in it, that column is what a user types, and the template is put around it; with
    several, a user types the whole prompt.

    Args:
        text: A template that `DatasetRows` takes for a prompt.
    """

    def __init__(self, text: str) -> None:
        parsed = list(Formatter().parse(text))
        # Each literal text, then the column whose value follows it, if one does.
        self._pieces = [(literal, name is not None) for literal, name, _, _ in parsed]
        asked = {_field(name, form, how) for _, name, form, how in parsed if name is not None}
        self._whole = len(asked) > 1
        self.question = text if self._whole else "".join(asked)
        """The template of what a user types."""

    def prompt(self, question: str) -> str:
        """The prompt for what a user typed."""
        if self._whole:
            return question
        return "".join(literal + (question if named else "") for literal, named in self._pieces)


def read_asked(setting: str, source: DatasetRows) -> list[Asked]:
    """The rows of a data set, with what of each a user would type.

    Spaces and line ends around that and around the answer are none of the text.

    Args:
        setting: Name of the setting that holds the data set, for messages.
        source: The data set, and the templates.

    Raises:
        FileNotFoundError: As for `rows_of`.
        ValueError: As for `rows_of`.
    """
    template = Template(source.prompt)
    found = []
    for row in rows_of(setting, replace(source, prompt=template.question)):
        question = row.prompt.strip()
        prompt, answer = template.prompt(question), row.answer.strip()
        found.append(Asked(question, replace(row, prompt=prompt, answer=answer)))
    return found


def _field(name: str, form: str | None, conversion: str | None) -> str:
    how = f"!{conversion}" if conversion else ""
    return f"{{{name}{how}{':' + form if form else ''}}}"


def divided(text: str) -> tuple[str, str]:
    """The templates of the prompt and of the answer.

    Raises:
        ValueError: A text without exactly one divider.
    """
    parts = text.split(DIVIDER)
    if len(parts) != 2:
        raise ValueError(
            f"{text!r} has {len(parts) - 1} times {DIVIDER!r}, expected once, between the "
            "prompt and the answer, as in 'Question: {question} ||| {answer}'"
        )
    return parts[0].strip(), parts[1].strip()

"""The text around an instruction, as alpaca-lora's `Prompter` puts it."""

import re
from dataclasses import dataclass
from pathlib import Path

from mole_vl.faults import refuse
from mole_vl.files import check_file, read_object

BUILT_IN = "alpaca"
_OPENING = "Below is an instruction that describes a task"
_FIELDS = {
    "prompt_input": ("{instruction}", "{input}"),
    "prompt_no_input": ("{instruction}",),
}


@dataclass(frozen=True)
class Template:
    """Texts with `{instruction}` and `{input}` in them.

    Args:
        prompt_input: For an instruction with an input.
        prompt_no_input: For one without.
    """

    prompt_input: str
    prompt_no_input: str

    def __post_init__(self) -> None:
        refuse(
            "prompt template",
            [
                f"{name} lacks {field}"
                for name, fields in _FIELDS.items()
                for field in fields
                if field not in getattr(self, name)
            ],
        )

    def prompt(self, instruction: str, given: str | None = None) -> str:
        """An instruction, and what is given with it, up to where the answer begins."""
        text = self.prompt_input if given else self.prompt_no_input
        values = {"instruction": instruction, "input": given or ""}
        # Not `format`: other braces of a template stay as they are.
        return re.sub(r"\{(instruction|input)\}", lambda field: values[field[1]], text)


ALPACA = Template(
    f"{_OPENING}, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n"
    "{input}\n\n### Response:\n",
    f"{_OPENING}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
)


def template_of(name: str) -> Template:
    """The template of a name: alpaca, or a JSON file's.

    Args:
        name: alpaca; a JSON file with the keys prompt_input and prompt_no_input; or NAME for the
            file templates/NAME.json.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file lacks a key, or a text in it its fields.
    """
    if name in ("", BUILT_IN):
        return ALPACA
    file = Path(name) if name.endswith(".json") else Path("templates") / f"{name}.json"
    check_file("prompt_template_name", file, f"a JSON file of prompts, or {BUILT_IN} for that one")
    found = read_object(file)
    refuse(
        str(file), [f"no text {key!r}" for key in _FIELDS if not isinstance(found.get(key), str)]
    )
    try:
        return Template(**{key: found[key] for key in _FIELDS})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error

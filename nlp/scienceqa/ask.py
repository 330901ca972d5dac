"""Ask one question."""

from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any

from accelerate.utils import set_seed

from mole_vl.faults import at_least, refuse
from nlp.scienceqa.asking import load_asked
from nlp.scienceqa.config import BASE
from nlp.scienceqa.formats import Question, format_of
from nlp.scienceqa.letters import letter_of
from nlp.scienceqa.template import BUILT_IN, template_of


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """Answer one question, of several choices or in an instruction's words.

    Args:
        question: What is asked; its choices belong to it.
        choices: The options, such as '["milk", "rock"]'.
        hint: The context of the question.
        instruction: In place of these, an instruction as it stands.
        prompt_format: How the question is asked, as in `prepare`: CQM-A, QCM-ALE ...
        base_model: The base that the mixture was trained on.
        mola_weights: The mixture's folder; null for the base alone.
        temperature: What the logits are divided by before an answer is drawn; 0 for the likeliest
            token each time.
        top_p: A token is drawn from the likeliest that have this share together.
        top_k: A token is drawn from so many of the likeliest.
        top_k_g: The same, as MoLA's authors call it.
        max_new_tokens: The most tokens of the answer.
        prompt_template_name: The text around an instruction, as in training.
        load_in_8bit: Whether the base's linear layers take 8 bits (needs bitsandbytes).
        seed: Of the draw.
    """

    question: str | None = None
    choices: tuple[str, ...] = ()
    hint: str = ""
    instruction: str | None = None
    prompt_format: str = "CQM-A"
    base_model: str = BASE
    mola_weights: Path | None = Path("scienceqa_mola")
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    top_k_g: int | None = None
    max_new_tokens: int = 128
    prompt_template_name: str = BUILT_IN
    load_in_8bit: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        form = format_of(self.prompt_format)
        drawn = {"top_p": self.top_p, "top_k": self.top_k, "top_k_g": self.top_k_g}
        lost = [name for name, value in drawn.items() if value is not None]
        refuse(
            "ask",
            [
                *self._faults_of_question(),
                None
                if form.open
                else f"prompt_format is {self.prompt_format}, whose input tells more than question "
                "choices and hint: take CQM, QCM, QM or QC, or give the whole instruction",
                at_least("temperature", self.temperature, 0),
                f"{', '.join(lost)}: given with temperature 0, where nothing is drawn"
                if lost and self.temperature == 0
                else None,
                None
                if self.top_p is None or 0 < self.top_p <= 1
                else f"top_p is {self.top_p}, expected 0 < top_p <= 1",
                at_least("top_k", self.top_k, 1),
                at_least("top_k_g", self.top_k_g, 1),
                "top_k and top_k_g are two names of one setting: give one of them"
                if self.top_k is not None and self.top_k_g is not None
                else None,
                at_least("max_new_tokens", self.max_new_tokens, 1),
                at_least("seed", self.seed, 0),
            ],
        )

    def _faults_of_question(self) -> list[str | None]:
        if self.instruction is not None:
            return [
                None if self.instruction.strip() else "instruction is empty, expected some text",
                "question, choices and hint do not go with an instruction, which stands for them"
                if self.question is not None or self.choices or self.hint
                else None,
            ]
        return [
            None
            if self.question and self.question.strip()
            else "question is empty, expected some text, or an instruction",
            None
            if 2 <= len(self.choices) <= len(LETTERS)
            else f"choices are {len(self.choices)}, expected 2 to {len(LETTERS)}",
        ]

    @property
    def whole(self) -> str:
        """The instruction as it is put to the model."""
        if self.instruction is not None:
            return self.instruction
        one = Question(question=self.question or "", choices=self.choices, answer=0, hint=self.hint)
        return format_of(self.prompt_format).prompt(one)

    @property
    def drawing(self) -> dict[str, Any]:
        """What `generate` is told of how tokens are chosen."""
        if self.temperature == 0:
            return {}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            # 0: of all tokens; left out, it would be 50.
            "top_k": self.top_k or self.top_k_g or 0,
        }


def ask(config: AskConfig) -> str:
    """Print what is said, and the choice that it names; return what is said.

    Raises:
        FileNotFoundError: A base, a template or a mixture that is not there.
        ValueError: A mixture that does not fit its base; a question without room for an answer.
    """
    prompt = template_of(config.prompt_template_name).prompt(config.whole)
    asked = load_asked(config.base_model, config.mola_weights, bits=config.load_in_8bit)
    set_seed(config.seed)
    (said,) = asked([prompt], tokens=config.max_new_tokens, **config.drawing)
    print(said)
    letter = letter_of(said, LETTERS[: len(config.choices)])
    if letter is not None:
        print(f"({letter}) {config.choices[LETTERS.index(letter)]}")
    return said

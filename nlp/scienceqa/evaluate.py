"""Evaluate a mixture, or a base, on the questions that `prepare` wrote."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from mole_vl.faults import at_least, differences, refuse
from mole_vl.files import check_output, digest, digest_contents, new_file, read_object
from nlp.scienceqa.asking import check_mixture, load_asked
from nlp.scienceqa.config import BASE
from nlp.scienceqa.letters import letter_of, letters_in
from nlp.scienceqa.numbers import Numbers, numbers, words
from nlp.scienceqa.reading import prompt_of
from nlp.scienceqa.template import BUILT_IN, template_of
from nlp.tables import each, rows_with


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Answer questions greedily, in batches, and count the right ones; a broken-off run goes on.

    Args:
        test_dataset: The questions, such as scienceq_test.json.
        base_model: The base that the mixture was trained on.
        mola_weights: The mixture's folder; null for the base alone.
        number_experts: The mixture's files know it; where it is given, another is an error.
        top_k: Likewise.
        lora_target_modules: Likewise.
        save_path: The JSON file of the results, written anew after each batch.
        batch_size: Questions that are answered at once.
        prompt_template_name: The text around an instruction, as in training.
        max_new_tokens: The most tokens of an answer.
        load_in_8bit: Whether the base's linear layers take 8 bits (needs bitsandbytes).
    """

    test_dataset: str = "./scienceqa/scienceq_test.json"
    base_model: str = BASE
    mola_weights: Path | None = Path("scienceqa_mola")
    number_experts: Numbers | None = None
    top_k: Numbers | None = None
    lora_target_modules: tuple[str, ...] | str | None = None
    save_path: Path = Path("results/mola_test_sciqa.json")
    batch_size: int = 8
    prompt_template_name: str = BUILT_IN
    max_new_tokens: int = 128
    load_in_8bit: bool = False

    def __post_init__(self) -> None:
        given = {
            "number_experts": self.number_experts,
            "top_k": self.top_k,
            "lora_target_modules": self.lora_target_modules,
        }
        for name in ("number_experts", "top_k"):
            if given[name] is not None:
                numbers(name, given[name])
        if self.lora_target_modules is not None:
            words("lora_target_modules", self.lora_target_modules)
        lost = [name for name, value in given.items() if value is not None]
        refuse(
            "evaluate",
            [
                at_least("batch_size", self.batch_size, 1),
                at_least("max_new_tokens", self.max_new_tokens, 1),
                f"{', '.join(lost)}: given without mola_weights"
                if lost and self.mola_weights is None
                else None,
            ],
        )


@dataclass(frozen=True)
class Item:
    """A question, ready to be asked.

    Args:
        prompt: What the model is shown.
        answer: The right letter.
        options: The letters that there are; None where the row does not tell.
    """

    prompt: str
    answer: str
    options: str | None


def evaluate(config: EvaluateConfig) -> None:
    """Ask what was not asked yet, and write what was said.

    Raises:
        FileNotFoundError: Questions, a base, a template or a mixture that is not there.
        ValueError: Questions that cannot be read; a mixture that does not fit; results of another
            evaluation in the file's place; several processes.
    """
    if PartialState().num_processes > 1:
        raise ValueError("evaluate runs in one process: start it with python -m nlp.scienceqa")
    check_output("save_path", config.save_path.absolute().parent)
    template = template_of(config.prompt_template_name)
    where = f"test_dataset: {config.test_dataset}"
    rows = rows_with(where, config.test_dataset, ("instruction", "answer"))
    items = each(where, enumerate(rows), lambda row: _item(row, prompt_of(row, template)))
    settings = _settings(config, items)
    said = _said_before(config.save_path, settings, len(items))
    if said:
        print(f"{config.save_path}: {len(said)} of {len(items)} questions are answered already")
    if len(said) < len(items):
        asked = load_asked(config.base_model, config.mola_weights, bits=config.load_in_8bit)
        if asked.mixture is not None and config.mola_weights is not None:
            check_mixture(
                asked.mixture,
                config.mola_weights,
                number_experts=config.number_experts,
                top_k=config.top_k,
                lora_target_modules=config.lora_target_modules,
            )
        starts = range(len(said), len(items), config.batch_size)
        for start in tqdm(starts, desc="evaluate", unit="batch"):
            batch = items[start : start + config.batch_size]
            said += asked([item.prompt for item in batch], tokens=config.max_new_tokens)
            _write(config.save_path, settings, items, said)
    found = results(items, said)
    print(
        f"{found['len']}/{len(items)}, correct: {found['correct']}, acc: {found['acc']:.2f}%, "
        f"saved to {config.save_path}"
    )


def results(items: Sequence[Item], said: Sequence[str]) -> dict[str, Any]:
    """What the first questions' answers come to.

    Args:
        items: All questions.
        said: What was said to the first of them.

    Returns:
        acc in percent, correct and len (those asked); by question: results, the letters that were
        found; predictions, the one that counts, or null; answers, the right one; outputs.
    """
    shown = list(zip(items, said, strict=False))
    predictions = [letter_of(text, item.options) for item, text in shown]
    hits = [letter == item.answer for (item, _), letter in zip(shown, predictions, strict=True)]
    return {
        "acc": 100 * sum(hits) / len(hits),
        "correct": sum(hits),
        "len": len(hits),
        "results": [letters_in(text) for _, text in shown],
        "predictions": predictions,
        "answers": [item.answer for item, _ in shown],
        "outputs": [text for _, text in shown],
    }


def _item(row: Mapping[str, Any], prompt: str) -> Item:
    answer, choices = row["answer"], row.get("choices")
    if choices is not None and not isinstance(choices, list):
        raise ValueError(f"choices is {choices!r}, expected a list of texts")
    options = None if choices is None else LETTERS[: len(choices)]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in (options or LETTERS):
        raise ValueError(
            f"answer is {answer!r}, expected a letter of {options or LETTERS}: `prepare` writes it"
        )
    return Item(prompt, answer, options)


def _settings(config: EvaluateConfig, items: Sequence[Item]) -> dict[str, Any]:
    """What decides the results."""
    weights = config.mola_weights
    if weights is not None and not weights.is_dir():
        raise FileNotFoundError(f"mola_weights: there is no folder {weights}: train first")
    files = [] if weights is None else [path for path in weights.rglob("*") if path.is_file()]
    return {
        "base_model": config.base_model,
        "mola_weights": None if weights is None else digest(sorted(files)),
        "questions": digest_contents(json.dumps(asdict(item)).encode() for item in items),
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "load_in_8bit": config.load_in_8bit,
    }


def _said_before(file: Path, settings: Mapping[str, Any], questions: int) -> list[str]:
    """What a broken-off evaluation was told."""
    if not file.is_file():
        return []
    before = read_object(file)
    said, made = before.get("outputs"), before.get("settings")
    if (
        not isinstance(said, list)
        or not all(isinstance(one, str) for one in said)
        or not isinstance(made, dict)
        or len(said) > questions
    ):
        raise ValueError(f"save_path: {file} holds no results of this program: take another file")
    if faults := differences(made, settings):
        raise ValueError(
            f"save_path: {file} was made otherwise ({'; '.join(faults)}): take another file, or "
            "remove this one"
        )
    return list(said)


def _write(
    file: Path, settings: Mapping[str, Any], items: Sequence[Item], said: Sequence[str]
) -> None:
    with new_file(file) as partial:
        partial.write_text(json.dumps({**results(items, said), "settings": settings}, indent=2))

"""A language model whose task experts are weighed by a task classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nlp.classifier import Classifier, hard as one_hot
from nlp.data import texts_of
from nlp.templates import Template
from pipelines.text_generation import MoLETextGeneration


@dataclass(frozen=True)
class Routed:
    """An answer, and how it came about.

    Args:
        question: What was asked.
        probabilities: Of each task, by name.
        weights: Of each expert, by name.
        prompt: What the model was shown.
        answer: What it said.
    """

    question: str
    probabilities: Mapping[str, float]
    weights: Mapping[str, float]
    prompt: str
    answer: str


class RoutedText:
    """Questions in, answers out: each by the experts that a classifier finds probable.

    Args:
        pipe: A base with its experts; their names are the tasks'.
        classifier: Says how probable each task is.
        templates: The form of each task's prompts; a question is put into that of its most
            probable task. None where questions are prompts already.

    Raises:
        ValueError: Other experts, or other templates, than tasks.
    """

    def __init__(
        self,
        pipe: MoLETextGeneration,
        classifier: Classifier,
        templates: Mapping[str, Template] | None = None,
    ) -> None:
        tasks = classifier.tasks
        for what, names in (("experts", pipe.experts), ("templates", templates or tasks)):
            if set(names) != set(tasks):
                raise ValueError(
                    f"the classifier tells {', '.join(tasks)} apart, and the {what} are "
                    f"{', '.join(names) or 'none'}: expected one for each task"
                )
        self.pipe = pipe
        self.classifier = classifier
        self.templates = templates

    def __call__(
        self, questions: str | Sequence[str], *, hard: bool = False, **settings: Any
    ) -> list[Routed]:
        """Answer questions, all in one batch.

        Args:
            questions: One or several.
            hard: Whether each is answered by its most probable task's expert alone; else all
                experts are mixed, each weighed by the probability of its task.
            settings: As for `MoLETextGeneration`: max_new_tokens, beams, sampling ...

        Returns:
            The answers in the questions' order.

        Raises:
            ValueError: No question.
        """
        texts = texts_of("questions", questions)
        tasks = self.classifier.tasks
        probabilities = self.classifier.probabilities(texts)
        weights = one_hot(probabilities) if hard else probabilities
        places = probabilities.argmax(-1).tolist()
        prompts = [
            self.templates[tasks[place]].prompt(text) if self.templates else text
            for text, place in zip(texts, places, strict=True)
        ]
        named = [dict(zip(tasks, row, strict=True)) for row in weights.tolist()]
        answers = self.pipe(prompts, weights=named, **settings)
        return [
            Routed(text, dict(zip(tasks, shares, strict=True)), own, prompt, answer)
            for text, shares, own, prompt, answer in zip(
                texts, probabilities.tolist(), named, prompts, answers, strict=True
            )
        ]

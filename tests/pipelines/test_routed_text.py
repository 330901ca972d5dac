"""A task classifier's probabilities as the experts' weights."""

import pytest
import torch

from nlp.adapter import blocks
from nlp.templates import Template
from pipelines import MoLETextGeneration, RoutedText
from tests.nlp.families import experts_on
from tests.nlp.toys import tiny_model, tiny_tokenizer

TASKS = ("french", "past", "plural")
TEXTS = ["Plural of cat:", "7 in French:", "go", "ox"]
SETTINGS = {"max_new_tokens": 8, "do_sample": False}


class Told:
    """Probabilities that were written down."""

    tasks = TASKS

    def probabilities(self, texts):
        shares = {
            "Plural of cat:": [0.1, 0.2, 0.7],
            "7 in French:": [0.6, 0.3, 0.1],
            "go": [0.05, 0.9, 0.05],
            "ox": [0.4, 0.2, 0.4],
        }
        return torch.tensor([shares[text] for text in texts])


@pytest.fixture
def pipe():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # an untrained model repeats one letter; this one babbles
    found = MoLETextGeneration(model, tiny_tokenizer())
    # In another order than the classifier's tasks.
    found.load_experts(experts_on(model, blocks(model), TASKS[::-1], size=1.0), site="network")
    return found


def test_soft_weights_are_the_probabilities(pipe):
    found = RoutedText(pipe, Told())(TEXTS, **SETTINGS)
    by_hand = [
        pipe(text, weights=dict(zip(TASKS, Told().probabilities([text])[0].tolist(), strict=True)),
             **SETTINGS)[0]
        for text in TEXTS
    ]  # fmt: skip
    assert [one.answer for one in found] == by_hand
    assert all(one.weights == one.probabilities for one in found)
    with pipe.record() as record:
        RoutedText(pipe, Told())(TEXTS[:1], **SETTINGS)
    weights = dict(zip(pipe.experts, record["model"].weights.flatten()[:3].tolist(), strict=True))
    assert weights == pytest.approx({"french": 0.1, "past": 0.2, "plural": 0.7})


def test_hard_weights_are_one_expert_alone(pipe):
    found = RoutedText(pipe, Told())(TEXTS, hard=True, **SETTINGS)
    alone = ["plural", "french", "past", "french"]  # A tie goes to the first task.
    assert [one.answer for one in found] == [
        pipe(text, weights=[name], **SETTINGS)[0] for text, name in zip(TEXTS, alone, strict=True)
    ]
    assert [max(one.weights, key=one.weights.__getitem__) for one in found] == alone
    assert all(sorted(one.weights.values()) == [0, 0, 1] for one in found)
    assert found[3].probabilities["plural"] == pytest.approx(0.4)
    soft = RoutedText(pipe, Told())(TEXTS, **SETTINGS)
    assert [one.answer for one in soft] != [one.answer for one in found]


@pytest.mark.parametrize("hard", [False, True])
def test_a_batch_is_answered_as_one_by_one(pipe, hard):
    routed = RoutedText(pipe, Told())
    together = routed(TEXTS, hard=hard, **SETTINGS)
    assert together == [routed(text, hard=hard, **SETTINGS)[0] for text in TEXTS]
    assert routed(TEXTS[::-1], hard=hard, **SETTINGS) == together[::-1]


def test_a_question_is_put_into_the_form_of_its_task(pipe):
    forms = {task: Template(f"As {task}: {{text}} is") for task in TASKS}
    (found,) = RoutedText(pipe, Told(), forms)("go", **SETTINGS)
    assert found.prompt == "As past: go is"
    assert found.answer == pipe("As past: go is", weights=[list(found.weights.values())[::-1]],
                                **SETTINGS)[0]  # fmt: skip


def test_what_does_not_go_together_is_refused(pipe):
    with pytest.raises(ValueError, match=r"tells french, past, plural apart, and the templates ar"):
        RoutedText(pipe, Told(), {"past": Template("{a}")})
    for questions in ("", [], ["go", " "]):
        with pytest.raises(ValueError, match="expected some text"):
            RoutedText(pipe, Told())(questions)
    pipe.unload_experts()
    with pytest.raises(ValueError, match=r"the experts are none: expected one for each task"):
        RoutedText(pipe, Told())

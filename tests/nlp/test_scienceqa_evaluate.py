"""MoLA asked many questions: in batches, broken off, gone on with."""

import json

import pytest
import torch
from transformers import GenerationConfig

from nlp.scienceqa import evaluate as evaluation
from nlp.scienceqa.asking import load_asked
from nlp.scienceqa.evaluate import evaluate
from nlp.scienceqa.template import ALPACA
from tests.nlp.scienceqa_place import asking, place as place, results, typed  # place is a fixture
from tests.nlp.scienceqa_toys import (
    as_json,
    base,
)
from tests.nlp.test_task_moe import wandb as wandb  # a fixture


def test_what_was_learned_is_evaluated(place, tmp_path, capsys):
    file = tmp_path / "deep/results.json"
    evaluate(asking(place, save_path=file))
    assert f"12/12, correct: 12, acc: 100.00%, saved to {file}" in capsys.readouterr().out
    found = results(file)
    letters = ["AB"[n % 2] for n in range(12)]
    assert found["answers"] == found["predictions"] == letters
    assert found["results"] == [[letter] for letter in letters]
    assert found["outputs"] == [f"Answer: The answer is {letter}." for letter in letters]
    assert (found["acc"], found["correct"], found["len"]) == (100.0, 12, 12)
    # The base alone knows nothing of it.
    typed(
        tmp_path, "evaluate", "--test_dataset", place / "sqa/scienceq_test.json", "--base_model",
        place / "base", "--mola_weights", "null", "--save_path", "base.json",
        "--max_new_tokens", 12,
    )  # fmt: skip
    assert results(tmp_path / "base.json")["correct"] == 0


def test_an_evaluation_that_was_broken_off_goes_on_to_the_same_results(
    place, tmp_path, monkeypatch
):
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    evaluate(asking(place, save_path=whole))
    batches = []

    class Stops:
        """What is asked, but for the third batch."""

        def __init__(self, *given, **how):
            self.asked = load_asked(*given, **how)
            self.mixture = self.asked.mixture

        def __call__(self, prompts, **how):
            batches.append(len(prompts))
            if len(batches) == 3:
                raise KeyboardInterrupt
            return self.asked(prompts, **how)

    monkeypatch.setattr(evaluation, "load_asked", Stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(asking(place, save_path=broken))
    half = results(broken)
    assert half["len"] == 10 and half["outputs"] == results(whole)["outputs"][:10]
    assert half["acc"] == 100 * half["correct"] / 10
    evaluate(asking(place, save_path=broken))
    assert batches == [5, 5, 2, 2]
    assert broken.read_text() == whole.read_text()
    # Nothing is loaded to say it again.
    evaluate(asking(place, save_path=broken))
    assert len(batches) == 4


def test_results_of_another_evaluation_are_not_gone_on_with(place, tmp_path):
    file = tmp_path / "results.json"
    evaluate(asking(place, save_path=file))
    with pytest.raises(ValueError, match=r"results.json was made otherwise .max_new_tokens was 12"):
        evaluate(asking(place, save_path=file, max_new_tokens=11))
    with pytest.raises(ValueError, match=r"mola_weights was '[0-9a-f]+', is None"):
        evaluate(asking(place, save_path=file, mola_weights=None))
    other = as_json(tmp_path / "other.json", results(place / "sqa/scienceq_test.json")[:3])
    with pytest.raises(ValueError, match="holds no results of this program"):
        evaluate(asking(place, save_path=file, test_dataset=str(other)))
    given = results(file)
    file.write_text(json.dumps({**given, "outputs": [1, None]}))
    with pytest.raises(ValueError, match="holds no results of this program"):
        evaluate(asking(place, save_path=file))
    file.write_text("{}")
    with pytest.raises(ValueError, match="holds no results of this program"):
        evaluate(asking(place, save_path=file))


def test_a_batch_says_what_each_question_is_told_alone_without_padding_or_cache(place):
    asked = load_asked(str(place / "base"), place / "mola")
    prompts = [ALPACA.prompt(f"{'so ' * n}Pick rock.") for n in (0, 3, 9)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([asked.tokenizer(prompt)["input_ids"]])
        start = ids.shape[1]
        while ids.shape[1] < start + 9 and ids[0, -1] != 1:
            with torch.no_grad():
                best = asked.model(ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], 1)
        (said,) = asked.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        expected.append(said.strip())
    assert asked(prompts, tokens=9) == expected
    assert [asked([prompt], tokens=9)[0] for prompt in prompts] == expected


def test_the_bases_own_sampling_is_none_of_the_evaluations(place, tmp_path):
    folder = base(tmp_path / "base", width=32)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.9, bos_token_id=0, eos_token_id=[1, 7]
    )
    own.save_pretrained(folder)
    sampling, plain = (load_asked(str(one), place / "mola") for one in (folder, place / "base"))
    assert sampling.model.generation_config.eos_token_id == [1, 7]
    prompts = [ALPACA.prompt("Pick rock.")]
    assert sampling(prompts, tokens=9) == plain(prompts, tokens=9)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"number_experts": "2,2"}, "mixture in .*mola: number_experts is 2,4, not 2,2: leave it"),
        ({"top_k": 1}, "top_k is 2,2, not 1,1"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules is down_proj,.*, not q_proj"),
        ({"number_experts": "2,2,2"}, "number_experts has 3 numbers, and the model has 2 layers"),
    ],
)
def test_settings_that_contradict_the_mixture_are_told(place, tmp_path, given, told):
    with pytest.raises(ValueError, match=told):
        evaluate(asking(place, save_path=tmp_path / "r.json", **given))
    assert not (tmp_path / "r.json").exists()


def test_settings_that_agree_with_the_mixture_are_welcome(place, tmp_path):
    given = {
        "number_experts": (2, 4), "top_k": "2",
        "lora_target_modules": "q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj",
    }  # fmt: skip
    evaluate(asking(place, save_path=tmp_path / "r.json", max_new_tokens=1, **given))


def test_questions_that_cannot_be_asked_are_told(place, tmp_path):
    row = results(place / "sqa/scienceq_test.json")[0]
    for change, told in (
        ({"answer": "C"}, "row 0: answer is 'C', expected a letter of AB"),
        ({"answer": 1}, "row 0: answer is 1, expected a letter of AB: `prepare` writes it"),
        ({"instruction": ""}, "row 0: instruction is ''"),
    ):
        file = as_json(tmp_path / "q.json", [{**row, **change}])
        with pytest.raises(ValueError, match=told):
            evaluate(asking(place, test_dataset=str(file), save_path=tmp_path / "r.json"))
    file = as_json(tmp_path / "q.json", [{"instruction": "Pick."}])
    with pytest.raises(ValueError, match=r"no column 'answer' .found instruction"):
        evaluate(asking(place, test_dataset=str(file)))
    file = as_json(tmp_path / "q.json", [{**row, "instruction": "word " * 600}])
    with pytest.raises(ValueError, match="prompts longer than 500 tokens, which leave no room"):
        evaluate(asking(place, test_dataset=str(file), save_path=tmp_path / "r.json"))
    with pytest.raises(
        ValueError, match="max_new_tokens is 5000, and the base reads 512 tokens in"
    ):
        evaluate(asking(place, max_new_tokens=5000, save_path=tmp_path / "r.json"))
    with pytest.raises(FileNotFoundError, match="mola_weights: there is no folder"):
        evaluate(asking(place, mola_weights=tmp_path / "nothing"))

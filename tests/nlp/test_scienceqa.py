"""MoLA on questions of ScienceQA's kind, the whole way, on tiny models."""

import json
import sys
from dataclasses import replace

import datasets
import pytest
import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from mole_vl.faults import as_messages
from mole_vl.files import read_tensors
from mole_vl.mixture_folder import mix_saved
from nlp.adapter import blocks, bound
from nlp.answers import log_likelihood
from nlp.data import IGNORED, TextRow, collate
from nlp.models import load_base
from nlp.scienceqa import evaluate as evaluation
from nlp.scienceqa.__main__ import main
from nlp.scienceqa.ask import AskConfig, ask
from nlp.scienceqa.asking import load_asked
from nlp.scienceqa.config import InstructionConfig, TrainConfig, mola_of
from nlp.scienceqa.encoding import cut_prompts, cut_texts, encode
from nlp.scienceqa.evaluate import EvaluateConfig, evaluate
from nlp.scienceqa.template import ALPACA
from nlp.scienceqa.train import train, train_instruction
from nlp.task import LanguageTask
from tests.nlp.families import T5
from tests.nlp.scienceqa_toys import (
    KNITTING,
    as_json,
    base,
    pick,
    tokenizer,
    wordnet_package,
)
from tests.nlp.test_task_moe import Wandb, wandb as wandb  # a fixture

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, questions, and what was learned of them."""
    folder = tmp_path_factory.mktemp("scienceqa")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    base(folder / "base", width=32)
    (folder / "questions").mkdir()
    for split in SPLITS:
        as_json(folder / f"questions/{split}.json", map(pick, range(12)))
    typed(folder, "prepare", "--dataset", folder / "questions", "--save_path", folder / "sqa")
    typed(
        folder, "train", "--base_model", folder / "base", "--data_path",
        folder / "sqa/science_qa.hf", "--output_dir", folder / "mola", "--batch_size", 12,
        "--micro_batch_size", 12,
        "--num_epochs", 40, "--learning_rate", "1e-2", "--number_experts", "2,4",
        "--lora_r", "4,8", "--lora_dropout", 0, "--val_set_size", 0, "--train_on_inputs", "false",
        "--save_steps", 1000,
    )  # fmt: skip
    yield folder
    patch.undo()


def typed(folder, *arguments):
    """Run a command as it would be typed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["nlp.scienceqa", *map(str, arguments)])
        with as_messages("nlp"):
            main()


def settings(place, folder, **changes):
    """A short training."""
    given = {
        "base_model": str(place / "base"), "data_path": str(place / "sqa/science_qa.hf"),
        "output_dir": folder / "mola", "batch_size": 4, "micro_batch_size": 2, "num_epochs": 1,
        "learning_rate": 1e-2, "number_experts": "2,3", "val_set_size": 0, "lora_dropout": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**given, **changes})


def asking(place, **changes):
    given = {
        "test_dataset": str(place / "sqa/scienceq_test.json"), "base_model": str(place / "base"),
        "mola_weights": place / "mola", "batch_size": 5, "max_new_tokens": 12,
    }  # fmt: skip
    return EvaluateConfig(**{**given, **changes})


def tensors(folder):
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.parent.name} {key}": one for key, one in read_tensors(file).items()}
    return found


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def results(file):
    return json.loads(file.read_text())


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
    with pytest.raises(FileNotFoundError, match="mola_weights: there is no folder"):
        evaluate(asking(place, mola_weights=tmp_path / "nothing"))


# Asking


def question(place, **changes):
    given = {
        "question": "Pick milk.", "choices": ("milk", "rock"), "base_model": str(place / "base"),
        "mola_weights": place / "mola", "max_new_tokens": 9,
    }  # fmt: skip
    return AskConfig(**{**given, **changes})


def test_one_question_is_answered(place, tmp_path, capsys):
    arguments = ["--base_model", place / "base", "--mola_weights", place / "mola"]
    for number, said in ((0, "A.\n(A) milk"), (1, "B.\n(B) rock")):
        one = pick(number)
        choices = json.dumps(one["choices"])
        typed(tmp_path, "ask", "--question", one["question"], "--choices", choices, *arguments)
        assert capsys.readouterr().out.endswith(f"Answer: The answer is {said}\n")
    whole = results(place / "sqa/scienceq_test.json")[0]["instruction"]
    typed(tmp_path, "ask", "--instruction", whole, *arguments)
    assert capsys.readouterr().out.endswith("Answer: The answer is A.\n")


def test_the_authors_sample_is_asked_in_their_words():
    config = AskConfig(
        question=KNITTING["question"], choices=tuple(KNITTING["choices"]), hint=KNITTING["hint"]
    )
    assert ALPACA.prompt(config.whole) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n"
        "Context: Hint: People who can knit had to learn how to do it.\n"
        "Question: Is the following trait inherited or acquired?\n"
        "Sasha is good at knitting hats.\nOptions: (A) acquired (B) inherited\n\n\n### Response:\n"
    )


def test_answers_are_drawn_where_there_is_a_temperature(place):
    likeliest = ask(question(place))
    hot = [ask(question(place, temperature=30.0, seed=seed)) for seed in (0, 1, 0)]
    assert hot[0] == hot[2] != hot[1] and likeliest not in hot
    # Of one token, or of the least share, the likeliest is drawn at any temperature.
    for narrow in ({"top_k": 1}, {"top_k_g": 1}, {"top_p": 1e-6}):
        assert ask(question(place, temperature=3.0, **narrow)) == likeliest
    assert question(place, temperature=0.1, top_p=0.75, top_k_g=20).drawing == {
        "do_sample": True, "temperature": 0.1, "top_p": 0.75, "top_k": 20,
    }  # fmt: skip
    assert question(place, temperature=0.1).drawing["top_k"] == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"question": None}, "question is empty, expected some text, or an instruction"),
        ({"choices": ("a",)}, "choices are 1, expected 2 to 26"),
        ({"instruction": "x"}, "question, choices and hint do not go with an instruction"),
        ({"top_p": 0.5}, "top_p: given with temperature 0, where nothing is drawn"),
        ({"top_p": 1.5, "temperature": 1}, "top_p is 1.5, expected 0 < top_p <= 1"),
        ({"temperature": -1}, "temperature is -1, expected at least 0"),
        ({"top_k": 1, "top_k_g": 2, "temperature": 1}, "two names of one setting"),
        ({"prompt_format": "QCML-A"}, "whose input tells more than question"),
        ({"prompt_format": "A"}, "expected INPUT-OUTPUT"),
    ],
)
def test_a_question_that_cannot_be_is_told(place, given, told):
    with pytest.raises(ValueError, match=told):
        question(place, **given)


# Encoding


def test_the_answer_follows_the_prompt_at_once_as_one_text_would():
    fast = tokenizer()
    row = TextRow("### Response:\n", "Answer: The answer is A.", "t")
    whole = fast(row.prompt + row.answer)["input_ids"]
    found = encode(row, fast, inputs=False, end=True)
    assert [*found.prompt, *found.answer] == [*whole, 1]
    assert list(found.prompt) == fast(row.prompt)["input_ids"] and found.prompt[0] == 0
    assert encode(row, fast, inputs=True, end=False).answer == found.answer[:-1]
    labels = collate([encode(row, fast, inputs=True, end=True), found], 1)["labels"].tolist()
    assert labels[0] == [IGNORED, *whole[1:], 1]
    assert labels[1] == [IGNORED] * len(found.prompt) + list(found.answer)
    text = encode(TextRow("", "rock milk", "t"), fast, inputs=True, end=True)
    assert [*text.prompt, *text.answer] == [*fast("rock milk")["input_ids"], 1]
    assert text.prompt == (0,)


def test_a_token_across_the_prompts_end_is_none_that_generation_would_meet():
    fast = tokenizer(begin=False)
    merged = TextRow("### Resp", "onse:", "t")
    whole = fast("### Response:")["input_ids"]
    found = encode(merged, fast, inputs=False, end=False)
    assert whole[: len(found.prompt)] != list(found.prompt)
    assert list(found.prompt) == fast("### Resp")["input_ids"]
    assert fast.decode([*found.prompt, *found.answer]) == "### Response:"


def test_long_rows_keep_their_answers_and_the_prompts_end():
    fast = tokenizer()
    rows = [
        encode(TextRow("milk " * n, "rock.", "t"), fast, inputs=False, end=True) for n in (1, 9)
    ]
    cut = cut_prompts(rows, 12, begin=0)
    assert cut[0] == rows[0]
    assert cut[1].answer == rows[1].answer and len(cut[1].prompt + cut[1].answer) == 12
    room = 12 - len(rows[1].answer)
    assert cut[1].prompt == (0, *rows[1].prompt[-room + 1 :])
    assert cut_prompts(rows, 12, begin=None)[1].prompt == rows[1].prompt[-room:]
    with pytest.raises(
        ValueError, match=r"room for a prompt within 2 tokens: row 0 .'rock\.'. has"
    ):
        cut_prompts(rows, 2, begin=0)


def test_long_texts_keep_their_beginning():
    fast = tokenizer()
    one, more = (encode(TextRow("", "rock " * n, "t"), fast, inputs=True, end=True) for n in (1, 9))
    assert cut_texts([one, more], 12) == [one, replace(more, answer=more.answer[:11])]


# Training


def test_the_flags_are_the_mixture_and_the_loop(place, tmp_path):
    config = settings(
        place, tmp_path, number_experts="3,4", top_k="1,2", lora_r="2,4", lora_alpha=8.0,
        lora_dropout=0.1, lora_target_modules="q_proj, up_proj", obalance=True, seed=5,
        batch_size=6, num_epochs=250, learning_rate=3e-4,
    )  # fmt: skip
    model, _ = load_base(config.base_model)
    method = mola_of(config, model, blocks(model))
    assert (method.experts, method.top_k, method.rank) == ((3, 4), (1, 2), (2, 4))
    assert (method.alpha, method.dropout, method.balance, method.seed) == (8.0, 0.1, 0.001, 5)
    assert method.targets == ("q_proj", "up_proj")
    run = config.loop(12)
    assert (run.rows, run.micro_rows, run.steps, run.warmup) == (6, 2, 500, 50)
    assert (run.lr, run.schedule, run.optimizer, run.clip) == (3e-4, "linear", "adamw", 1.0)
    assert run.output == tmp_path / "mola_run"
    assert config.loop(12000).warmup == 100
    plain = TrainConfig(base_model=config.base_model)
    shaped = mola_of(plain, model, blocks(model))
    assert (shaped.experts, shaped.top_k, shaped.rank) == ((2, 6), (2, 2), (8, 8))
    assert shaped.balance == 0.0 and len(shaped.targets) == 7
    assert InstructionConfig().obalance and InstructionConfig().num_epochs == 3


@pytest.mark.parametrize("inputs", [True, False])
def test_a_first_step_is_the_base_on_all_tokens_or_on_the_answers(place, tmp_path, inputs):
    config = settings(place, tmp_path, batch_size=12, micro_batch_size=3, train_on_inputs=inputs)
    train(config)
    line = json.loads((config.run / "metrics.jsonl").read_text())
    model, fast = load_base(config.base_model)
    rows = datasets.load_from_disk(config.data_path)["train"].to_list()
    sums, count = 0.0, 0
    for row in rows:
        prompt = ALPACA.prompt(row["instruction"])
        ids = torch.tensor([[*fast(prompt + row["output"])["input_ids"], 1]])
        shown = 1 if inputs else len(fast(prompt)["input_ids"])
        logits = model(ids).logits[0, shown - 1 : -1].log_softmax(-1)
        sums -= logits.gather(1, ids[0, shown:, None]).sum().item()
        count += ids.shape[1] - shown
    assert line["lm"] == pytest.approx(sums / count, rel=1e-5)
    assert "balance" not in line


def test_the_end_of_an_answer_is_learned_or_not(place, tmp_path, monkeypatch):
    ends = {}
    sizes = LanguageTask.sizes

    for end in (True, False):
        config = settings(place, tmp_path / str(end), add_eos_token=end, group_by_length=True)
        monkeypatch.setattr(
            LanguageTask, "sizes", lambda self, end=end: ends.setdefault(end, sizes(self))
        )
        train(config)
    assert ends[True] == [size + 1 for size in ends[False]]


def test_rows_of_like_length_come_together(place, tmp_path, monkeypatch):
    rows = [
        {"instruction": "rock " * (1 + n % 4 * 20), "input": "", "output": "milk"}
        for n in range(16)
    ]
    table = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    table.save_to_disk(tmp_path / "rows.hf")
    widths = {}
    batch = LanguageTask.batch

    def seen(self, given):
        found = batch(self, given)
        widths[grouped].append({int(one.sum()) for one in found["attention_mask"]})
        return found

    monkeypatch.setattr(LanguageTask, "batch", seen)
    for grouped in (True, False):
        widths[grouped] = []
        train(
            settings(
                place, tmp_path / str(grouped), data_path=str(tmp_path / "rows.hf"),
                group_by_length=grouped, micro_batch_size=4,
            )
        )  # fmt: skip
    assert [len(lengths) for lengths in widths[True]] == [1] * 4
    assert max(len(lengths) for lengths in widths[False]) > 1


def test_long_rows_are_cut_and_counted(place, tmp_path, capsys):
    train(settings(place, tmp_path, cutoff_len=40))
    assert "12 of 12 rows have more than 40 tokens, and lose the beginning of their" in (
        capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="answers that leave no room for a prompt within 4 tokens"):
        train(settings(place, tmp_path / "short", cutoff_len=4))


def test_rows_are_held_out_and_their_loss_is_told(place, tmp_path, capsys):
    config = settings(place, tmp_path, val_set_size=0.25, batch_size=3, micro_batch_size=1,
                      num_epochs=2, save_steps=2)  # fmt: skip
    train(config)
    losses = results(config.run / "held_out.json")
    assert list(losses) == ["2", "4", "6"] and config.held_out(12) == 3
    assert f"held-out loss {losses['6']:.4f}" in capsys.readouterr().out
    model, fast = load_base(config.base_model)
    mixture = mix_saved(model, config.output_dir, blocks=blocks(model))
    rows = [
        encode(TextRow(ALPACA.prompt(row["instruction"]), row["output"], ""), fast, inputs=True,
               end=True)
        for row in datasets.load_from_disk(config.data_path)["train"]
    ]  # fmt: skip
    told = log_likelihood(model, fast, rows, around=bound(mixture))
    sums = [-(a + b + c) / 3 for i, a in enumerate(told) for j, b in enumerate(told[:i])
            for c in told[:j]]  # fmt: skip
    assert min(abs(one - losses["6"]) for one in sums) < 1e-5
    with pytest.raises(ValueError, match=r"val_set_size is 12, and .* has 12 rows: none would be"):
        train(settings(place, tmp_path / "all", val_set_size=12))


def test_a_run_that_was_broken_off_goes_on_to_the_same_weights(place, tmp_path, monkeypatch):
    how = {"num_epochs": 4, "val_set_size": 2, "save_steps": 3, "lora_dropout": 0.2}
    whole = settings(place, tmp_path / "whole", **how)
    train(whole)
    broken = settings(place, tmp_path / "broken", **how)

    def stops(self, progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlp.scienceqa.train.HeldOut.__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert not broken.output_dir.exists()
    train(broken)
    assert same(tensors(whole.output_dir), tensors(broken.output_dir))
    before = tensors(broken.output_dir)
    train(broken)  # Done already: it is written again.
    assert same(before, tensors(broken.output_dir))
    with pytest.raises(
        ValueError, match=r"was made with other settings .*cutoff_len was 256, is 99"
    ):
        train(replace(broken, cutoff_len=99))


def test_a_training_begins_with_a_mixture_that_was_trained(place, tmp_path):
    first = settings(place, tmp_path / "first")
    train(first)
    more = {"output_dir": tmp_path / "more/mola", "learning_rate": 1e-12}
    train(settings(place, tmp_path, resume_from_checkpoint=str(first.output_dir), **more))
    begun, end = tensors(first.output_dir), tensors(tmp_path / "more/mola")
    assert all(torch.allclose(begun[key], end[key], atol=1e-6) for key in begun)
    with pytest.raises(
        FileNotFoundError, match=r"mixture: .*gates.* is no file, expected the gates"
    ):
        train(settings(place, tmp_path / "x", resume_from_checkpoint=str(tmp_path / "nothing")))
    with pytest.raises(
        ValueError, match=r"expert0 at model.layers.0.* has rank 8 and scale 2 there"
    ):
        train(
            settings(place, tmp_path / "y", resume_from_checkpoint=str(first.output_dir), lora_r=4)
        )


def test_whole_texts_are_learned_before_a_task(place, tmp_path, capsys):
    texts = [{"input": None, "instruction": None, "output": "rock milk " * n} for n in range(1, 30)]
    table = datasets.DatasetDict(train=datasets.Dataset.from_list(texts))
    table.save_to_disk(tmp_path / "meta.hf")
    typed(
        tmp_path, "train_instruction", "--base_model", place / "base", "--data_path", "meta.hf",
        "--output_dir", "before", "--batch_size", 8, "--micro_batch_size", 8, "--num_epochs", 1,
        "--cutoff_len", 32, "--val_set_size", 1, "--number_experts", 2, "--train_on_inputs",
        "--add_eos_token", "--prompt_template_name_meta", "meta", "--load_in_8bit", "false",
    )  # fmt: skip
    assert "rows have more than 32 tokens, and lose their end" in capsys.readouterr().out
    line = json.loads((tmp_path / "before_run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["balance"] > 1.9 and line["step"] == 4
    # What was learned so is where the task's training begins.
    typed(
        tmp_path, "train", "--base_model", place / "base", "--data_path",
        place / "sqa/science_qa.hf", "--output_dir", "after", "--batch_size", 4,
        "--micro_batch_size", 4, "--number_experts", 2, "--resume_from_checkpoint", "before",
    )  # fmt: skip
    assert (tmp_path / "after/gates/model.safetensors").is_file()
    first = InstructionConfig(
        base_model=str(place / "base"), data_path=str(tmp_path / "meta.hf"), batch_size=29,
        micro_batch_size=29, num_epochs=1, val_set_size=0, cutoff_len=32, obalance=False,
        output_dir=tmp_path / "one", number_experts=2,
    )  # fmt: skip
    train_instruction(first)
    line = json.loads((tmp_path / "one_run/metrics.jsonl").read_text())
    model, fast = load_base(str(place / "base"))
    sums, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*fast(text["output"])["input_ids"], 1][:32]])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        sums -= logits.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert line["lm"] == pytest.approx(sums / count, rel=1e-5)


def test_questions_made_from_wordnet_go_the_whole_way(place, tmp_path, capsys):
    wordnet_package(tmp_path / "npm")
    typed(tmp_path, "prepare", "--dataset", "wordnet", "--packages", "npm", "--save_path", "qa")
    (tmp_path / "settings.yaml").write_text(
        f"base_model: {place / 'base'}\ndata_path: qa/science_qa.hf\noutput_dir: mola\n"
        "number_experts: [2, 3]\nlora_r: 4,8\ntop_k: 2\nlora_target_modules: [q_proj, up_proj]\n"
        "group_by_length: true\nnum_epochs: 0.05\nbatch_size: 16\n"
    )
    typed(tmp_path, "train", "--config", "settings.yaml", "--micro_batch_size", 16)
    assert "3 steps" in capsys.readouterr().out
    typed(
        tmp_path, "evaluate", "--test_dataset", "qa/scienceq_validation.json", "--base_model",
        place / "base", "--mola_weights", "mola", "--save_path", "r.json", "--batch_size", 64,
        "--max_new_tokens", 2, "--number_experts", "2,3", "--lora_target_modules",
        "up_proj,q_proj",
    )  # fmt: skip
    asked = results(tmp_path / "qa/scienceq_validation.json")
    assert results(tmp_path / "r.json")["answers"] == [row["answer"] for row in asked]


def test_a_base_in_eight_bits_is_trained_on_and_asked(tmp_path, place):
    base(tmp_path / "base", width=64)
    config = settings(tmp_path, tmp_path, data_path=str(place / "sqa/science_qa.hf"),
                      load_in_8bit=True, batch_size=12, micro_batch_size=12)  # fmt: skip
    train(config)
    asked = load_asked(config.base_model, config.output_dir, bits=True)
    assert asked.model.config.quantization_config.load_in_8bit
    assert isinstance(asked(["Pick rock."], tokens=2)[0], str)


def test_wandb_is_told_what_the_flags_say(place, tmp_path, wandb: Wandb):
    config = settings(
        place, tmp_path, wandb_project="mola", wandb_run_name="first", wandb_watch="all",
        wandb_log_model=True, val_set_size=2, num_epochs=2, save_steps=3,
    )  # fmt: skip
    train(config)
    (run,) = wandb.runs
    assert run.given["project"] == "mola" and run.given["name"] == "first"
    assert run.watched == [{"log": "all", "log_freq": 10}]
    assert [(name, kind) for name, kind, _ in run.artifacts] == [("mola_run", "model")]
    assert [step for step, values in run.logged if "held-out loss" in values] == [3, 5]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_r": "8,8,8"}, "lora_r has 3 numbers, and the model has 2 layers with lora_target"),
        ({"number_experts": "2,2,2"}, "number_experts has 3 numbers, and the model has 2 layers"),
        ({"top_k": (2,)}, "top_k has 1 numbers, and the model has 2 layers"),
        ({"top_k": "2,4"}, "top_k is 4 in layer 1, which has 3 experts by number_experts"),
        ({"lora_target_modules": "w1"}, "targets of lora_target_modules: 'w1' names no layer"),
        ({"lora_target_modules": "q_proj,lm_head"}, "target lm_head lies in no block"),
        ({"data_path": "nothing.json"}, "data_path: nothing.json, was not loaded: there is no"),
        ({"prompt_template_name": "x"}, "prompt_template_name: templates.x.json is no file"),
        ({"base_model": "nowhere"}, "base is 'nowhere', expected a folder, a Hub id"),
    ],
)
def test_what_does_not_fit_is_told_before_any_step(place, tmp_path, changes, told):
    config = settings(place, tmp_path, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        train(config)
    assert not config.run.exists() and not config.output_dir.exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "batch_size is 8 and micro_batch_size 3: the"),
        ({"batch_size": 4, "micro_batch_size": 8}, "batch_size is 4 and micro_batch_size 8: the"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0, expected at least 1"),
        ({"lora_r": "8,a"}, "lora_r is '8,a', expected a whole number, or one for each layer"),
        ({"number_experts": "squares"}, "number_experts is 'squares', expected a whole number"),
        ({"lora_target_modules": ""}, "lora_target_modules is '', expected names with commas"),
        ({"val_set_size": 1.5}, "val_set_size is 1.5, expected a number of rows or a share"),
        ({"val_set_size": -1}, "val_set_size is -1, expected"),
        ({"cutoff_len": 1}, "cutoff_len is 1, expected at least 2"),
        ({"num_epochs": 0}, "num_epochs is 0, expected a positive number"),
        ({"wandb_watch": "all"}, "wandb_watch: given without a wandb_project"),
        ({"wandb_project": "x", "wandb_watch": "some"}, "wandb_watch is 'some', expected true"),
        ({"data_path": ""}, "data_path is empty"),
    ],
)
def test_settings_that_cannot_be_are_told(changes, told):
    with pytest.raises(ValueError, match=told):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_on_inputs": False}, "train_on_inputs is false, and a text here has no input"),
        ({"prompt_template_name_meta": "x"}, "prompt_template_name_meta is 'x', expected one of"),
    ],
)
def test_settings_of_whole_texts_that_cannot_be_are_told(changes, told):
    with pytest.raises(ValueError, match=told):
        InstructionConfig(**changes)


def test_rows_without_text_are_told(place, tmp_path):
    file = as_json(tmp_path / "rows.json", [{"instruction": None, "output": "x"}, {"output": ""}])
    with pytest.raises(ValueError, match="row 0: instruction is None, expected some text; row 1"):
        train(settings(place, tmp_path, data_path=str(file)))
    with pytest.raises(ValueError, match="row 1: output is '', expected some text"):
        train_instruction(InstructionConfig(data_path=str(file), output_dir=tmp_path / "m"))
    file = as_json(tmp_path / "rows.json", [{"instruction": "a", "input": 3, "output": "x"}])
    with pytest.raises(ValueError, match="row 0: input is 3, expected text"):
        train(settings(place, tmp_path, data_path=str(file)))
    file = as_json(tmp_path / "rows.json", [{"question": "x"}])
    with pytest.raises(ValueError, match=r"no column 'instruction' .found question.; no column"):
        train(settings(place, tmp_path, data_path=str(file)))


def test_a_folder_of_other_things_is_not_written_over(place, tmp_path):
    (tmp_path / "mola").mkdir()
    (tmp_path / "mola/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"mola holds thesis.txt, which is no part of a mixture"):
        train(settings(place, tmp_path))
    assert (tmp_path / "mola/thesis.txt").read_text() == "years of work"


def test_an_encoder_decoder_is_told_by_its_kind(tmp_path, place):
    T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"a t5 or .*, expected AutoModelForCausalLM"):
        train(settings(place, tmp_path, base_model=str(tmp_path / "t5")))


@pytest.mark.parametrize(
    ("typed_in", "told"),
    [
        (["train", "--number_expert", "2"], "unrecognized arguments: --number_expert 2"),
        (["evaluate", "--mola_weight", "x"], "unrecognized arguments: --mola_weight x"),
        (["prepare", "--prompt_format", "CQ-A"], "input is 'CQ', expected one of CQM"),
        (["train", "--lora_r", "8,8,"], "lora_r is '8,8,', expected"),
        (["train", "--obalance", "often"], 'Parser key "obalance"'),
        (["ask", "--question", "Why?"], "choices are 0, expected 2 to 26"),
        (["sing"], "invalid choice: 'sing'"),
        ([], 'expected "subcommand" to be one of {prepare,train,evaluate,ask'),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, capsys, typed_in, told):
    with pytest.raises(SystemExit) as ended:
        typed(tmp_path, *typed_in)
    assert ended.value.code == 2
    last = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ") and told in last


@pytest.mark.parametrize("name", ["train", "evaluate", "ask", "prepare", "prepare_instruction"])
def test_help_tells_every_flag(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as ended:
        typed(tmp_path, name, "--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    flags = [line.split()[0] for line in said.splitlines() if line.startswith("  --")]
    assert len(flags) > 5 and f"usage: nlp.scienceqa [options] {name}" in said

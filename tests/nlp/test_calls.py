"""A mixed model in loops that know nothing of mixtures: calls tell what `bound` tells."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import DynamicCache, pipeline

from mole_vl import mix
from mole_vl.gates import MoLE
from nlp.adapter import blocks, bound
from nlp.calls import TextCalls
from nlp.data import collate, collate_prompts
from tests.nlp.families import experts_on
from tests.nlp.test_adapter import PLACED, row, sample
from tests.nlp.toys import tiny_model, tiny_tokenizer
from tests.toys import randomise


def mixed(site, over):
    model = tiny_model(layers=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    found = blocks(model)
    experts = experts_on(model, found, names=("ann", "bob", "cyd"))
    mixture = mix(model, experts, gate=MoLE(over=over), **site, blocks=found, calls=TextCalls())
    randomise(mixture, size=1.0)
    return model, mixture


def generate(model, rows, **settings):
    batch = collate_prompts(rows, 0)
    ids = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6,
        do_sample=False, pad_token_id=0, eos_token_id=0, **settings,
    )  # fmt: skip
    return ids[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("site", "over"), PLACED, ids=str)
def test_generation_by_itself_is_that_of_a_bound_batch(site, over, beams):
    model, mixture = mixed(site, over)
    rows = [row(sample(i, 3 + 2 * i)) for i in range(3)]
    with bound(mixture)(collate_prompts(rows, 0)):
        expected = generate(model, rows, num_beams=beams)
    assert torch.equal(generate(model, rows, num_beams=beams), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("site", "over"), PLACED, ids=str)
def test_a_static_cache_tells_the_padding_too(site, over, attention):
    model, mixture = mixed(site, over)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 3.0
    rows = [row(sample(i, 3 + 4 * i)) for i in range(3)]
    with bound(mixture)(collate_prompts(rows, 0)):
        expected = generate(model, rows)
    assert torch.equal(generate(model, rows, cache_implementation="static"), expected)


def test_masks_by_the_kind_of_layer_tell_the_padding():
    model = tiny_model()
    real = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    mask = (torch.ones(3, 3).tril().bool() & real[:, None] & real[..., None])[:, None]
    for given in ({"full_attention": mask, "sliding_attention": mask}, {"full_attention": real}):
        call = TextCalls()(model, (torch.ones(2, 3).long(),), {"attention_mask": given})
        assert torch.equal(call.masks.real, real)
        assert torch.equal(call.preview["attention_mask"], real.long())


@pytest.mark.parametrize(("site", "over"), PLACED, ids=str)
def test_the_pipeline_of_transformers_says_the_same(site, over):
    model, mixture = mixed(site, over)
    tokenizer = tiny_tokenizer()
    prompts = ["Plural of cat:", "7 in French:"]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = pipe(prompts, batch_size=2, max_new_tokens=6, do_sample=False, return_full_text=False)
    rows = [row(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    with bound(mixture)(collate_prompts(rows, 0)):
        expected = generate(model, rows)
    texts = tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert [one[0]["generated_text"] for one in said] == texts


@pytest.mark.parametrize(("site", "over"), PLACED, ids=str)
def test_labels_tell_the_prompt_in_training(site, over):
    model, mixture = mixed(site, over)
    rows = [row(sample(i, 3 + 2 * i), [*sample(9 + i, 2), 2]) for i in range(3)]
    batch = collate(rows, 0)
    told = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with bound(mixture)(batch):
        expected = model(**told).loss
        gradients = torch.autograd.grad(expected, list(mixture.gates.parameters()))
    loss = model(**told).loss
    torch.testing.assert_close(loss, expected)
    for one, other in zip(
        torch.autograd.grad(loss, list(mixture.gates.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_each_cache_holds_its_own_prompt():
    model, _ = mixed({"site": "block"}, "row")
    first, second = torch.tensor([sample(1, 5)]), torch.tensor([sample(2, 5)])
    token = torch.tensor([[7]])

    def step(cache, ids):
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    alone = []
    for prompt in (first, second):
        cache = DynamicCache(config=model.config)
        step(cache, prompt)
        alone.append(step(cache, token))
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache, prompt in zip(caches, (first, second), strict=True):
        step(cache, prompt)
    for cache, expected in zip(caches, alone, strict=True):
        torch.testing.assert_close(step(cache, token), expected)
    # What a condition says goes before what a call says.
    cache = DynamicCache(config=model.config)
    with model.mixture.condition():
        step(cache, first)
        assert not torch.allclose(step(cache, token), alone[0], atol=1e-3)


def test_copies_are_told_anew():
    model, _ = mixed({"site": "block"}, "row")
    rows = [row(sample(1, 4))]
    expected = generate(model, rows)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generate(twin, rows), expected)


@torch.no_grad()
def test_a_call_that_cannot_be_read_keeps_no_other_thread_out():
    model, _ = mixed({"site": "block"}, "row")
    ids = torch.tensor([sample(1, 5)])
    expected = model(input_ids=ids).logits
    with pytest.raises(AttributeError, match="get_seq_length"):
        model(input_ids=ids, past_key_values=3)
    found = []
    other = threading.Thread(target=lambda: found.append(model(input_ids=ids).logits), daemon=True)
    other.start()
    other.join(20)
    assert not other.is_alive()
    torch.testing.assert_close(found[0], expected)

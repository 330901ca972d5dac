"""A mixture in a language model: causality, padding, generation (DESIGN: Causality)."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mole_vl import Expert, Factors, mix
from mole_vl.gates import (
    Arrow,
    Constants,
    Free,
    Hidden,
    MoLE,
    Phatgoose,
    Responses,
    ScaledSoftmax,
    Sigmoid,
    Softmax,
)
from mole_vl.losses import balanced
from mole_vl.training import Term
from nlp.adapter import blocks, bound
from nlp.data import EncodedRow, TextRow, collate, collate_prompts
from nlp.task import LanguageTask, answer_losses
from tests.toys import SITES, randomise

SCORES = [Hidden(), Responses()]
PREVIEW = {"site": "preview", "after": 1}
# A preview finds weights for rows alone.
PLACED = [(site, over) for site in SITES for over in ("row", "position")] + [(PREVIEW, "row")]


# Every kind of gate, each over what it may vary with: (site, gate).
GATED = [(site, MoLE(over=over)) for site, over in PLACED]
GATED += [
    ({"site": "block"}, MoLE(score=Responses(), over=over, normaliser=normaliser))
    for over in ("row", "position")
    for normaliser in (Softmax(), ScaledSoftmax(total=3.0), Sigmoid())
]
WHOLE = Hidden(pool=("mean", "max", "last"))
GATED += [
    (PREVIEW, MoLE(score=WHOLE, top_k=2, preview="average")),
    ({"site": "block"}, MoLE(score=WHOLE, top_k=2)),
    ({"site": "matrix"}, MoLE(over="position", top_k=1)),
    ({"site": "block"}, MoLE(score=Free())),
    ({"site": "matrix"}, Arrow(top_k=2)),
    ({"site": "matrix"}, Phatgoose(top_k=2, tau=0.1)),
    ({"site": "network"}, Constants(weights={"ann": 0.7, "bob": -0.4, "cyd": 1.0})),
]


def mixed(site=SITES[2], score=None, over="row", gate=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    # Larger weights than at a start, so that what is tested moves the logits visibly.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    experts = []
    for name, rank in (("ann", 2), ("bob", 3), ("cyd", 1)):
        layers = {
            path: Factors(torch.randn(rank, m.in_features), torch.randn(m.out_features, rank), 0.2)
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear) and path.endswith(("q_proj", "v_proj", "up_proj"))
        }
        experts.append(Expert(name, layers))
    gate = gate or MoLE(score=score or Hidden(), over=over)
    mixture = mix(model, experts, gate=gate, **site, blocks=blocks(model))
    randomise(mixture, size=1.0)
    for name, directions in mixture.gates.named_buffers():
        if name.endswith("prototypes") and isinstance(gate, Phatgoose):
            directions.copy_(torch.randn_like(directions))
    return model, mixture


def row(prompt, answer=(2,)):
    return EncodedRow(tuple(prompt), tuple(answer), TextRow("p", "a", "ann"))


def sample(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 40, (length,), generator=generator).tolist()


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_weights_by_token_never_look_ahead(site, score):
    model, _ = mixed(site, score, over="position")
    ids = torch.tensor([sample(1, 9)])
    changed = ids.clone()
    changed[0, 6:] = torch.tensor(sample(2, 3))
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert not torch.allclose(after[:, 6:], before[:, 6:], atol=1e-2)


@pytest.mark.parametrize("site", [*SITES, PREVIEW], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_a_prompt_gate_never_reads_the_answer(site, score):
    model, mixture = mixed(site, score)
    prompt = sample(1, 5)
    one = collate([row(prompt, [*sample(2, 4), 2])], 0)
    two = collate([row(prompt, [*sample(2, 2), *sample(3, 2), 2])], 0)
    other = collate([row(sample(4, 5), [*sample(2, 4), 2])], 0)
    weights, logits = [], []
    for batch in (one, two, other):
        with torch.no_grad(), bound(mixture)(batch), mixture.record() as records:
            logits.append(model(input_ids=batch["input_ids"]).logits)
        weights.append(torch.cat([r.output.weights.reshape(-1, 3) for r in records]))
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(logits[0][:, 4:7], logits[1][:, 4:7])
    assert not torch.allclose(weights[0], weights[2], atol=0, rtol=1e-2)


def test_a_preview_is_shown_no_column_past_the_prompts():
    model, mixture = mixed(PREVIEW)
    batch = collate([row(sample(1, 5), [38, 39, 2]), row(sample(2, 3), [38, 2])], 0)
    shown = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shown.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad(), bound(mixture)(batch):
        model(input_ids=batch["input_ids"])
    assert torch.equal(shown[0], batch["input_ids"][:, :5])
    assert torch.equal(shown[1], batch["input_ids"])


@pytest.mark.parametrize(("site", "gate"), GATED, ids=str)
def test_a_batch_equals_its_rows_one_by_one_on_either_side_of_padding(site, gate):
    model, mixture = mixed(site, gate=gate)
    rows = [row(sample(i, 3 + 2 * i), [*sample(9 + i, 1 + i), 2]) for i in range(3)]
    together = collate(rows, 0)
    with torch.no_grad(), bound(mixture)(together):
        losses, scored = answer_losses(model, together)
    for index, single in enumerate(rows):
        alone = collate([single], 0)
        with torch.no_grad(), bound(mixture)(alone):
            expected, mask = answer_losses(model, alone)
        torch.testing.assert_close(losses[index][scored[index]], expected[mask])
        # The same row with padding on its left.
        left = {key: value.roll(2, 1) for key, value in collate([single, rows[2]], 0).items()}
        left = {key: value[:1] for key, value in left.items()}
        if len(single.prompt) + len(single.answer) + 2 <= left["input_ids"].shape[1]:
            position_ids = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
            with torch.no_grad(), bound(mixture)(left):
                logits = model(
                    input_ids=left["input_ids"],
                    attention_mask=left["attention_mask"],
                    position_ids=position_ids,
                ).logits
            labels = left["labels"][:, 1:]
            nll = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none"
            )
            torch.testing.assert_close(nll[labels.flatten() >= 0], expected[mask])


@pytest.mark.parametrize(("site", "gate"), GATED, ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_cached_equals_uncached_and_batched_equals_single(site, gate, beams):
    model, mixture = mixed(site, gate=gate)
    rows = [row(sample(i, 3 + 2 * i)) for i in range(3)]

    def generate(rows, cached):
        batch = collate_prompts(rows, 0)
        with bound(mixture)(batch):
            ids = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                max_new_tokens=6, do_sample=False, num_beams=beams, use_cache=cached,
                pad_token_id=0, eos_token_id=2,
            )  # fmt: skip
        return ids[:, batch["input_ids"].shape[1] :]

    together = generate(rows, cached=True)
    assert torch.equal(together, generate(rows, cached=False))
    for index, single in enumerate(rows):
        alone = generate([single], cached=True)[0]
        assert torch.equal(together[index][: len(alone)], alone)


def test_every_term_of_the_loss_moves_every_gate():
    model, mixture = mixed()
    randomise(mixture, size=0.5)
    parameters = dict(mixture.gates.named_parameters())
    rows = [row(sample(i, 4), [*sample(5 + i, 3), 2]) for i in range(4)]
    task = LanguageTask(
        model, rows, pad=0, parameters=parameters, around=bound(mixture, balanced(0.1))
    )
    terms = task.losses(collate(rows, 0))
    assert terms.keys() == {"lm", "balance"}
    for name, term in terms.items():
        assert isinstance(term, Term)
        grads = torch.autograd.grad(term.value, list(parameters.values()), retain_graph=True)
        for key, grad in zip(parameters, grads, strict=True):
            assert grad.abs().max() > 1e-7, (name, key)

"""Encoder-decoders: their prompt is the encoder's, and their answer is never looked ahead into."""

import pytest
import torch

from mole_vl import mix
from mole_vl.gates import Hidden, MoLE
from mole_vl.losses import balanced
from mole_vl.training.survey import asked
from nlp.adapter import blocks, bound
from nlp.answers import answers, log_likelihood
from nlp.forms import form_of
from nlp.task import LanguageTask, answer_losses
from tests.nlp.families import SEQ2SEQ, experts_on, seq2seq
from tests.nlp.test_adapter import row, sample
from tests.nlp.toys import tiny_tokenizer
from tests.toys import randomise

PLACES = [("block", "row"), ("layer", "row"), ("matrix", "row"), ("network", "row")]
PLACES += [("matrix", "position")]


def mixed(family, site, over, **where):
    model = seq2seq(family)
    found = blocks(model)
    mixture = mix(
        model, experts_on(model, found), gate=MoLE(score=Hidden(), over=over), site=site,
        blocks=found, **where,
    )  # fmt: skip
    randomise(mixture, size=1.0)
    return model, mixture


def rows_of(*lengths, answer=4):
    return [
        row(sample(i, length), [*sample(20 + i, answer - i % 2), 2])
        for i, length in enumerate(lengths)
    ]


def generated(model, mixture, rows, *, cached=True, beams=1):
    batch = form_of(model).prompts(rows, 0)
    with bound(mixture)(batch):
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            max_new_tokens=5, do_sample=False, use_cache=cached, num_beams=beams,
        )  # fmt: skip
    return form_of(model).said(ids, batch)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("site", "over"), PLACES)
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_cached_equals_uncached_and_a_batch_its_rows(family, site, over, beams):
    model, mixture = mixed(family, site, over)
    rows = rows_of(3, 7, 5)
    together = generated(model, mixture, rows, beams=beams)
    assert torch.equal(together, generated(model, mixture, rows, cached=False, beams=beams))
    for index, single in enumerate(rows):
        alone = generated(model, mixture, [single], beams=beams)[0]
        assert torch.equal(together[index][: len(alone)], alone)


@pytest.mark.parametrize(("site", "over"), PLACES)
@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_a_batch_scores_its_rows_as_each_alone(family, site, over):
    model, mixture = mixed(family, site, over)
    form, rows = form_of(model), rows_of(3, 7, 5)
    together = form.rows(rows, 0)
    with bound(mixture)(together):
        losses, scored = answer_losses(model, together)
    for index, single in enumerate(rows):
        alone = form.rows([single], 0)
        with bound(mixture)(alone):
            expected, mask = answer_losses(model, alone)
        torch.testing.assert_close(
            losses[index][scored[index]], expected[mask], rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize(("site", "over"), PLACES)
@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_a_later_token_of_the_answer_moves_no_earlier_logit(family, site, over):
    model, mixture = mixed(family, site, over)
    form, prompt = form_of(model), sample(1, 5)
    first = form.rows([row(prompt, [5, 6, 7, 8, 2])], 0)
    other = form.rows([row(prompt, [5, 6, 30, 31, 2])], 0)
    logits = []
    for batch in (first, other):
        with bound(mixture)(batch):
            logits.append(form.predictions(model, batch)[0])
    # The decoder reads the answer shifted: the label at 2 is read at 3.
    torch.testing.assert_close(logits[0][:, :3], logits[1][:, :3])
    assert not torch.allclose(logits[0][:, 3:], logits[1][:, 3:], atol=1e-2)


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_teacher_forcing_scores_what_generation_says(family):
    model, mixture = mixed(family, "block", "row")
    form, prompt = form_of(model), row(sample(1, 5))
    said = generated(model, mixture, [prompt])[0].tolist()
    batch = form.rows([row(prompt.prompt, said)], 0)
    with bound(mixture)(batch):
        logits, labels = form.predictions(model, batch)
    assert logits.argmax(-1)[0].tolist() == labels[0].tolist() == said


@pytest.mark.parametrize("site", ["block", "network", "preview"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_gates_learn(family, site):
    model, mixture = mixed(family, site, "row")
    randomise(mixture, size=0.2)
    parameters = dict(mixture.gates.named_parameters())
    rows = rows_of(3, 7, 5, 4)
    task = LanguageTask(
        model, rows, pad=0, parameters=parameters, around=bound(mixture, balanced(0.1))
    )
    for name, term in task.losses(form_of(model).rows(rows, 0)).items():
        grads = torch.autograd.grad(term.value, list(parameters.values()), retain_graph=True)
        for key, grad in zip(parameters, grads, strict=True):
            assert grad.abs().max() > 1e-9, (name, key)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_rows_are_asked_of_each_expert_alone(family):
    model, mixture = mixed(family, "preview", "row")
    rows = rows_of(3, 7, 5, 4)
    task = LanguageTask(model, rows, pad=0, parameters={}, around=bound(mixture))
    found = asked(mixture, task, mixture.names, rows=3)
    for place, name in enumerate(mixture.names):
        with mixture.pinned({name: 1.0}), torch.no_grad():
            for told, one in zip(found.told[:, place], rows, strict=True):
                with bound(mixture)(batch := form_of(model).rows([one], 0)):
                    losses, scored = answer_losses(model, batch)
                torch.testing.assert_close(told, -losses.sum() / scored.sum())


def test_weights_by_position_are_refused_where_another_sequence_is_read():
    model, mixture = mixed("t5", "block", "position")
    batch = form_of(model).rows(rows_of(3, 7), 0)
    told = r"another sequence \(cross-attention keys and values\)"
    with pytest.raises(ValueError, match=told), bound(mixture)(batch):
        answer_losses(model, batch)


def test_answers_are_read_from_the_decoder():
    model = seq2seq("t5")
    tokenizer = tiny_tokenizer()
    rows = rows_of(3, 5)
    said = answers(model, tokenizer, rows)
    batch = form_of(model).prompts(rows, tokenizer.pad_token_id)
    ids = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=7,
        do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    texts = tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
    assert said == [text.strip().partition("\n")[0] for text in texts]
    for value in log_likelihood(model, tokenizer, rows):
        assert value < 0

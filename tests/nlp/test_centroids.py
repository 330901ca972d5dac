"""Centroids, cross norms and rows by cluster on tiny language models."""

import pytest
import torch
import torch.nn.functional as F

from mole_vl import Expert, Factors, mix
from mole_vl.clusters import Clusters
from mole_vl.gates import Average, Nearest
from nlp.adapter import blocks, bound
from nlp.centroids import hidden_centroid, route_by_centroids
from nlp.clusters import cluster_rows
from nlp.cross_norms import cross_norms
from nlp.data import TextRow, collate
from nlp.forms import form_of
from tests.nlp.families import causal, experts_on, seq2seq
from tests.nlp.toys import ROWS, tiny_model, tiny_tokenizer

TASKS = {
    "past": ["Past of go:", "Past tense of see:", "Put in the past: do"],
    "plural": ["One ox, two", "Plural of cat:", "A dog, many"],
    "french": ["7 in French:", "Say 12 in French", "French for 99"],
}


def encoded(model):
    return {
        task: form_of(model).encode_rows(
            [TextRow(prompt, "x", task) for prompt in prompts], tiny_tokenizer()
        )
        for task, prompts in TASKS.items()
    }


def reads_alone(model, path, row):
    """What a module reads of one prompt by itself, without padding: (T, d)."""
    seen = {}
    module = model.get_submodule(path)
    hook = module.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    ids = torch.tensor([row.prompt])
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    encoder(input_ids=ids)
    hook.remove()
    return seen["x"][0]


def small(rows):
    """Rows within the vocabulary of the tiny families."""
    return [type(row)(tuple(i % 37 + 3 for i in row.prompt), (3, 2), row.row) for row in rows]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_a_centroid_is_the_mean_over_prompts_read_one_by_one(family):
    model = seq2seq("t5") if family == "t5" else causal(family)
    rows = small(encoded(tiny_model())["plural"])
    path = list(blocks(model))[1]
    found = hidden_centroid(model, rows, [path], pad=0, batch_rows=2)
    expected = []
    for row in rows:
        x = F.normalize(reads_alone(model, path, row), dim=-1).mean(0)
        expected.append(F.normalize(x, dim=0))
    torch.testing.assert_close(found[path], torch.stack(expected).mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prompts_go_to_the_expert_of_their_own_task():
    model = tiny_model()
    rows = encoded(model)
    paths = list(blocks(model))
    experts = experts_on(model, blocks(model), tuple(TASKS))
    found = {
        name: hidden_centroid(model, own, paths[1:], pad=0, batch_rows=2)
        for name, own in rows.items()
    }
    gate = Nearest(top_k=1)
    mixture = mix(model, experts, gate=gate, site="preview", after=1, blocks=blocks(model))
    route_by_centroids(mixture, found)
    every = [row for own in rows.values() for row in own]
    batch = collate(every, 0)
    with bound(mixture)(batch), mixture.record() as records:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    # The gate reads what the centroids are made of: each row alone, without experts.
    mixture.unmix()
    centre = torch.stack([found[name][paths[1]] for name in TASKS]).mean(0)
    for row, weights, logits in zip(
        every, records[0].output.weights, records[0].output.logits, strict=True
    ):
        x = F.normalize(reads_alone(model, paths[1], row), dim=-1).mean(0)
        seen = F.normalize(x, dim=0) - centre
        scores = torch.stack(
            [F.cosine_similarity(seen, found[name][paths[1]] - centre, dim=0) for name in TASKS]
        )
        torch.testing.assert_close(logits, scores, rtol=1e-3, atol=1e-4)
        assert weights.tolist() == F.one_hot(scores.argmax(), 3).tolist()
    own = torch.tensor([list(TASKS).index(row.row.task) for row in every])
    # Nine prompts of three tasks; chance would be three.
    assert int((records[0].output.weights.argmax(1) == own).sum()) >= 7


def test_centroids_that_cannot_be_found_are_refused():
    model = tiny_model()
    rows = encoded(model)["past"]
    with pytest.raises(ValueError, match="there are no rows"):
        hidden_centroid(model, [], [], pad=0)
    with pytest.raises(ValueError, match=r"the model has no module 'model.layers.7'"):
        hidden_centroid(model, rows, ["model.layers.7"], pad=0)
    mix(model, experts_on(model, blocks(model)), gate=Average(), blocks=blocks(model))
    with pytest.raises(ValueError, match="the model is mixed"):
        hidden_centroid(model, rows, ["model.layers.1"], pad=0)
    other = seq2seq("t5")
    decoder = next(path for path in blocks(other) if path.startswith("decoder"))
    with pytest.raises(ValueError, match=r"decoder.block.0 reads nothing when prompts are read"):
        hidden_centroid(other, small(rows), [decoder], pad=0)


@torch.no_grad()
def test_cross_norms_are_those_of_the_responses():
    model = tiny_model()
    rows = encoded(model)
    experts = experts_on(model, blocks(model), tuple(TASKS))
    # One of them leaves a layer alone.
    lacking = "model.layers.0.mlp.up_proj"
    experts[1] = Expert(
        experts[1].name, {p: own for p, own in experts[1].layers.items() if p != lacking}
    )
    expected = {}
    for one in experts:
        alone = mix(model, [one], gate=Average(), site="matrix")
        for row in rows[one.name]:
            seen = {}
            hooks = [
                layer.register_forward_pre_hook(
                    lambda _m, args, path=path, seen=seen: seen.update({path: args[0][0]})
                )
                for path, layer in alone.layers.items()
            ]
            model(input_ids=torch.tensor([row.prompt + row.answer]))
            for hook in hooks:
                hook.remove()
            for path, x in seen.items():
                for place, other in enumerate(experts):
                    if path in other.layers:
                        norms = (x @ other.layers[path].delta().T).norm(dim=-1)
                        expected.setdefault((one.name, path, place), []).extend(norms.tolist())
        alone.unmix()
    mixture = mix(model, experts, gate=Average(), site="matrix")
    found = cross_norms(mixture, rows, pad=0, batch_rows=2)
    assert found.names == tuple(TASKS)
    for (task, path, place), norms in expected.items():
        value = float(found.by_layer[path][found.names.index(task), place])
        assert value == pytest.approx(sum(norms) / len(norms), rel=1e-3)
    assert (found.by_layer[lacking][:, 1] == 0).all()
    torch.testing.assert_close(found.mean, sum(found.by_layer.values()) / len(found.by_layer))
    ratios = []
    for path, norms in found.by_layer.items():
        others = [float(norms[0, place]) for place in (1, 2) if path in experts[place].layers]
        ratios.append(float(norms[0, 0]) / (sum(others) / len(others)))
    assert float(found.relative[0]) == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_cross_norms_of_what_is_not_there_are_refused():
    model = tiny_model()
    rows = encoded(model)
    mixture = mix(
        model, experts_on(model, blocks(model), tuple(TASKS)), gate=Average(), site="matrix"
    )
    with pytest.raises(ValueError, match="no rows of past; rows of dutch, and no such expert"):
        cross_norms(mixture, {"dutch": rows["past"], **rows, "past": []}, pad=0)
    mixture.unmix()
    path = "model.layers.0.self_attn.q_proj"
    dora = Factors(torch.ones(1, 16), torch.ones(16, 1), 1.0, torch.ones(16))
    mixture = mix(model, [Expert("past", {path: dora})], gate=Average(), site="matrix")
    with pytest.raises(ValueError, match="a DoRA's response is not its own"):
        cross_norms(mixture, {"past": rows["past"]}, pad=0)
    other = seq2seq("t5")
    mixture = mix(other, experts_on(other, blocks(other)), gate=Average(), site="matrix")
    with pytest.raises(ValueError, match="the base is no causal model"):
        cross_norms(mixture, {"ann": rows["past"], "bob": rows["past"]}, pad=0)


def test_rows_go_to_their_tasks_cluster():
    clusters = Clusters(
        names=("past", "french", "plural"),
        groups=(("past", "plural"), ("french",)),
        similarity=torch.eye(3, dtype=torch.float64),
        measure="Delta-W",
        seed=0,
        n_init=1,
    )
    found = cluster_rows(clusters, [*ROWS, TextRow("a", "b", "dutch")])
    assert found == {"past+plural": [ROWS[0], ROWS[1], ROWS[3]], "french": [ROWS[2]]}
    with pytest.raises(ValueError, match="no row of french"):
        cluster_rows(clusters, ROWS[:2])

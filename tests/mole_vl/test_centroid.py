"""Nearest-centroid gates against a plain loop over rows."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from mole_vl import mix, mix_from, save_gates
from mole_vl.gates import Average, GateInput, Nearest, row_features, take_centroids
from tests.toys import BLOCKS, Toy, inputs, three

NAMES = ("ann", "bob", "cyd")


def means(width=6, seed=0, path="blocks.1"):
    generator = torch.Generator().manual_seed(seed)
    common = 5 * torch.randn(width, generator=generator)
    return {
        name: {path: F.normalize(common + torch.randn(width, generator=generator), dim=0)}
        for name in NAMES
    }


def give(mixture, found):
    gates = {s.entry: mixture.gate(n) for n, s in mixture.sites.items() if s.entry}
    take_centroids(gates, mixture.names, found)


def by_loop(x, found, top_k, tau, masked=(), pool=None, path="blocks.1"):
    centre = sum(found[name][path] for name in NAMES) / 3
    rows = []
    for place, row in enumerate(x):
        real = row if pool is None else row[pool[place]]
        feature = sum(v / v.norm() for v in real)
        seen = feature / feature.norm() - centre
        scores = {
            name: float(F.cosine_similarity(seen, found[name][path] - centre, dim=0))
            for name in NAMES
            if name not in masked
        }
        best = sorted(scores, key=lambda name: -scores[name])[: top_k or 3]
        weights = torch.tensor([scores[name] / tau for name in best]).softmax(0).tolist()
        rows.append([dict(zip(best, weights, strict=True)).get(name, 0.0) for name in NAMES])
    return torch.tensor(rows)


@pytest.mark.parametrize("top_k", [1, 2, None])
@torch.no_grad()
def test_weights_are_the_loop_over_rows(top_k):
    model = Toy()
    mixture = mix(
        model, three(model), gate=Nearest(top_k=top_k, tau=0.3), after=1, site="preview",
        blocks=BLOCKS,
    )  # fmt: skip
    found = means()
    give(mixture, found)
    pool = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    x, context = inputs()
    seen = {}
    hook = model.blocks[1].register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    with mixture.disabled():
        model(x, context)
    hook.remove()
    for masked in ((), ("bob",)):
        with mixture.masked(masked) if masked else nullcontext():
            told = mixture.condition(real=torch.ones_like(pool), pool=pool, hold=True)
            with told, mixture.record() as records:
                mixture.preview(x, context)
                model(x, context)
        expected = by_loop(seen["x"], found, top_k, 0.3, masked, pool)
        torch.testing.assert_close(records[0].output.weights, expected)


@torch.no_grad()
def test_a_rows_own_centroid_is_the_nearest():
    x = torch.randn(3, 5, 6)
    model = Toy()
    mixture = mix(model, three(model), gate=Nearest(), site="block", blocks=BLOCKS)
    rows = row_features(x, None)
    found = {
        name: {"blocks.0": row, "blocks.1": row} for name, row in zip(NAMES, rows, strict=True)
    }
    give(mixture, found)
    output = mixture.gate("blocks.0")(GateInput(x), ())
    torch.testing.assert_close(output.weights, torch.eye(3))
    torch.testing.assert_close(output.logits.diagonal(), torch.ones(3))


@torch.no_grad()
def test_without_centroids_nobody_speaks_and_below_the_gate_all_do():
    model = Toy()
    expected = model(*inputs())
    mixture = mix(model, three(model), gate=Nearest(), site="block", blocks=BLOCKS)
    torch.testing.assert_close(model(*inputs()), expected)
    assert Nearest().blind() == Average()
    assert mixture.gate("blocks.0").extra_repr() == "top_k=1, tau=0.1"


@torch.no_grad()
def test_the_file_gives_the_same_gates(tmp_path):
    model = Toy()
    where = {"site": "network", "after": 1, "blocks": BLOCKS}
    mixture = mix(model, three(model), gate=Nearest(top_k=2), **where)
    give(mixture, means())
    expected = model(*inputs())
    save_gates(mixture, tmp_path / "gates.safetensors")
    mixture.unmix()
    again = mix_from(model, three(model)[::-1], tmp_path / "gates.safetensors", blocks=BLOCKS)
    assert again.spec == Nearest(top_k=2)
    torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=0)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = Toy()
    mixture = mix(model, three(model), gate=Nearest(), after=1, site="network", blocks=BLOCKS)
    found = means()
    lacking = {name: own for name, own in found.items() if name != "bob"}
    with pytest.raises(ValueError, match=r"bob has no centroid at blocks.1"):
        give(mixture, lacking)
    with pytest.raises(ValueError, match=r"ann's centroid at blocks.1 is of shape \(7,\)"):
        give(mixture, found | {"ann": {"blocks.1": torch.ones(7)}})
    middle = (found["ann"]["blocks.1"] + found["cyd"]["blocks.1"]) / 2
    with pytest.raises(ValueError, match="the centroid of bob is the mean of all"):
        give(mixture, found | {"bob": {"blocks.1": middle}})
    assert not mixture.gate("network").centroids.any()
    mixture.unmix()
    other = mix(model, three(model), gate=Average(), site="block", blocks=BLOCKS)
    with pytest.raises(ValueError, match="none of the gates is Nearest"):
        give(other, found)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"top_k": 0}, "top_k is 0"), ({"tau": 0.0}, "tau is 0.0, expected a positive")],
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Nearest(**settings)

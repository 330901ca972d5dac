"""A library of mixed ranks, scales and targets, and the same updates written otherwise."""

from functools import partial
from pathlib import Path

import pytest
import torch

from mole_vl import Expert, Factors
from mole_vl.clustering import cluster
from mole_vl.library import ExpertLibrary
from mole_vl.library.transforms import library_embedding, library_merge, library_prototypes
from mole_vl.training import FitConfig
from nlp import library_transforms as with_rows
from nlp.data import collate_prompts, encode_rows
from nlp.models import load_base
from nlp.routes import RouteConfig, routed
from nlp.shelf import open_shelf
from tests.nlp.library_toys import rows_of, world

FORMS = {
    "french": (5, 0.2, ("gate_proj", "up_proj", "down_proj")),
    "german": (1, 2.0, ("q_proj", "up_proj")),
    "past": (2, 4.0, ("q_proj", "v_proj")),
    "plural": (3, 3**-0.5, ("q_proj", "k_proj", "v_proj", "o_proj")),
}
NAMES = list(FORMS)
WEIGHTS = dict(zip(NAMES, [1.0, 2.0, -1.0, 0.5], strict=True))


def expert(model, name, turned):
    """An expert; `turned`, its update is written as (R A, B R^-1)."""
    rank, scale, targets = FORMS[name]
    chance = torch.Generator().manual_seed(rank)
    layers = {}
    for path, layer in model.named_modules():
        if path.endswith(targets):
            out, width = layer.weight.shape
            a = torch.randn(rank, width, generator=chance) / 3
            b = torch.randn(out, rank, generator=chance) / 3
            turn = torch.randn(rank, rank, generator=chance) + 2 * torch.eye(rank)
            if turned:
                a, b = turn @ a, b @ torch.linalg.inv(turn)
            layers[path] = Factors(a, b, scale)
    return Expert(name, layers, base="base")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two libraries of the same updates, the second one's written otherwise."""
    monkeypatch.chdir(tmp_path)
    world(tmp_path)
    model, _ = load_base("base")
    found = [ExpertLibrary.open(f"local://{word}", create=True) for word in ("plain", "turned")]
    for turned, library in enumerate(found):
        for name in NAMES:
            library.add(expert(model, name, bool(turned)), task=name)
    return found


def flat(layers):
    return torch.cat([layers[path].flatten() for path in sorted(layers)])


def logits(library, route, **how):
    model, tokenizer = load_base("base")
    config = RouteConfig(library=library.address, experts=",".join(NAMES), route=route, **how)
    _, around = routed(model, tokenizer, open_shelf(config), config)
    rows = [row for name in NAMES for row in rows_of(name)]
    batch = collate_prompts(encode_rows(rows, tokenizer), 0)
    with around(batch), torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return out.logits[batch["attention_mask"].bool()]


def everything(library):
    """What each transform, merge and route makes of a library."""
    found = {}
    own = [library[name].expert for name in NAMES]
    clusters = cluster(own, 2)
    found["cosines"] = clusters.similarity
    found["groups"] = torch.tensor([len(group) for group in clusters.groups])
    found["embedding"] = library_embedding(library, NAMES).vectors
    for how, more in {"uniform": {}, "weighted": {"weights": WEIGHTS}, "ties": {"rank": 3},
                      "dare": {"rank": 3}}.items():  # fmt: skip
        merged = library_merge(library, f"merged-{how}", how, NAMES, **more).expert
        found[how] = flat({path: factors.delta() for path, factors in merged.layers.items()})
    for name, own in library_prototypes(library, NAMES).items():
        found[f"prototypes of {name}"] = flat(own).abs()
    rows = {"library": library.address, "experts": ",".join(NAMES), "data": "local://tasks"}
    found["norms"] = with_rows.norms(with_rows.NormsConfig(**rows)).mean
    with_rows.centroids(with_rows.CentroidsConfig(**rows))
    runs = Path("runs") / library.address.partition("://")[2]
    fit = FitConfig(output=runs, steps=2, rows=2, progress=False)
    with_rows.phatgoose(with_rows.PhatgooseLibraryConfig(**rows, fit=fit))
    for route in ("uniform", "arrow", "phatgoose", "nearest"):
        found[f"route {route}"] = logits(library, route)
    found["route weighted"] = logits(library, "weighted", weights=WEIGHTS)
    return found


def test_all_that_is_made_of_a_mixed_library_is_one_however_it_is_written(places):
    plain, turned = places
    paths = plain["past"].expert.layers
    assert not any(torch.allclose(paths[p].a, turned["past"].expert.layers[p].a) for p in paths)
    found, other = everything(plain), everything(turned)
    for key, one in found.items():
        assert bool(one.isfinite().all()) and float(one.abs().max()) > 0, key
        torch.testing.assert_close(other[key], one, rtol=1e-3, atol=1e-4, msg=partial(_told, key))


def _told(key, said):
    return f"{key}: {said}"

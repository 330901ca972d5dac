"""Clusters of experts: what was planted is found, kept, drawn, and merged."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics.pairwise import cosine_similarity

from mole_vl import Expert, Factors
from mole_vl.cluster_map import cluster_map
from mole_vl.clustering import cluster, cluster_flattened
from mole_vl.clusters import Clusters, cluster_averages
from mole_vl.flattened import flattened_embedding
from mole_vl.similarity import similarity
from mole_vl.svg import standalone
from tests.mole_vl.drawn import SHAPES, drawn, flat, turned

PLANTED = (("a0", "a1", "a2"), ("b0", "b1"), ("c0", "c1", "c2", "c3"))
NAMES = tuple(name for group in PLANTED for name in group)


def planted(seed=0, noise=0.3):
    """Experts around three directions, each written by other factors, ranks and scales."""
    generator = torch.Generator().manual_seed(seed)
    origins = dict(zip("abc", drawn(seed, ("a", "b", "c"), full=True), strict=True))
    experts = []
    for place, name in enumerate(NAMES):
        layers = {}
        for path, own in origins[name[0]].layers.items():
            extra = 1 + place % 3
            a = torch.randn(extra, *own.a.shape[1:], generator=generator)
            b = torch.randn(own.b.shape[0], extra, generator=generator) * noise
            size = 1.0 + place
            layers[path] = Factors(
                torch.cat([own.a, a]), torch.cat([own.b * own.scale, b], 1) * size, 1 / size
            )
        experts.append(Expert(name, layers))
    return turned(experts, seed=seed)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(len(NAMES))))
def test_planted_groups_are_found_in_any_order(seed, order):
    experts = planted(seed)
    found = cluster([experts[place] for place in order], 3, n_init=10)
    assert set(map(frozenset, found.groups)) == set(map(frozenset, PLANTED))
    assert found.names == tuple(NAMES[place] for place in order)


def test_it_is_kmeans_on_the_rows_of_the_cosines():
    experts = drawn(4, [f"e{place}" for place in range(12)])
    found = cluster(experts, 4, seed=7, n_init=3)
    rows = flat(experts)
    rows = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.similarity, rows @ rows.T)
    labels = KMeans(4, n_init=3, random_state=7).fit_predict((rows @ rows.T).numpy())
    together = {
        frozenset((one, two)) for group in found.groups for one, two in combinations(group, 2)
    }
    assert together == {
        frozenset((found.names[i], found.names[j]))
        for i, j in combinations(range(12), 2)
        if labels[i] == labels[j]
    }
    assert (found.seed, found.n_init, found.measure) == (7, 3, "Delta-W")


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_rotation_in_rank_space_changes_no_cluster_but_the_papers_form(orthogonal):
    experts = planted()
    other = turned(experts, orthogonal, seed=1)
    assert cluster(other, 3).groups == cluster(experts, 3).groups
    alike = [
        Expert(f"e{place}", turned(drawn(0, ("ann",)), seed=place)[0].layers) for place in range(6)
    ]
    assert torch.allclose(similarity(alike), torch.ones(6, 6, dtype=torch.float64))
    # The same update six times over, and its flattened factors lie far apart.
    off = flattened_embedding(alike, sparsity=0.0)
    assert (off @ off.T).fill_diagonal_(0).abs().max() < 0.9


def test_over_common_layers_what_an_expert_was_trained_on_does_not_count():
    experts = planted()
    # Of every group one expert leaves the convolution alone, and another has more of its own.
    shapes = {"alone": (5, 9)}
    cut = []
    for place, one in enumerate(experts):
        own = dict(one.layers)
        if place % 2:
            del own["conv"]
        else:
            size = 100.0
            (extra,) = drawn(1, ("x",), shapes, full=True)
            own["alone"] = Factors(extra.layers["alone"].a * size, extra.layers["alone"].b, 1.0)
        cut.append(Expert(one.name, own))
    assert set(cluster(cut, 3, over="common").groups) == set(PLANTED)
    assert set(cluster(cut, 3).groups) != set(PLANTED)
    assert cluster(cut, 3, over="common").measure == "Delta-W on common layers"


def test_the_papers_form_is_its_steps():
    shapes = {path: SHAPES[path] for path in ("q", "v")}
    experts = drawn(2, [f"e{place}" for place in range(7)], shapes, full=True)
    rows = np.stack(
        [
            np.concatenate(
                [
                    factor.numpy().ravel()
                    for path in ("q", "v")
                    for factor in (one.layers[path].a, one.layers[path].b)
                ]
            )
            for one in experts
        ]
    ).astype(np.float64)
    bounds = np.quantile(np.abs(rows), 0.8, axis=1)
    rows[np.abs(rows) <= bounds[:, None]] = 0.0
    vectors = TruncatedSVD(5, n_iter=5, random_state=42).fit_transform(rows)
    found = cluster_flattened(experts, 3, components=5)
    torch.testing.assert_close(found.similarity, torch.from_numpy(cosine_similarity(vectors)))
    labels = KMeans(3, n_init=10, random_state=42).fit_predict(cosine_similarity(vectors))
    assert sorted(map(len, found.groups)) == sorted(np.unique(labels, return_counts=True)[1])
    assert found.measure == "flattened factors"


def test_the_papers_form_wants_factors_alike_and_says_where_they_are_not():
    ann, bob = drawn(full=True)[:2]
    short = Expert("bob", {**bob.layers, "q": Factors(torch.ones(1, 5), torch.ones(7, 1), 1.0)})
    with pytest.raises(
        ValueError,
        match=r"at 1 layers, q first, 'bob' has a \(1, 5\), b \(7, 1\) and 'ann' a \(5, 5\)",
    ):
        cluster_flattened([ann, short], 2)
    less = Expert("bob", {path: own for path, own in bob.layers.items() if path != "v"})
    with pytest.raises(ValueError, match=r"v first, 'bob' has nothing and 'ann' a \(3, 6\)"):
        cluster_flattened([ann, less], 2)
    nil = Expert("nil", {p: Factors(f.a * 0, f.b * 0, 1.0) for p, f in ann.layers.items()})
    with pytest.raises(ValueError, match="the factors of nil are all zero"):
        cluster_flattened([ann, nil], 2)
    with pytest.raises(ValueError, match=r"sparsity is 1.0, expected 0 <= sparsity < 1"):
        cluster_flattened([ann, bob], 2, sparsity=1.0)


def test_the_file_gives_the_same_clusters(tmp_path):
    found = cluster(planted(), 3)
    found.save(tmp_path / "mbc.json")
    again = Clusters.load(tmp_path / "mbc.json")
    assert again.groups == found.groups
    assert again.names == found.names
    assert torch.equal(again.similarity, found.similarity)
    assert again.to_data() == found.to_data()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "mbc"}, "format is 'mbc', expected 'mole-vl clusters 1'"),
        ({"seed": None}, "seed is None, expected a whole number"),
        ({"n_init": 0}, "n_init is 0, expected at least 1"),
        ({"extra": 1}, "extra is unknown"),
        ({"clusters": [["a0"]]}, "the groups hold a0; expected each of a0, a1"),
        ({"clusters": "a0"}, "clusters is 'a0', expected lists of names"),
        ({"experts": [1]}, "experts is .1., expected a list of names"),
        ({"similarity": [[1.0], [0.0]]}, "similarity is no square of numbers"),
        ({"similarity": [[float("nan")]]}, r"similarity is of shape \(1, 1\), expected finite"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, change, told):
    path = tmp_path / "mbc.json"
    path.write_text(json.dumps(cluster(planted(), 3).to_data() | change))
    with pytest.raises(ValueError, match=f"mbc.json: .*{told}"):
        Clusters.load(path)
    lacking = {"format": "mole-vl clusters 1"}
    path.write_text(json.dumps(lacking))
    with pytest.raises(ValueError, match="clusters is missing; experts is missing"):
        Clusters.load(path)


def test_one_expert_a_cluster_is_its_members_average():
    experts = planted()
    found = cluster(experts, 3)
    merged = cluster_averages(found, experts[::-1])
    assert [one.name for one in merged] == ["a0+a1+a2", "b0+b1", "c0+c1+c2+c3"]
    rows = dict(zip(NAMES, flat(experts), strict=True))
    for one, group in zip(merged, found.groups, strict=True):
        expected = torch.stack([rows[name] for name in group]).mean(0)
        torch.testing.assert_close(flat([one])[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a0 are not both among the experts and in the clusters"):
        cluster_averages(found, experts[1:])


def test_the_picture_has_every_pair_by_cluster():
    experts = planted()
    # Names are data: they are escaped.
    experts[0] = Expert("a<0>", experts[0].layers)
    found = cluster(experts, 3)
    drawing = ElementTree.fromstring(standalone(cluster_map(found)))
    space = "{http://www.w3.org/2000/svg}"
    order = [found.names[place] for place in found.order]
    told = [title.text for title in drawing.iter(f"{space}title")]
    places = [found.names.index(name) for name in order]
    assert told == [
        f"{one}, {other}: {found.similarity[i, j]:.3f}"
        for one, i in zip(order, places, strict=True)
        for other, j in zip(order, places, strict=True)
    ]
    frames = [rect for rect in drawing.iter(f"{space}rect") if rect.get("fill") == "none"]
    sizes = [float(frame.get("width")) for frame in frames]
    assert [round((size - 2) / 22) for size in sizes] == [len(group) for group in found.groups]
    words = [word.text for word in drawing.iter(f"{space}text")]
    assert words[: len(order)] == order


def test_bad_input_is_one_clear_error():
    experts = planted()
    with pytest.raises(ValueError, match="k is 10, and there are 9 experts"):
        cluster(experts)
    with pytest.raises(ValueError, match="there is one expert, expected two or more"):
        cluster(experts[:1], 1)
    with pytest.raises(ValueError, match="at least one expert"):
        cluster([], 1)
    with pytest.raises(ValueError, match="experts share the names a0"):
        cluster([experts[0], *experts], 2)
    with pytest.raises(ValueError, match=r"k is 2.5, expected a whole number; n_init is 0"):
        cluster(experts, 2.5, n_init=0)
    with pytest.raises(ValueError, match="over is 'some', expected one of all, common"):
        cluster(experts, 2, over="some")
    nil = Expert("nil", {"q": Factors(torch.zeros(1, 5), torch.ones(7, 1), 1.0)})
    with pytest.raises(ValueError, match="the update of nil is zero"):
        cluster([*experts, nil], 2)
    other = Expert("big", {"q": Factors(torch.ones(1, 8), torch.ones(7, 1), 1.0)})
    with pytest.raises(
        ValueError, match=r"at q, expert .big. has an update of shape \(7, 8\), expected \(7, 5\)"
    ):
        cluster([*experts, other], 2)
    copies = [Expert(name, experts[0].layers) for name in NAMES]
    with pytest.raises(ValueError, match="k is 2, and only 1 of the 9 experts differ"):
        cluster(copies, 2)


def test_the_core_does_without_scikit_learn():
    code = (
        "import sys, mole_vl, mole_vl.clusters, mole_vl.cluster_map, mole_vl.similarity\n"
        "import mole_vl.embedding, mole_vl.sparsified\n"
        "sys.exit('sklearn' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
    assert done.returncode == 0

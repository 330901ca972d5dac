"""The peers of the few-shot benchmark, each held against its own formula on a tiny model."""

import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from torch.func import functional_call

from mole_vl import Expert, Factors, mix
from mole_vl.arithmetic import weighted_sum
from mole_vl.gates import Average
from nlp.data import TextRow
from nlp.world.tasks import SHELF
from tests.nlp.toys import tiny_model, tiny_tokenizer
from tests.toys import expert

# peft asks transformers under a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROWS = [TextRow(f"plural of {word}:", f"{word}s", "plural") for word in ("cat", "egg", "owl")]
Q, V, UP, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def toys(model):
    """Four experts of the shelf's first names, of differing ranks, scales and layers."""
    shapes = [([0, 1], [Q, V], 2), ([0], [Q], 1), ([1], [Q, UP, DOWN], 3), ([0, 1], [V], 4)]
    return {
        source.name: expert(
            source.name,
            model,
            [f"model.layers.{block}.{layer}" for block in blocks for layer in layers],
            [rank] * len(blocks) * len(layers),
            seed=seed,
        )
        for seed, (source, (blocks, layers, rank)) in enumerate(zip(SHELF, shapes, strict=False))
    }


@pytest.fixture
def bench(module, monkeypatch, tmp_path):
    model = tiny_model()
    experts = toys(model)
    bench = module("fewshot_bench")
    monkeypatch.setattr(bench, "SHELF", [s for s in SHELF if s.name in experts])
    monkeypatch.setattr(bench, "load_base", lambda: (model, tiny_tokenizer()))
    monkeypatch.setattr(bench, "read_peft", lambda folder: experts[folder.name])
    return bench.Bench(tmp_path)


@pytest.fixture
def lesson(module):
    return module("fewshot_bench").Lesson("no expert's", ROWS, ROWS)


def logits(model):
    ids = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def with_updates(model, updates):
    """The logits of the base whose weights have these updates added."""
    changed = {
        f"{path}.weight": model.get_submodule(path).weight + u for path, u in updates.items()
    }
    ids = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return functional_call(model, changed, (ids,)).logits


def apart(experts, weights):
    """(sum w B)(sum w A) at every layer, from ranks padded by hand."""
    updates = {}
    for path in {path for one in experts for path in one.layers}:
        a = b = 0
        for one, weight in zip(experts, weights, strict=True):
            if path in one.layers:
                factors, rank = one.layers[path], 4
                up = torch.zeros(factors.shape[0], rank)
                down = torch.zeros(rank, factors.shape[1])
                up[:, : factors.rank] = factors.scale * factors.b
                down[: factors.rank] = factors.a
                a, b = a + weight * down, b + weight * up
        updates[path] = b @ a
    return updates


@st.composite
def mixed_shapes(draw):
    """Experts on any of three layers, of any ranks and scales."""
    widths = {"a": (5, 3), "b": (2, 4), "c": (3, 3)}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    found = []
    for name in draw(st.lists(st.sampled_from("uvwxyz"), min_size=1, max_size=4, unique=True)):
        layers = {}
        for path in draw(st.sets(st.sampled_from(sorted(widths)), min_size=1)):
            rank, (out, width) = draw(st.integers(1, 4)), widths[path]
            layers[path] = Factors(
                torch.randn(rank, width, generator=generator).half(),
                torch.randn(out, rank, generator=generator).half(),
                draw(st.sampled_from([0.5, 1.0, 1.5, 4.0])),
            )
        found.append(Expert(name, layers))
    return found


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(experts=mixed_shapes())
def test_copies_of_one_shape_are_exact(module, experts):
    copies = module("fewshot_peers").of_one_shape(experts)
    assert [copy.name for copy in copies] == [one.name for one in experts]
    assert (
        len({(tuple(c.layers), *((f.rank, f.scale) for f in c.layers.values())) for c in copies})
        == 1
    )
    for one, copy in zip(experts, copies, strict=True):
        for path, factors in copy.layers.items():
            if path in one.layers:
                expected = one.layers[path].delta()
                torch.testing.assert_close(factors.delta(), expected, rtol=1e-6, atol=1e-6)
            else:
                assert not factors.delta().any()


def test_adapters_of_one_shape_answer_like_the_mixture_pinned_to_their_expert(module, bench):
    peers = module("fewshot_peers")
    experts = bench.experts("")
    copies = {copy.name: copy for copy in peers.of_one_shape(experts)}
    found = {}
    with peers.folders_of(copies) as folders:
        first, *others = folders
        adapted = PeftModel.from_pretrained(bench.model, folders[first], adapter_name=first)
        for name in others:
            adapted.load_adapter(folders[name], adapter_name=name)
    for name in copies:
        adapted.set_adapter(name)
        found[name] = logits(adapted)
    adapted.unload()
    mixture = mix(bench.model, experts, gate=Average(), site="matrix")
    base = logits(tiny_model())
    for name in copies:
        with mixture.pinned({name: 1.0}):
            expected = logits(bench.model)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, base, atol=1e-3)


def test_the_merge_cat_is_the_sum_of_updates(module, bench):
    peers = module("fewshot_peers")
    experts = bench.experts("")
    with peers.merges_of(bench, "") as merges, merges.merged("cat", 0.5):
        found = logits(merges.model)
    summed = weighted_sum("sum", experts, [0.5] * len(experts))
    updates = {path: factors.delta() for path, factors in summed.layers.items()}
    torch.testing.assert_close(found, with_updates(tiny_model(), updates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "dare_ties_svd"])
def test_a_merge_rescaled_is_the_merge_of_greater_weights(module, bench, kind):
    with module("fewshot_peers").merges_of(bench, "") as merges:
        with merges.merged(kind, 3.0, 0.5):
            expected = logits(merges.model)
        with merges.merged(kind, 0.5, 0.5):
            assert not torch.allclose(logits(merges.model), expected, atol=1e-3)
            with rescale_adapter_scale(merges.model, 6.0):
                found = logits(merges.model)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_merge_weighs_by_its_total_and_leaves_the_own_expert_out(module, bench, lesson):
    peers, own = module("fewshot_peers"), SHELF[0].name
    others = [one for name, one in toys(bench.model).items() if name != own]
    given = module("fewshot_bench").Lesson(own, ROWS, ROWS)
    found = peers.Merge("cat", total=2.0)(bench, given)
    mixture = mix(bench.model, others, gate=Average(), site="matrix")
    with mixture.pinned(dict.fromkeys(mixture.names, 2 / 3)):
        expected = bench.judge(ROWS)
    mixture.unmix()
    assert found["told"] == pytest.approx(expected["told"], abs=2e-4)
    assert found["told"] != pytest.approx(bench.judge(ROWS)["told"], abs=1e-2)


def test_uniform_is_the_product_of_mean_factors(module, bench, lesson, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "judge", lambda rows, model: asked.append(logits(model)))
    module("fewshot_peers").uniform(bench, lesson)
    updates = apart(bench.experts(""), [0.25] * 4)
    torch.testing.assert_close(asked[0], with_updates(tiny_model(), updates), rtol=1e-4, atol=1e-5)


def test_weights_of_factors_summed_apart_count_twice(module, bench):
    weights = [0.7, -1.2, 0.0, 1.5]
    with module("fewshot_peers").summed_apart(bench, "") as summed:
        summed.put([1.0] * 4)
        summed.put(weights)
        found = logits(summed.model)
        summed.put([-weight for weight in weights])
        torch.testing.assert_close(logits(summed.model), found)
    expected = with_updates(tiny_model(), apart(bench.experts(""), weights))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", ["uniform", "cat", "dare_ties_svd"])
def test_an_arm_leaves_the_base_as_it_was(module, bench, lesson, arm):
    peers, before = module("fewshot_peers"), logits(bench.model)
    arms = {"uniform": peers.uniform}
    run = arms[arm] if arm in arms else peers.Merge(arm, total=4.0, density=0.5)
    found = run(bench, lesson)
    assert len(found["hits"]) == len(found["told"]) == len(ROWS)
    assert torch.equal(logits(bench.model), before)
    assert list(bench.model.state_dict()) == list(tiny_model().state_dict())
    assert bench.judge(ROWS)["told"] != found["told"]

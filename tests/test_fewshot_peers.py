"""The peers of the few-shot benchmark, each held against its own formula on a tiny model."""

import importlib
import json
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
from nlp.forms import form_of
from nlp.task import answer_losses
from nlp.world.tasks import SHELF
from tests.nlp.toys import tiny_model, tiny_tokenizer
from tests.toys import expert

# peft asks transformers under a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROWS = [TextRow(f"plural of {word}:", f"{word}s", "plural") for word in ("cat", "egg", "owl")]
IDS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))
Q, V, UP, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def toys(model):
    """Four experts of the shelf's first names, of differing ranks, scales and layers."""
    shapes = [([0, 1], [Q, V], 2), ([1], [Q, UP, DOWN], 3), ([0, 1], [V], 4)]
    names = [source.name for source in SHELF[: len(shapes) + 1]]
    found = {
        name: expert(
            name,
            model,
            [f"model.layers.{block}.{layer}" for block in blocks for layer in layers],
            [rank] * len(blocks) * len(layers),
            seed=seed,
        )
        for seed, (name, (blocks, layers, rank)) in enumerate(zip(names, shapes, strict=False))
    }
    return found | {names[-1]: helpful(names[-1])}


def helpful(name):
    """An expert under which the rows' answers are more likely: a long step down their gradient."""
    model, path = tiny_model(), f"model.layers.1.{DOWN}"
    weight = model.get_submodule(path).weight.requires_grad_()
    rows = form_of(model).encode_rows(ROWS, tiny_tokenizer())
    losses, _ = answer_losses(model, form_of(model).rows(rows, 0))
    losses.sum().backward()
    u, _, v = torch.linalg.svd(weight.grad)
    return Expert(name, {path: Factors(v[:1], u[:, :1], -20.0)})


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
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_updates(model, updates):
    """The logits of the base whose weights have these updates added."""
    changed = {
        f"{path}.weight": model.get_submodule(path).weight + u for path, u in updates.items()
    }
    with torch.no_grad():
        return functional_call(model, changed, (IDS,)).logits


def adding(shares, update):
    """A hook that adds an update's output, weighed at each position."""
    return lambda _, args, out: out + shares * (args[0] @ update.T)


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


def test_the_merges_asked_are_those_chosen(module, monkeypatch, tmp_path):
    peers, choice = module("fewshot_peers"), module("fewshot_merges")
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"fewshot_merges\.json is no file, expected"):
        peers.chosen_merges()
    found = {(k, d, t): -abs(t - 4) - d for k, d in choice.VARIANTS for t in choice.TOTALS}
    found["ties_svd", 0.7, 16.0] = 1.0
    chosen = {"settings": {"chosen": choice.best(found)}}
    (tmp_path / "fewshot_merges.json").write_text(json.dumps(chosen))
    merges = peers.chosen_merges()
    assert merges["peft ties_svd"] == peers.Merge("ties_svd", total=16.0, density=0.7)
    assert merges["peft dare_ties_svd"] == peers.Merge("dare_ties_svd", total=4.0, density=0.2)
    assert [merge.kind for merge in merges.values()] == ["cat", "svd", "ties_svd", "dare_ties_svd"]


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


def test_the_objective_of_lorahub_divides_by_the_examples_and_adds_its_l1(module, bench):
    peers, weights = module("fewshot_peers"), [0.5, -1.0, 0.25, 0.0]
    with peers.summed_apart(bench, "") as summed:
        found = peers.lorahub_objective(bench, summed, ROWS)(weights)
        losses = []
        for row in bench.encoded(ROWS):
            ids = torch.tensor([row.prompt + row.answer])
            with torch.no_grad():
                spoken = summed.model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(row.prompt)
            losses += [-spoken[start + i - 1, t] for i, t in enumerate(row.answer)]
    mean = float(torch.stack(losses).mean())
    assert found == pytest.approx(mean / 3 + 0.05 * 1.75 / 4, rel=1e-5)


def test_lorahub_keeps_within_its_bounds_and_finds_the_same_again(module, bench, lesson):
    peers = module("fewshot_peers")
    found, again = (peers.lorahub(bench, lesson) for _ in range(2))
    weights = found["weights"]
    assert list(weights) == [one.name for one in bench.experts("")]
    assert all(abs(weight) <= 1.5 for weight in weights.values())
    assert any(weights.values())
    assert again["weights"] == weights
    assert again["told"] == found["told"]
    with peers.summed_apart(bench, "") as summed:
        objective = peers.lorahub_objective(bench, summed, ROWS)
        assert objective(list(weights.values())) < objective([0.0] * 4)


def test_x_lora_weighs_every_position_by_its_state_in_the_base(module, bench):
    with torch.no_grad():
        states = bench.model.model(input_ids=IDS).last_hidden_state
        with module("fewshot_peers").x_lora_of(bench, "") as model:
            found = logits(model)
            weights = model.base_model.internal_xlora_classifier.layers(states).softmax(-1)
    base = tiny_model()
    for number, one in enumerate(bench.experts("")):
        for path, factors in one.layers.items():
            hook = adding(weights[:, :, number, None], factors.delta())
            base.get_submodule(path).register_forward_hook(hook)
    torch.testing.assert_close(found, logits(base), rtol=1e-4, atol=1e-5)
    assert weights.std(1).max() > 1e-2


def test_x_lora_answers_as_its_forwards_say(module, bench):
    """Its `generate` runs without a cache, which its first pass would fill for the second."""
    rows = bench.encoded(ROWS)
    ids = torch.tensor([rows[0].prompt])
    with module("fewshot_peers").x_lora_of(bench, "") as model, torch.no_grad():
        found = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=-1)
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_x_lora_learns_its_classifier_alone(module, bench, lesson):
    peers = module("fewshot_peers")
    with peers.x_lora_of(bench, "") as model:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        before = bench.judge(ROWS, model=model)["told"]
    assert names and all("internal_xlora_classifier" in name for name in names)
    after = peers.XLora(lr=5e-2, steps=10)(bench, lesson)["told"]
    assert sum(after) > sum(before)


ARMS = {
    "uniform": lambda peers: peers.uniform,
    "cat": lambda peers: peers.Merge("cat", total=4.0),
    "dare_ties_svd": lambda peers: peers.Merge("dare_ties_svd", total=4.0, density=0.5),
    "LoRAHub": lambda peers: peers.lorahub,
    "X-LoRA": lambda peers: peers.XLora(lr=5e-2, steps=2),
}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_leaves_the_base_as_it_was(module, bench, lesson, arm):
    before, cached = logits(bench.model), bench.model.config.use_cache
    found = ARMS[arm](module("fewshot_peers"))(bench, lesson)
    assert len(found["hits"]) == len(found["told"]) == len(ROWS)
    assert torch.equal(logits(bench.model), before)
    assert list(bench.model.state_dict()) == list(tiny_model().state_dict())
    assert not any(p.requires_grad for p in bench.model.parameters())
    assert bench.model.config.use_cache == cached
    assert bench.judge(ROWS)["told"] != found["told"]

"""Routers over the shelf, and the mixed stream, on a tiny model with three experts."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from mole_vl import mix_from
from mole_vl.gates import Average, MoLE, Phatgoose
from mole_vl.training import FitConfig
from nlp.adapter import blocks, bound
from nlp.data import read_rows, write_rows
from nlp.train_phatgoose import PhatgooseConfig, Taught
from tests.nlp.families import experts_on, lively
from tests.nlp.toys import ROWS, tiny_encoder, tiny_model, tiny_tokenizer

NAMES = ("past", "plural", "french")
FOLDER = Path(__file__).parents[1]
CONFIG = FOLDER / "configs/text_stream.yaml"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def bench(module, tmp_path):
    class Toy(module("fewshot_bench").Bench):
        def __init__(self):
            self.out, self.device = tmp_path, torch.device("cpu")
            self.model, self.tokenizer = lively(tiny_model()), tiny_tokenizer()
            shelf = experts_on(self.model, blocks(self.model), NAMES)
            self._experts = {expert.name: expert for expert in shelf}

    return Toy()


def lesson(module, rows=ROWS, task=""):
    return module("fewshot_bench").Lesson(task, rows, rows)


def one_by_one(bench, rows, weights):
    """What each row is answered under its own weights by name, alone in its batch."""
    mixture = bench.mixed("", Average())
    found = {"hits": [], "told": []}
    for row, own in zip(rows, weights, strict=True):
        with mixture.pinned(own):
            one = bench.judge([row], around=bound(mixture))
        found = {key: [*found[key], *one[key]] for key in found}
    mixture.unmix()
    return found


def assert_same(found, expected):
    assert found["hits"] == expected["hits"]
    assert found["told"] == pytest.approx(expected["told"], abs=2e-4)


def test_the_oracle_is_each_rows_own_expert(module, bench):
    found = module("mixed_stream").oracle(bench, lesson(module))
    assert_same(found, one_by_one(bench, ROWS, [{row.task: 1.0} for row in ROWS]))
    others = one_by_one(bench, ROWS, [{"french": 1.0} for _ in ROWS])
    assert found["told"] != pytest.approx(others["told"], abs=1e-2)


def test_no_prompt_of_the_streams_stands_for_two_tasks():
    for split in ("train", "dev", "test"):
        rows = read_rows(FOLDER / f"worlds/text/data/shelf_{split}.jsonl")
        assert len({row.prompt for row in rows}) == len({(row.prompt, row.task) for row in rows})


@given(st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=5), st.permutations("abcde"))
def test_shares_among_some_tasks_are_a_softmax_over_these_alone(logits, order):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER / "benchmarks"))
        restricted = importlib.import_module("shelf_routers").restricted
    told, kept = torch.tensor([logits]), list(order)[:3]
    expected = told[:, ["abcde".index(name) for name in kept]].softmax(-1)
    found = restricted(told.softmax(-1), "abcde", kept)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Told:
    """A classifier whose shares are known."""

    tasks = ("plural", "french", "past")
    shares = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.5, 0.3], [0.05, 0.9, 0.05], [0.8, 0.15, 0.05]])

    def probabilities(self, texts):
        places = [[row.prompt for row in ROWS].index(text) for text in texts]
        return self.shares[places]


@pytest.mark.parametrize("hard", [False, True])
def test_a_prompt_goes_by_the_classifiers_shares_of_the_experts_at_hand(
    module, bench, monkeypatch, hard
):
    routers = module("shelf_routers")
    monkeypatch.setattr(routers, "task_classifier", Told)
    rows = ROWS[::-1]
    found = routers.classified(hard=hard)(bench, lesson(module, rows, "plural"))
    weights = []
    for shares in Told.shares.flip(0).tolist():
        french, past = shares[1], shares[2]
        soft = {"french": french / (french + past), "past": past / (french + past)}
        weights.append({max(soft, key=lambda name: soft[name]): 1.0} if hard else soft)
    assert_same(found, one_by_one(bench, rows, weights))


def test_joined_directions_are_those_that_each_expert_learned_alone(
    module, bench, monkeypatch, tmp_path
):
    routers = module("shelf_routers")
    for name in NAMES:
        write_rows(tmp_path / f"{name}.jsonl", [row for row in ROWS if row.task == name])
    config = PhatgooseConfig(
        experts=tuple(Taught(folder=tmp_path / n, data=tmp_path / f"{n}.jsonl") for n in NAMES),
        fit=FitConfig(output=tmp_path / "out", steps=2, rows=2, lr=0.1, progress=False),
        gate=Phatgoose(top_k=1),
    )
    monkeypatch.setattr(routers, "PHATGOOSE", config)
    file = tmp_path / "out/alone"
    some = bench.experts("plural")
    mixture = routers.routed_by_position(bench, some)
    assert sorted(path.stem for path in file.iterdir()) == ["french", "past"]
    found = {site: mixture.gate(site).prototypes.clone() for site in mixture.sites}
    mixture.unmix()
    kept = {path: path.stat().st_mtime_ns for path in file.iterdir()}
    routers.phatgoose(bench, lesson(module))
    assert (file / "plural.safetensors").exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for place, expert in enumerate(some):
        alone = mix_from(bench.model, [expert], file / f"{expert.name}.safetensors")
        for site in alone.sites:
            direction = alone.gate(site).direction[0].detach()
            assert direction.any()
            assert torch.equal(found[site][place], direction)
        alone.unmix()


def test_gates_are_trained_once_and_say_where_each_task_goes(module, bench, monkeypatch, tmp_path):
    stream = module("mixed_stream")
    how = stream.Learned(MoLE(), "preview", lr=0.1, steps=3, after=1, rows=2, centring=2)
    found = how(bench, lesson(module), tmp_path / "run", 0)
    monkeypatch.setattr(stream, "fit", None)
    again = how(bench, lesson(module), tmp_path / "run", 0)
    assert {**again, "asking": 0} == {**found, "asking": 0}
    mixture = how.mixture(bench, [], tmp_path / "run", 0)
    for task, weights in found["weights"].items():
        mine = []
        for row in (row for row in ROWS if row.task == task):
            ids = torch.tensor([bench.encoded([row])[0].prompt])
            asked = mixture.condition(hold=True)
            with asked, mixture.record() as records, torch.no_grad():
                mixture.preview(input_ids=ids)
                bench.model(input_ids=ids)
            mine.append(records[0].output.weights[0])
        expected = dict(zip(mixture.names, torch.stack(mine).mean(0).tolist(), strict=True))
        assert weights == pytest.approx(expected, abs=1e-4)
        assert len({round(weight, 3) for weight in weights.values()}) > 1
    every = {*stream.FIXED, *stream.LEARNED}
    assert {arm for arm, _ in stream.cells(False, every)} == every
    assert stream.cells(True, {"sum", stream.GATES}) == [("sum", 0), (stream.GATES, 0)]


def test_ratios_are_those_of_means_and_seeds_are_averaged_within_a_row(module):
    stream = module("mixed_stream")
    tasks = ["a", "a", "b", "b"]
    hits = {stream.ORACLE: [1, 1, 1, 1], "base": [0, 0, 0, 0]}
    found = {
        (arm, seed): {"hits": hits.get(arm, [1, seed % 2, 0, 0]), "told": [-1.0] * 4}
        for arm, seed in stream.cells(False, {*stream.FIXED, *stream.LEARNED})
    }
    for (arm, seed), one in found.items():
        if arm in (stream.GATES, stream.STATES):
            one["weights"] = {
                t: {n: 0.6 + seed / 10 if n == t else 0.1 for n in "ab"} for t in "ab"
            }
    rows = {(row.measure, row.arm): row for row in stream.summary(found, tasks)}
    mean = (1 + 1 / 3) / 4
    assert rows["exact match", stream.GATES].mean == pytest.approx(mean)
    assert rows["exact match", stream.GATES].n == 4
    ratio = rows["exact match over the oracle's, a ratio of means", stream.GATES]
    assert ratio.mean == pytest.approx(mean)
    assert ratio.low <= ratio.mean <= ratio.high
    own = rows["exact match over the oracle's, a ratio of means", stream.ORACLE]
    assert (own.low, own.mean, own.high) == (1.0, 1.0, 1.0)
    assert rows["exact match, a", stream.GATES].mean == pytest.approx((1 + 1 / 3) / 2)
    assert rows["weight of its own expert, b", stream.GATES].mean == pytest.approx(0.7)
    weights = [found[stream.GATES, seed]["weights"] for seed in stream.SEEDS]
    assert "| b | b 0.70, a 0.10 |" in stream.confusion(weights)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 1)), min_size=1, max_size=6))
def test_a_ratio_over_the_oracle_is_of_the_two_means(pairs):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER / "benchmarks"))
        over_oracle = importlib.import_module("mixed_stream").over_oracle
    drawn = np.array([pairs, pairs[::-1]])
    mine, oracle = (sum(pair[part] for pair in pairs) for part in (0, 1))
    np.testing.assert_allclose(over_oracle(drawn, axis=1), mine / oracle)
    np.testing.assert_allclose(over_oracle(np.array(pairs)), mine / oracle)


def test_the_shipped_preset_is_the_one_that_is_measured(module):
    stream, preset = module("mixed_stream"), module("presets").load(CONFIG)
    measured = stream.LEARNED[stream.GATES]
    told = preset.fit
    assert (preset.gate, preset.site, preset.after) == (
        measured.gate,
        measured.site,
        measured.after,
    )
    assert (told.lr, told.steps, told.rows) == (measured.lr, measured.steps, measured.rows)
    assert told.weight_decay == measured.weight_decay
    assert preset.domain.encoder == measured.encoder
    assert (preset.alone, preset.centring) == (measured.alone, measured.centring)
    shelf = module("fewshot_bench").SHELF
    assert sorted(folder.name for folder in preset.domain.experts) == sorted(s.name for s in shelf)


def test_a_wording_lies_in_one_fold_and_every_fold_has_some_of_each_task(module):
    wordings = module("stream_wordings")
    rows = read_rows(FOLDER / "worlds/text/data/shelf_train.jsonl")
    known = [(row.task, wordings.wording_of(row)) for row in rows]
    folds = wordings.folds_of(known).tolist()
    assert len(set(zip(known, folds, strict=True))) == len(set(known))
    seen = {(task, fold) for (task, _), fold in zip(known, folds, strict=True)}
    assert len(seen) == wordings.FOLDS * len({row.task for row in rows})
    (plural,) = (source for source in wordings.SHELF if source.name == "plural")
    for row, (task, place) in zip(rows, known, strict=True):
        if task == "plural":
            before, _, after = plural.wordings["gates"][place].partition("{")
            assert row.prompt.startswith(before)
            assert row.prompt.endswith(after.rpartition("}")[2])


@pytest.mark.parametrize("sentences", [False, True])
def test_held_out_rows_are_routed_by_gates_that_never_saw_their_wording(
    module, bench, tmp_path, sentences
):
    wordings = module("stream_wordings")
    survey = module("stream_wordings").Survey
    # A wording that nobody else has tells nothing but by its direction: four points on two lines.
    read = torch.zeros(20, bench.model.config.hidden_size)
    own = torch.arange(20) % 2
    read[:, 0] = own * 2.0 - 1
    read[:, 1] = torch.arange(20) % 5 / 10
    told = torch.full((20, 3), -4.0)
    told[range(20), own] = 0.0
    how = wordings.replace(wordings.variant("mean", after=1), steps=60, rows=8, lr=0.05)
    features = None
    if sentences:  # The states of all rows are one; what the sentences say is all there is.
        how = wordings.replace(how, encoder=str(tiny_encoder(tmp_path / "encoder")))
        features, read = read, torch.ones_like(read)
    folds = torch.arange(20) % 5
    found = wordings.routed(survey(read, told, features), folds, how, bench, tmp_path, "")
    assert found.tolist() == own.tolist()
    # In the rows of one fold the experts are told the wrong way round: it must not learn of them.
    odd = torch.where((folds == 2)[:, None], told.flip(-1), told)
    again = wordings.routed(survey(read, odd, features), folds, how, bench, tmp_path / "odd", "")
    assert again[folds == 2].tolist() == own[folds == 2].tolist()

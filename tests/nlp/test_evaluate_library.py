"""`mole transform` and `mole evaluate` on a library that was trained here."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from apps.mole import main
from mole_vl import mix
from mole_vl.arithmetic import weighted_sum
from mole_vl.cross_norms import CrossNorms
from mole_vl.gates import Arrow, Average
from mole_vl.library import ExpertLibrary, NameTakenError, transforms
from mole_vl.prototypes import prototypes_of
from mole_vl.sparsified import dare, ties
from nlp import embedding_classifier, evaluate_library, library_scores, routes
from nlp.adapter import blocks, bound
from nlp.answers import answers
from nlp.data import collate_prompts, encode_rows
from nlp.models import load_base
from nlp.shelf import open_shelf
from nlp.task_library import TaskLibrary
from tests.nlp.library_toys import rows_of, shelf, world
from tests.nlp.test_evaluate import SAY
from tests.nlp.toys import tiny_encoder

NAMES = ["french", "past", "plural"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    shelf(world(tmp_path, tuple(NAMES)))
    return ExpertLibrary.open("library")


@pytest.fixture
def mole(monkeypatch, capsys):
    def mole(command):
        monkeypatch.setattr(sys, "argv", ["mole", *command.split()])
        main()
        return capsys.readouterr().out

    return mole


def experts(library, names=NAMES):
    return [library[name].expert for name in names]


def logits(model, rows, around=None):
    _, tokenizer = load_base("base")
    batch = collate_prompts(encode_rows(rows, tokenizer), 0)
    with around(batch) if around else nullcontext(), torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def routed(route, **how):
    """A mixed base as `mole evaluate` mixes it."""
    model, tokenizer = load_base("base")
    config = routes.RouteConfig(library="library", route=route, **how)
    mixture, around = routes.routed(model, tokenizer, open_shelf(config), config)
    return model, mixture, around


def test_uniform_scores_are_those_of_the_mean_expert(place, mole):
    told = mole(
        "evaluate --library library --data local://tasks --tasks past,french --output r.json"
    )
    model, tokenizer = load_base("base")
    mean = weighted_sum("mean", experts(place), [1 / 3] * 3)
    mixture = mix(model, [mean], gate=Average(), site="network", blocks=blocks(model))
    found = json.loads(Path("r.json").read_text())
    for task in ("past", "french"):
        rows = encode_rows(rows_of(task), tokenizer)
        said = answers(model, tokenizer, rows, around=bound(mixture))
        score = sum(a == r.answer for a, r in zip(said, rows_of(task), strict=True)) / 3
        assert found["exact_match"][task] == {"rows": 3, "score": score}
        assert f"| {task} | 3 | {score:.3f} |" in told
    assert list(found["measured"]["experts"]) == NAMES


def test_prototypes_are_kept_and_those_that_are_kept_serve(place, mole, monkeypatch):
    made = []
    real = transforms.prototypes_of
    monkeypatch.setattr(transforms, "prototypes_of", lambda e: made.append(e.name) or real(e))
    command = "evaluate --library library --route arrow --top-k 2 --data local://tasks --limit 1"
    first = mole(command)
    assert made == NAMES
    assert mole(command) == first and made == NAMES
    # What is kept decides: other directions, other weights.
    own = prototypes_of(place["past"].expert)
    for site, kept in place.auxiliary.get("prototypes", "past").items():
        assert torch.equal(kept, own[site])
    turned = {site: torch.roll(kept, 1) for site, kept in own.items()}
    place.auxiliary.put("prototypes", {"past": turned})
    _, mixture, _ = routed("arrow", top_k=2)
    for site in mixture.sites:
        assert torch.equal(mixture.gate(site).prototypes[1], turned[site])


def test_arrow_by_kept_prototypes_is_arrow(place):
    model, _, around = routed("arrow", top_k=2, keep=False)
    assert place.auxiliary.each("prototypes", NAMES) == {}
    plain, _ = load_base("base")
    twin = mix(plain, experts(place), gate=Arrow(top_k=2), site="matrix", blocks=blocks(plain))
    rows = rows_of("past")
    torch.testing.assert_close(logits(model, rows, around), logits(plain, rows, bound(twin)))


def test_an_expert_that_is_replaced_gets_prototypes_of_its_own(place, mole):
    mole("transform prototypes --library library")
    other = place["plural"].expert
    place.replace(type(other)("past", other.layers, base=other.base))
    assert place.auxiliary.get("prototypes", "past") is None
    mole("transform prototypes --library library --experts past")
    found = place.auxiliary.each("prototypes", ["past", "plural"])
    assert all(torch.equal(found["past"][k], v) for k, v in found["plural"].items())


def test_data_of_an_expert_that_is_replaced_meanwhile_are_none_of_the_new_ones(place):
    new = replace(place["past"].expert, layers=dict([*place["past"].expert.layers.items()][:1]))

    def make(names):
        made = {name: {"layer": torch.ones(2)} for name in names}
        place.replace(new)
        return made

    with pytest.raises(ValueError, match="past was replaced or removed while its notes were"):
        transforms.kept(place, "notes", NAMES, make)
    assert sorted(place.auxiliary.all("notes")) == ["french", "plural"]
    assert sorted(transforms.library_prototypes(place, ["past"])["past"]) == list(new.layers)


def test_merges_become_experts_that_no_route_mixes_unless_named(place, mole):
    mole("transform merge --library library --to mean")
    mole('transform merge --library library --to sum --weights {"past":2,"plural":-1,"french":0}')
    mole("transform ties --library library --to voted --density 0.5")
    mole("transform dare --library library --to dropped --seed 3 --rank 2")
    own = experts(place)
    expected = {
        "mean": weighted_sum("x", own, [1 / 3] * 3),
        "sum": weighted_sum("x", own, [0, 2, -1]),
        "voted": ties("x", own, density=0.5).expert,
        "dropped": dare("x", own, density=0.2, seed=3, rank=2).expert,
    }
    for name, expert in expected.items():
        stored = place[name]
        assert stored.info.base == place["past"].info.base
        assert stored.info.training["of"] == {one.name: one.digest for one in own}
        for path, factors in expert.layers.items():
            delta = stored.expert.layers[path].delta()
            torch.testing.assert_close(delta, factors.delta(), rtol=1e-3, atol=1e-4)
    _, mixture, _ = routed("uniform")
    assert list(mixture.names) == NAMES
    assert "| mean |" in mole("evaluate --library library --experts voted --data local://tasks")


def test_embedding_is_kept_with_whom_it_was_made_among(place, mole):
    assert "2 coordinates of" in mole("transform embedding --library library --dimensions 2")
    kept = place.auxiliary.get("embedding", "past")
    assert len(kept["vector"]) == 2
    assert kept["among"] == {name: place[name].info.digest for name in NAMES}


def test_nearest_reads_centroids_that_were_made_before(place, mole):
    mole("transform centroids --library library --data local://tasks")
    _, mixture, around = routed("nearest")
    model = mixture.model
    for name in NAMES:
        with mixture.record() as records:
            logits(model, rows_of(name), around)
        chosen = records[0].output.weights.argmax(-1).flatten().tolist()
        assert chosen == [NAMES.index(name)] * 3


def test_centroids_of_another_base_are_its_own(place, mole, tmp_path):
    made = "transform centroids --library library --data local://tasks"
    mole(made)
    model, tokenizer = load_base("base")
    other = type(model)(model.config)
    for saved in (other, tokenizer):
        saved.save_pretrained(tmp_path / "other")
    before = place.auxiliary.each("centroids-plain", NAMES)
    with pytest.raises(SystemExit):
        mole("evaluate --library library --data local://tasks --route nearest --base other")
    assert "were there" not in mole(f"{made} --base other")
    mole("evaluate --library library --data local://tasks --route nearest --base other --limit 1")
    after = place.auxiliary.each("centroids-plain", NAMES)
    assert all(torch.equal(after["past"][at], own) for at, own in before["past"].items())
    (kind,) = (kind for kind in place.auxiliary.kinds("past") if "-on-" in kind)
    others = place.auxiliary.each(kind, NAMES)
    assert not any(torch.equal(others["past"][at], own) for at, own in before["past"].items())


def test_what_was_there_is_told_and_made_anew_where_that_is_asked(place, mole):
    made = "transform centroids --library library --data local://tasks --limit 1"
    mole(f"{made} --experts past")
    before = place.auxiliary.get("centroids-plain", "past")
    told = mole(made.replace("--limit 1", "--limit 3"))
    assert "those of past were there, and are left alone" in told
    at = list(before)[-1]
    assert torch.equal(place.auxiliary.get("centroids-plain", "past")[at], before[at])
    assert "were there" not in mole(made.replace("--limit 1", "--limit 3 --anew"))
    assert not torch.equal(place.auxiliary.get("centroids-plain", "past")[at], before[at])


def test_norms_beside_a_dora_are_one_message(place, mole, capsys):
    own = place["past"].expert
    layers = {
        path: replace(factors, magnitude=torch.ones(len(factors.b)))
        for path, factors in own.layers.items()
    }
    place.add(replace(own, name="dora", layers=layers), task="past")
    with pytest.raises(SystemExit) as ended:
        mole("transform norms --library library --data local://tasks")
    assert ended.value.code == 2
    assert "error: norms: expert 'dora' is a DoRA at" in capsys.readouterr().err


def test_each_expert_is_asked_alone_and_its_scores_are_noted(place, mole):
    told = mole("transform scores --library library --data local://tasks --tasks french,past")
    for task in ("french", "past"):
        assert f"{task}, 3 rows: " in told
        scores = place.scores.get(task, "exact_match")
        for name in NAMES:
            mole(
                f"evaluate --library library --experts {name} --data local://tasks --output r.json"
            )
            found = json.loads(Path("r.json").read_text())["exact_match"]
            assert scores[name] == found[task]["score"]
    assert place.scores.get("plural", "exact_match") == {}
    ranked = mole("library best --library library --task past").splitlines()
    assert ranked[1].split()[0] == place.scores.best("past", "exact_match")
    assert [line.split()[1] for line in ranked[1:]] == [
        f"{score:.4g}" for score in sorted(place.scores.get("past", "exact_match").values())[::-1]
    ]


def test_scores_that_were_asked_otherwise_are_measures_of_their_own(place, mole, tmp_path):
    command = "transform scores --library library --data local://tasks --tasks past"
    assert "are in library, as exact_match\n" in mole(command)
    before = place.scores.get("past", "exact_match")
    model, tokenizer = load_base("base")
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "other")
    place.scores.put("past", dict.fromkeys(NAMES, 7.0), "exact_match")
    told = mole(f"{command} --style chat")
    assert "as exact_match-chat\n" in told
    measure = mole(f"{command} --style chat --base other --experts past").split()[-1]
    assert measure.startswith("exact_match-chat-on-")
    assert set(place.scores.get("past", "exact_match").values()) == {7.0}
    assert list(place.scores.get("past", measure)) == ["past"]
    assert "past" in mole(f"library best --library library --task past --measure {measure}")
    mole(command)
    assert place.scores.get("past", "exact_match") == before


def test_scores_of_an_expert_that_is_replaced_meanwhile_are_none_of_the_new_one(place, monkeypatch):
    new = replace(place["past"].expert, layers=dict([*place["past"].expert.layers.items()][:1]))
    real = library_scores.exact_match

    def asked(*given, **how):
        if place["past"].expert.digest != new.digest:
            place.replace(new)
        return real(*given, **how)

    monkeypatch.setattr(library_scores, "exact_match", asked)
    with pytest.raises(ValueError, match="past was replaced or removed while its scores were"):
        library_scores.scores(
            library_scores.ScoresConfig(library="library", data="local://tasks", tasks="plural")
        )
    assert sorted(place.scores.get("plural", "exact_match")) == ["french", "plural"]


def test_norms_are_kept_by_expert(place, mole):
    told = mole("transform norms --library library --data local://tasks --limit 2")
    kept = place.auxiliary.each("norms", NAMES)
    assert all(f"on rows of {name}: " in told for name in NAMES)
    by_layer = {
        path: torch.tensor([[kept[t]["by_layer"][path][e] for e in NAMES] for t in NAMES])
        for path in kept["past"]["by_layer"]
    }
    twin = CrossNorms(tuple(NAMES), by_layer)
    for place_, name in enumerate(NAMES):
        assert kept[name]["relative"] == pytest.approx(float(twin.relative[place_]), rel=1e-4)


def test_phatgoose_is_trained_once_and_kept(place, mole, tmp_path):
    train = (
        "transform phatgoose --library library --data local://tasks --fit.output runs/goose "
        "--fit.steps 2 --fit.rows 2 --fit.progress false"
    )
    mole(train)
    assert sorted(path.name for path in (tmp_path / "runs/goose").iterdir()) == NAMES
    kept = place.auxiliary.each("phatgoose-plain", NAMES)
    _, mixture, _ = routed("phatgoose", top_k=1)
    for site in mixture.sites:
        for number, name in enumerate(NAMES):
            direction = mixture.gate(site).prototypes[number]
            assert torch.equal(direction, kept[name][site].flatten())
    before = (tmp_path / "runs/goose/past").stat().st_mtime_ns
    mole(train)
    assert (tmp_path / "runs/goose/past").stat().st_mtime_ns == before
    mole("evaluate --library library --route phatgoose --data local://tasks --limit 1")


def test_a_classifier_is_trained_and_its_probabilities_weigh(place, mole, tmp_path):
    tiny_encoder(tmp_path / "encoder")
    mole(
        "transform classifier --library library --data local://tasks --output judge "
        "--encoder encoder"
    )
    own = embedding_classifier.EmbeddingClassifier.load(tmp_path / "judge")
    (tmp_path / "judge/notes.txt").write_text("of mine")
    with pytest.raises(SystemExit):
        mole(
            "transform classifier --library library --data local://tasks --output judge "
            "--encoder encoder"
        )
    assert (tmp_path / "judge/notes.txt").read_text() == "of mine"
    rows = [rows_of(name)[0] for name in NAMES]
    shares = own.probabilities([row.prompt for row in rows])
    for route, expected in (
        ("classifier", shares),
        ("task_predictor", torch.eye(3)[shares.argmax(1)]),
    ):
        model, _, around = routed(route, classifier=tmp_path / "judge")
        plain, _ = load_base("base")
        twin = mix(plain, experts(place), gate=Average(), site="network", blocks=blocks(plain))
        with twin.pinned(expected):
            wanted = logits(plain, rows, bound(twin))
        torch.testing.assert_close(logits(model, rows, around), wanted, rtol=1e-4, atol=1e-5)
        mole(f"evaluate --library library --route {route} --classifier judge --data local://tasks")


def test_the_highest_shares_sum_to_one_again():
    found = routes._highest(torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]), 2)
    torch.testing.assert_close(found, torch.tensor([[0, 0.625, 0.375], [0.5, 0.5, 0]]))


def test_weighted_is_the_sum_by_weights(place, mole):
    model, _, around = routed("weighted", weights={"past": 2.0, "plural": -1.0, "french": 0.5})
    plain, _ = load_base("base")
    total = weighted_sum("sum", experts(place), [0.5, 2.0, -1.0])
    twin = mix(plain, [total], gate=Average(), site="network", blocks=blocks(plain))
    rows = rows_of("past")
    torch.testing.assert_close(
        logits(model, rows, around), logits(plain, rows, bound(twin)), rtol=1e-4, atol=1e-5
    )


def test_tasks_of_lm_eval_and_of_the_data_in_one_call(place, mole, tmp_path):
    (tmp_path / "say").mkdir()
    (tmp_path / "say/say.yaml").write_text(SAY.format(folder=tmp_path))
    (tmp_path / "rows.jsonl").write_bytes((tmp_path / "tasks/tasks/past.jsonl").read_bytes())
    told = mole(
        "evaluate --library library --route arrow --tasks past,say/say.yaml --data local://tasks "
        "--output r.json"
    )
    found = json.loads((tmp_path / "r.json").read_text())
    said = found["lm_eval"]["results"]["say"]["exact_match,stripped"]
    assert said == found["exact_match"]["past"]["score"]
    assert "| past | 3 |" in told and "|say" in told


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--route arow", "arow"),
        ("--route uniform --top_k 2 --limit 0", "limit is 0"),
        ("--route uniform --top_k 2 --limit 0", "top_k is for arrow and phatgoose"),
        ("--route weighted", "weights are not given"),
        ('--route weighted --weights {"past":1,"bob":2}', "none for french"),
        ('--route weighted --weights {"past":.nan,"plural":1,"french":1}', "'past' is nan"),
        ("--route classifier", "classifier is not given"),
        ("--route classifier --classifier nowhere", "mole transform classifier"),
        ("--route nearest", "keeps no centroids-plain of french, past, plural"),
        ("--route phatgoose", "mole transform phatgoose"),
        ("--experts bob", "has no expert 'bob'"),
        ("--experts past,past", "past is named twice"),
        ("--base nowhere", "there is no such folder"),
        ("--num_fewshot 2", "num_fewshot is for lm-eval"),
        ("--tasks no/such.yaml", "; the tasks of data are french, past, plural"),
        ("--data {}", "data is empty"),
        ("--tasks no/such.yaml", "no YAML file no/such.yaml"),
    ],
)
def test_a_mistake_is_one_message(place, mole, capsys, command, message):
    with pytest.raises(SystemExit) as ended:
        mole(f"evaluate --library library --data local://tasks {command}")
    assert ended.value.code == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in told


def test_a_folder_in_the_results_place_is_told_before_anything_is_measured(
    place, mole, capsys, monkeypatch, tmp_path
):
    (tmp_path / "results.json").mkdir()
    monkeypatch.setattr(evaluate_library, "load_shelf_base", None)
    with pytest.raises(SystemExit):
        mole("evaluate --library library --data local://tasks --output results.json")
    assert "output: results.json is a folder, expected a file" in capsys.readouterr().err


def test_faults_of_the_shelf_are_one_message(place, mole, capsys, tmp_path):
    def told(command):
        with pytest.raises(SystemExit) as ended:
            mole(command)
        assert ended.value.code == 2
        (line,) = [n for n in capsys.readouterr().err.splitlines() if "error: " in n]
        return line

    assert "no library here" in told("evaluate --library nowhere --data local://tasks")
    assert "no library of tasks" in told("evaluate --library library --data local://nowhere")
    assert "neither tasks nor data" in told("evaluate --library library")
    assert "choose another name" in told("transform merge --library library --to past")
    assert "name is 'a/b'" in told("transform merge --library library --to a/b")
    with pytest.raises(NameTakenError):
        transforms.library_merge(place, "past", "uniform", NAMES)
    assert "'past'" in told("transform ties --library library --to past")
    assert "density is 2" in told("transform ties --library library --to x --density 2")
    assert "weights lack" in told('transform merge --library library --to x --weights {"past":1}')
    TaskLibrary.open("local://few", create=True).add({"past": rows_of("past")})
    message = told("transform centroids --library library --data local://few")
    assert "no rows of 'french'" in message and "no rows of 'plural'" in message
    wrong = place["past"].expert
    place.add(type(wrong)("odd", {"layers.9.q": next(iter(wrong.layers.values()))}, base="base"))
    assert "several bases" in told("evaluate --library library --data local://tasks")
    message = told("evaluate --library library --experts odd --data local://tasks")
    assert "layers.9.q" in message
    (place["past"].path / "adapter_model.safetensors").unlink()
    message = told("evaluate --library library --experts past --data local://tasks")
    assert "'past'" in message and "damaged" in message

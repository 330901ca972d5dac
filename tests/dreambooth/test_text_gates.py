"""Gates of a text encoder, trained with the UNet's."""

from dataclasses import replace

import pytest
import torch

from dreambooth.base import Base
from dreambooth.clip_task import ClipLoss
from dreambooth.data import Jitter
from dreambooth.pairs import Pair, Pairs
from dreambooth.subject_style import SubjectStyle
from dreambooth.text_gates import Unencoded, encode_gated
from mole_vl import Expert, Factors, write_peft
from mole_vl.domain import prepare
from mole_vl.gates import Free, MoLE, Sigmoid
from mole_vl.training import FitConfig, Row, fit
from mole_vl.training.rows import rows_of_step
from tests.dreambooth.kinds import write_kind
from tests.dreambooth.test_clip_task import experts
from tests.dreambooth.texts import given, write_text_parts
from tests.dreambooth.toys import write_examples
from tests.toys import randomise


def shaken(domain, gate, site="block"):
    """The domain's mixtures, their gates as if trained."""
    mixtures = domain.mix(gate, site)
    for seed, mixture in enumerate(mixtures.values()):
        randomise(mixture, seed)
    return mixtures


@pytest.mark.parametrize(("over", "site"), [("row", "block"), ("position", "matrix")])
def test_every_term_of_the_loss_moves_every_gate_of_both_networks(tmp_path, over, site):
    domain = SubjectStyle(**given(tmp_path))
    mixtures = shaken(domain, MoLE(over=over), site)
    assert mixtures.keys() == {"unet", "text_encoder"}
    task = domain.task(0.1)
    terms = task.losses(task.batch([Row(0, 0, index, 2) for index in range(2)]))
    assert terms.keys() == {"text", "picture", "balance"}
    gates = [p for mixture in mixtures.values() for p in mixture.gates.parameters()]
    assert [id(p) for p in task.parameters().values()] == [id(p) for p in gates]
    for name, term in terms.items():
        for grad in torch.autograd.grad(term.value, gates, retain_graph=True):
            assert grad.abs().max() > 0, name
    assert all(p.grad is None for p in domain.base.text_encoder.parameters())


def test_the_gradient_of_the_text_encoders_gates_is_the_losss_slope(tmp_path):
    loss = ClipLoss(steps=3, guidance=2.0, first=0.5, last=0.5, through=2, views=1, jitter=Jitter())
    domain = SubjectStyle(**given(tmp_path, loss=loss))
    mixtures = shaken(domain, MoLE(score=Free(), normaliser=Sigmoid()), "network")
    task = domain.task(0.0)
    batch = task.batch([Row(0, 0, index, 2) for index in range(2)])
    logits = mixtures["text_encoder"].gate("network").score.logits

    def value():
        return sum(term.value for term in task.losses(batch).values())

    (found,) = torch.autograd.grad(value(), logits)
    step, slope = 0.02, torch.zeros(2)
    with torch.no_grad():
        for index in range(2):
            logits[index] += step
            above = value()
            logits[index] -= 2 * step
            slope[index] = (above - value()) / (2 * step)
            logits[index] += step
    torch.testing.assert_close(found, slope, rtol=0.02, atol=1e-4)


def test_untrained_gates_are_the_average_and_no_weights_are_the_base(tmp_path):
    settings = given(tmp_path)
    domain = SubjectStyle(**settings)
    domain.mix(MoLE(), "block")
    drawings = domain.drawings()
    torch.testing.assert_close(drawings["gates"], drawings["NLA"], atol=1e-5, rtol=1e-5)
    plain = SubjectStyle(**{**settings, "text_encoder": False})
    mixture = plain.mix(MoLE(), "block")["unet"]
    with mixture.disabled():
        assert torch.equal(drawings["base"], plain.draw(2))
    with mixture.pinned({"owl": 1.0}):
        assert not torch.allclose(drawings["owl"], plain.draw(2), atol=1e-2)


def test_every_prompt_is_weighed_by_its_own_real_tokens(tmp_path):
    domain = SubjectStyle(**given(tmp_path))
    mixture = shaken(domain, MoLE(normaliser=Sigmoid()))["text_encoder"]
    base = domain.base
    words = [Unencoded("bad", "owl"), Unencoded("", "an ink owl")]
    with torch.no_grad(), mixture.record() as records:
        found = encode_gated(base, mixture, words).states
        for row, prompt in enumerate(["bad", "", "owl", "an ink owl"]):
            # The text encoder is causal: without padding, the real tokens' states are the same.
            ids = torch.tensor([base.tokenizer(prompt).input_ids])
            alone = base.text_encoder(ids).last_hidden_state[0]
            torch.testing.assert_close(found[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)
    negative, positive = records[0].output.weights[[0, 2]]
    assert not torch.allclose(negative, positive, atol=1e-3)


def test_a_batch_of_pictures_equals_single_ones(tmp_path):
    domain = SubjectStyle(**given(tmp_path))
    shaken(domain, MoLE(normaliser=Sigmoid()))
    together = domain.draw(3, seed=5)
    torch.testing.assert_close(domain.draw(1, seed=5)[0], together[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("speaking", [("owl", "ink"), ("ink",)])
def test_balance_counts_the_gates_of_both_networks(tmp_path, speaking):
    loss = ClipLoss(steps=3, first=0.5, last=0.5, through=2, views=1)
    domain = SubjectStyle(**given(tmp_path, speaking, loss=loss))
    mixtures = shaken(domain, MoLE(score=Free(), normaliser=Sigmoid()))
    task = domain.task(1.0)
    found = task.losses(task.batch([Row(0, 0, 0, 1)]))["balance"].value
    shares = {}
    for part, mixture in mixtures.items():
        weights = [2 * torch.sigmoid(gate.score.logits) for gate in mixture.gates.values()]
        shares[part] = torch.stack([w / w.sum() for w in weights])
    if len(speaking) == 1:  # its share is one whatever it weighs
        shares.pop("text_encoder")
    expected = -torch.cat(list(shares.values())).mean(0).log().sum()
    torch.testing.assert_close(found, expected)


def test_a_run_trains_both_and_judges_them(tmp_path):
    domain = SubjectStyle(**given(tmp_path))
    run = FitConfig(output=tmp_path / "run", steps=2, rows=2, lr=0.05, progress=False)
    mixtures, task, settings = prepare(domain, MoLE(), run)
    assert settings["experts"].keys() == {"unet", "text_encoder"}
    before = [p.detach().clone() for p in mixtures["text_encoder"].gates.parameters()]
    fit(task, run, settings)
    after = mixtures["text_encoder"].gates.parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    arms = [line.split("|")[1].strip() for line in domain.report(tmp_path / "run").splitlines()[2:]]
    assert arms == ["base", "owl", "ink", "sum", "NLA", "gates"]


@pytest.fixture
def many(tmp_path):
    """The arguments of Pairs: two subjects that change the text encoder, a style that does not."""
    settings = given(tmp_path, speaking=["owl"])
    base = Base.load(settings["base"])
    torch.manual_seed(9)
    experts(base.unet, tmp_path / "others")
    (tmp_path / "others/owl").rename(tmp_path / "loras/fox")
    write_text_parts(base, tmp_path / "loras", ["fox"])
    settings["pictures"]["fox"] = write_examples(tmp_path / "fox", ["a fox"] * 2)
    settings["pairs"] = [
        Pair(
            experts={"subject": tmp_path / "loras" / name, "style": tmp_path / "loras/ink"},
            prompt=f"{name} in ink",
            caption=f"a {name} in ink style",
        )
        for name in ("owl", "fox")
    ]
    return {k: v for k, v in settings.items() if k not in ("experts", "prompt", "caption")}


def test_the_slots_that_have_the_part_are_gated_row_by_row(many):
    domain = Pairs(**many)
    mixtures = shaken(domain, MoLE(normaliser=Sigmoid()))
    assert mixtures["text_encoder"].names == ("owl", "fox")
    assert mixtures["text_encoder"].slots.names == ("subject",)
    assert [part.text_filled for part in domain.parts] == [(0,), (1,)]
    task, rows = domain.task(0.0), rows_of_step(0, 0, 4)
    batch = task.batch(rows)
    assert len({id(scene) for scene in batch.scenes}) == 2
    found = task.losses(batch)
    singles = {"text": [], "picture": []}
    for row, scene in zip(rows, batch.scenes, strict=True):
        (part,) = (part for part in domain.parts if part.unencoded == scene.states)
        alone = part.task(0.0)
        terms = alone.losses(replace(alone.batch([row]), upto=batch.upto))
        for name, values in singles.items():
            values.append(terms[name].value)
    for name, values in singles.items():
        expected = torch.stack(values).mean()
        torch.testing.assert_close(found[name].value, expected, atol=1e-4, rtol=1e-4)


def test_pairs_are_trained_and_judged_by_the_gates_of_both_networks(tmp_path, many):
    domain = Pairs(**many)
    run = FitConfig(output=tmp_path / "run", steps=2, rows=3, lr=0.05, progress=False)
    mixtures, task, settings = prepare(domain, MoLE(normaliser=Sigmoid()), run, balance=0.1)
    fit(task, run, settings)
    assert all(p.abs().max() > 0 for p in task.parameters().values() if p.requires_grad)
    for mixture in mixtures.values():
        randomise(mixture)
    part = domain.parts[1]
    drawings = domain._drawings(part)
    with mixtures["unet"].disabled(), mixtures["text_encoder"].disabled():
        assert torch.equal(drawings["base"], part.draw(2))
    assert not torch.allclose(drawings["gates"], drawings["NLA"], atol=1e-2)
    assert "| a fox in ink style: text |" in domain.report(tmp_path / "run")


def test_what_cannot_be_mixed_is_refused(tmp_path, many):
    with pytest.raises(
        ValueError, match=r"none of the LoRAs owl, ink has a part .*or set text_encoder: false"
    ):
        SubjectStyle(**given(tmp_path / "none", speaking=[])).mix(MoLE(), "block")
    settings = given(tmp_path / "xl")
    settings["base"] = write_kind(tmp_path / "sdxl", "sdxl")
    with pytest.raises(ValueError, match=r"has two text encoders \(SDXL\), expected one"):
        SubjectStyle(**settings).mix(MoLE(), "block")
    write_peft(too_wide(), tmp_path / "loras/owl/text_encoder")
    with pytest.raises(ValueError, match="owl"):
        Pairs(**many).mix(MoLE(), "block")
    (tmp_path / "loras/owl/text_encoder").rename(tmp_path / "loras/ink/text_encoder")
    with pytest.raises(
        ValueError, match=r"in the slot 'subject', owl has no part of the text encoder, and others"
    ):
        Pairs(**many).mix(MoLE(), "block")


def too_wide():
    """A part of another text encoder."""
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    return Expert("owl", {path: Factors(torch.ones(2, 77), torch.ones(77, 2), 1.0)})


def test_parts_that_stay_mute_are_told_of(tmp_path, many, capsys):
    settings = given(tmp_path / "one", speaking=["ink"], text_encoder=False)
    mixtures = SubjectStyle(**settings).mix(MoLE(), "block")
    assert mixtures.keys() == {"unet"}
    assert "note: ink: parts of the text encoder are not mixed" in capsys.readouterr().out
    Pairs(**{**many, "text_encoder": False}).mix(MoLE(), "block")
    assert capsys.readouterr().out.count("note: owl, fox: parts of the text encoder") == 1
    SubjectStyle(**given(tmp_path / "two")).mix(MoLE(), "block")
    assert "note" not in capsys.readouterr().out

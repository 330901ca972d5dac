"""Gates over slots, trained on several pairs, used with LoRAs that they never saw."""

import copy
import json

import pytest
import torch

from dreambooth.adapter import blocks
from dreambooth.base import Base
from dreambooth.clip_task import ClipLoss
from dreambooth.pairs import Pair, Pairs
from mole_vl import Expert, mix_from, save_gates
from mole_vl.domain import prepare
from mole_vl.gates import Free, MoLE, Sigmoid
from mole_vl.training import FitConfig, fit
from tests.dreambooth.test_clip_task import experts, write_clip
from tests.dreambooth.toys import SIDE, write_base, write_examples, write_picture
from tests.toys import randomise


@pytest.fixture
def given(tmp_path):
    base = Base.load(write_base(tmp_path / "base", "v_prediction"))
    for seed in (0, 1):
        torch.manual_seed(seed)
        # The second time round the owl becomes a fox.
        experts(base.unet, tmp_path / f"loras{seed}")
    (tmp_path / "loras1/owl").rename(tmp_path / "loras1/fox")
    return {
        "base": base.name,
        "ordinary": write_examples(tmp_path / "ordinary", ["a thing"] * 4),
        "clip": write_clip(tmp_path / "clip"),
        "pictures": {
            name: write_examples(tmp_path / name, [f"a {name}"] * 2)
            for name in ("owl", "fox", "ink")
        },
        "resolution": SIDE,
        "loss": ClipLoss(steps=2, guidance=2.0, views=1),
        "drawn": 2,
        "steps": 3,
    }


def pairs(tmp_path):
    ink = tmp_path / "loras0/ink"
    return [
        Pair(
            experts={"subject": tmp_path / folder, "style": ink},
            prompt=f"a {name} in ink",
            caption=f"a {name} in ink style",
            truth=write_picture(tmp_path / f"{name}.png", seed=9),
        )
        for name, folder in (("owl", "loras0/owl"), ("fox", "loras1/fox"))
    ]


def test_a_pair_of_many_is_drawn_as_it_is_alone(tmp_path, given):
    domain = Pairs(pairs=pairs(tmp_path), **given)
    mixture = domain.mix(MoLE(normaliser=Sigmoid()), "block")["unet"]
    assert mixture.names == ("owl", "ink", "fox")
    randomise(mixture)
    together = [part.draw(2) for part in domain.parts]
    save_gates(mixture, tmp_path / "gates.safetensors")
    for part, drawn in zip(domain.parts, together, strict=True):
        base = Base.load(given["base"])
        playing = [
            Expert(slot, expert.layers)
            for slot, expert in zip(("subject", "style"), part.experts, strict=True)
        ]
        alone = copy.copy(part)
        alone.base, alone.filled = base, None
        found = blocks(base.unet)
        alone.mixture = mix_from(base.unet, playing, tmp_path / "gates.safetensors", blocks=found)
        torch.testing.assert_close(alone.draw(2), drawn, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("score", [Free(), None])
def test_the_whole_way_from_training_to_a_report(tmp_path, given, score):
    domain = Pairs(pairs=pairs(tmp_path), **given)
    gate = MoLE(normaliser=Sigmoid()) if score is None else MoLE(score=score)
    run = FitConfig(output=tmp_path / "run", steps=2, rows=3, lr=0.05, progress=False)
    mixtures, task, settings = prepare(domain, gate, run)
    before = {k: v.clone() for k, v in mixtures["unet"].gates.state_dict().items()}
    fit(task, run, settings)
    after = mixtures["unet"].gates.state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    assert [pair["prompts"][0] for pair in settings["pairs"]] == ["a owl in ink", "a fox in ink"]
    table = domain.report(tmp_path / "run")
    assert "| a fox in ink style: image |" in table
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert scores.keys() == {"a owl in ink style", "a fox in ink style"}
    assert (tmp_path / "run/a owl in ink style.png").exists()


def test_mistakes_are_named(tmp_path, given):
    with pytest.raises(ValueError, match="pairs is empty"):
        Pairs(pairs=[], **given)
    one, two = pairs(tmp_path)
    other = Pair(**{**vars(two), "experts": {"thing": tmp_path / "loras1/fox"}})
    with pytest.raises(ValueError, match="has the slots thing, expected subject, style"):
        Pairs(pairs=[one, other], **given)
    with pytest.raises(ValueError, match="pictures has no folder for fox"):
        Pairs(pairs=[one, two], **{**given, "pictures": {"owl": tmp_path, "ink": tmp_path}})
    swapped = Pair(**{**vars(two), "experts": dict(zip(two.experts, [one.experts["style"],
                      two.experts["subject"]], strict=True))})  # fmt: skip
    with pytest.raises(ValueError, match=r"slots: .*ink stands more than once"):
        Pairs(pairs=[one, swapped], **given).mix(MoLE(), "block")


def test_pairs_that_would_be_taken_for_another_are_refused(tmp_path, given):
    one, two = pairs(tmp_path)
    other = Pair(**{**vars(two), "experts": {**two.experts, "subject": tmp_path / "loras1/owl"}})
    with pytest.raises(ValueError, match=r"owl stands for .*loras0/owl and .*loras1/owl, expected"):
        Pairs(pairs=[one, other], **given)
    again = Pair(**{**vars(two), "caption": one.caption})
    with pytest.raises(ValueError, match="2 pairs have the caption 'a owl in ink style'"):
        Pairs(pairs=[one, again], **given)
    for caption in (" ", "a fox/owl", "a fox " * 50):
        unnamed = Pair(**{**vars(two), "caption": caption})
        with pytest.raises(ValueError, match=f"caption '{caption}' cannot name the report's"):
            Pairs(pairs=[one, unnamed], **given)


def test_gates_over_slots_say_that_loras_take_their_names(tmp_path, given):
    domain = Pairs(pairs=pairs(tmp_path), **given)
    save_gates(domain.mix(MoLE(), "block")["unet"], tmp_path / "gates.safetensors")
    base = Base.load(given["base"])
    with pytest.raises(ValueError, match=r"missing: subject, style .*slots: any expert may take"):
        mix_from(
            base.unet,
            domain.parts[0].experts,
            tmp_path / "gates.safetensors",
            blocks=blocks(base.unet),
        )

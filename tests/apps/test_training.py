"""Gates from the page are those of the command line, and may be stopped and taken up."""

import json
from dataclasses import replace
from shutil import unpack_archive

import pytest
import torch
from safetensors.torch import load_file

from apps.drawing import Wish, side_by_side
from apps.stopping import Stopped
from apps.training import Lesson, one_file
from dreambooth.base import Base
from dreambooth.subject_style import SubjectStyle
from mole_vl import read_gates
from mole_vl.domain import prepare
from mole_vl.training import fit
from tests.apps.toys import PROMPT
from tests.dreambooth.texts import write_text_parts
from tests.dreambooth.toys import write_examples

LESSON = Lesson(prompt=PROMPT, caption="an owl in ink style", steps=3, rows=2, rate=0.1, every=2)


def trained(page, lesson=LESSON, stop_at=None):
    points = []

    def report(point):
        points.append(point)
        if point.state == "training" and point.step == stop_at:
            page.session.training.stop()

    page.trainer.train(page.session, page.loras, lesson, report)
    page.session.training.start()
    return points


def weights(points):
    return load_file(points[-1].gates / "unet.safetensors")


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name])


def test_they_are_the_command_lines_own(page, tmp_path):
    points = trained(page)
    assert [(p.state, p.step, len(p.samples)) for p in points] == [
        ("preparing", 0, 0),
        ("training", 1, 0),
        ("training", 2, 4),
        ("training", 3, 0),
        ("done", 3, 4),
    ]
    assert points[1].terms.keys() == {"text", "picture"}
    how, own = page.trainer.preset, page.trainer.preset.domain
    domain = SubjectStyle(
        base=page.studio.base,
        experts=[lora.folder for lora in page.loras],
        prompt=LESSON.prompt,
        caption=LESSON.caption,
        pictures=own.picture_folders,
        ordinary=own.ordinary_folder,
        clip=own.clip_name,
        resolution=own.resolution,
        loss=own.loss,
    )
    config = replace(how.fit, output=tmp_path / "run", steps=3, progress=False)
    mixtures, task, settings = prepare(domain, how.gate, config, site=how.site)
    fit(task, config, settings)
    assert_same(weights(points), mixtures["unet"].gates.state_dict())
    assert any(value.any() for value in weights(points).values())


def with_settings(page, **settings):
    how = page.trainer.preset
    page.trainer.preset = replace(how, domain=how.domain.but(**settings))


def test_stopped_and_asked_again_they_are_the_same(page, tmp_path):
    whole = trained(page, replace(LESSON, steps=3, every=3))
    first = page.session.gates_of(frozenset({"owl", "ink"}))
    page.session.folder = tmp_path / "other"
    half = trained(page, stop_at=2)
    assert (half[-1].state, half[-1].step) == ("stopped", 2)
    assert page.session.gates_of(frozenset({"owl", "ink"})) == half[-1].gates != first
    rest = trained(page, replace(LESSON, every=1))
    assert [p.step for p in rest if p.state == "training"] == [3]
    assert_same(weights(whole), weights(rest))
    again = trained(page)
    assert [p.state for p in again] == ["preparing", "done"]


def test_other_pictures_are_another_training(page, tmp_path):
    before = trained(page)
    page.session.pictures["owl"] = write_examples(tmp_path / "other", ["another owl"] * 3)
    after = trained(page)
    assert [p.step for p in after if p.state == "training"] == [1, 2, 3]
    learned = weights(before)
    assert any(not torch.equal(value, learned[key]) for key, value in weights(after).items())


def test_the_side_by_side_draws_with_them(page):
    trained(page, replace(LESSON, rate=2.0))
    looks = []
    side_by_side(page.studio, page.session, page.loras, Wish(prompt=PROMPT, steps=2), looks.append)
    assert looks[-1].weights["unet"].weights.std() > 0.01
    assert page.session.drawn.gates == page.session.gates_of(frozenset({"owl", "ink"}))


def test_a_preset_for_both_networks_trains_both_and_both_draw(page, tmp_path):
    whole = trained(page)[-1].gates
    assert one_file(whole) == whole / "unet.safetensors"
    write_text_parts(Base.load(page.studio.base), page.loras[0].folder.parent)
    with_settings(page, text_encoder=True)
    gates = trained(page, replace(LESSON, rate=2.0))[-1].gates
    unpack_archive(one_file(gates), tmp_path / "unpacked")
    names = {"unet.safetensors", "text_encoder.safetensors"}
    assert {file.name for file in (tmp_path / "unpacked").iterdir()} == names
    looks = []
    side_by_side(page.studio, page.session, page.loras, Wish(prompt=PROMPT, steps=2), looks.append)
    drawn = looks[-1].weights
    assert drawn.keys() == {"unet", "text_encoder"}
    for part, found in drawn.items():
        logits = load_file(gates / f"{part}.safetensors").values()
        expected = 2 * torch.sigmoid(torch.stack(list(logits)))
        torch.testing.assert_close(found.weights.mean(1).sort(0)[0], expected.sort(0)[0])


def test_what_is_missing_is_said_before_anything_is_loaded(page):
    with pytest.raises(ValueError, match="choose at least two LoRAs"):
        page.trainer.train(page.session, page.loras[:1], LESSON, lambda point: None)
    mug = replace(page.loras[0], name="mug")
    assert page.trainer.lacking(page.session, ["owl", "mug"]) == ["mug"]
    with pytest.raises(ValueError, match="there are no pictures of mug yet: add some"):
        page.trainer.train(page.session, [*page.loras, mug], LESSON, lambda point: None)
    with pytest.raises(ValueError, match=r"caption is empty.*; steps is 0, expected 1 to 2000"):
        Lesson(prompt="a", caption=" ", steps=0)
    assert not (page.session.folder / "runs").exists()


def test_who_waits_for_a_training_may_give_up(page):
    points = []

    def report(point):
        points.append(point)
        if point.state == "waiting":
            page.session.training.stop()

    def meanwhile(point):
        if point.state == "preparing":
            with pytest.raises(Stopped):
                page.trainer.train(page.session, page.loras, LESSON, report)
            page.session.training.start()

    page.trainer.train(page.session, page.loras, replace(LESSON, steps=1), meanwhile)
    assert {point.state for point in points} == {"waiting"}


def test_a_fault_midway_leaves_no_gates(page, monkeypatch):
    def broken(self, pictures, seed=0):
        raise ValueError("no room left")

    monkeypatch.setattr(SubjectStyle, "draw", broken)
    with pytest.raises(ValueError, match="no room left"):
        trained(page)
    assert page.session.gates_of(frozenset({"owl", "ink"})) is None
    assert not list(page.session.folder.rglob("unet.safetensors"))
    monkeypatch.undo()
    assert trained(page)[-1].state == "done"
    log = next((page.session.folder / "runs").glob("*/metrics.jsonl")).read_text()
    assert all(json.loads(line)["step"] for line in log.splitlines())


def test_a_preset_with_conditioning_trains_gates_that_the_page_loads(page):
    with_settings(page, conditioning=("time",))
    points = trained(page)
    assert read_gates(points[-1].gates / "unet.safetensors").features == "time"
    with page.studio.holding(page.loras, points[-1].gates) as pipe:
        assert pipe.mixtures["unet"].features.name == "time"
        pipe(PROMPT, num_inference_steps=2, output_type="latent")

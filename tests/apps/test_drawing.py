"""Every way to mix, from one noise; one drawing at a time."""

import threading

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from apps.drawing import Wish, arms, side_by_side
from apps.stopping import Stopped
from mole_vl import save_gates
from pipelines import read_recipe
from tests.apps.toys import PROMPT
from tests.toys import randomise

WISH = Wish(prompt=PROMPT, negative="bad", seed=3, steps=2, guidance=2.0)


def drawn(page, wish=WISH, loras=None, session=None):
    looks = []
    loras = page.loras if loras is None else loras
    side_by_side(page.studio, session or page.session, loras, wish, looks.append)
    return looks


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


def test_masks_decide_which_arms_there_are():
    assert list(arms(["a", "b"], [])) == ["base", "a", "b", "sum", "NLA", "Switch", "gates"]
    masked = arms(["a", "b", "c"], ["b"])
    assert masked["NLA"] == {"weights": {"a": 0.5, "c": 0.5}}
    assert masked["gates"] == {"masked": ("b",)} and "b" not in masked
    assert list(arms(["a", "b"], ["b"])) == ["base", "a", "gates"]
    assert list(arms([], [])) == ["base"]
    named_alike = arms(["base", "sum"], [])
    assert named_alike["base"] == {"strength": 0.0}
    assert named_alike["sum"] == {"weights": {"base": 1.0, "sum": 1.0}}
    assert named_alike["sum, the LoRA"] == {"weights": {"sum": 1.0}}
    with pytest.raises(ValueError, match="every LoRA is masked: tick at least one"):
        arms(["a"], ["a"])


def test_a_wish_reports_all_its_faults():
    with pytest.raises(
        ValueError, match=r"prompt is empty.*; seed is -1, expected 0 to .*; steps is 0, expected 1"
    ):
        Wish(prompt=" ", seed=-1, steps=0)
    with pytest.raises(ValueError, match="longer than 1000 letters"):
        Wish(prompt="a" * 1001)


def test_arms_share_a_noise_and_each_picture_keeps_its_recipe(page):
    looks = drawn(page)
    done = looks[-1]
    assert done.state == "done" and [look.share for look in looks] == sorted(
        look.share for look in looks
    )
    assert list(done.pictures) == ["base", "owl", "ink", "sum", "NLA", "Switch", "gates"]
    plain = StableDiffusionPipeline.from_pretrained(page.studio.base)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        PROMPT,
        negative_prompt="bad",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=2,
        guidance_scale=2.0,
    ).images[0]
    assert abs(pixels(done.pictures["base"]) - np.asarray(expected).astype(int)).max() <= 1
    # Untrained gates of this kind are the sum.
    assert abs(pixels(done.pictures["gates"]) - pixels(done.pictures["sum"])).max() <= 1
    for arm in ("owl", "ink", "sum", "NLA"):
        assert abs(pixels(done.pictures[arm]) - pixels(done.pictures["base"])).max() > 3
    recipe = read_recipe(done.pictures["NLA"])
    assert recipe.prompt == PROMPT and recipe.seed == 3
    assert recipe.settings["weights"] == {"owl": 0.5, "ink": 0.5}
    assert set(recipe.experts["unet"]) == {"owl", "ink"}
    assert done.weights["unet"].weights.shape[1:] == (2, 2)


def test_gates_that_were_trained_draw_and_are_recorded(page):
    with page.studio.holding(page.loras) as pipe:
        for mixture in pipe.mixtures.values():
            randomise(mixture)
            save_gates(mixture, page.root / "gates" / "unet.safetensors")
    page.session.keep_gates(frozenset({"owl", "ink"}), page.root / "gates")
    # Worn in another order, they are other LoRAs to the studio, but the same to the gates.
    weights = drawn(page)[-1].weights["unet"]
    again = drawn(page, loras=page.loras[::-1])[-1].weights["unet"]
    assert weights.weights.std() > 0.05
    by_name = {name: weights.weights[..., i] for i, name in enumerate(weights.experts)}
    for i, name in enumerate(again.experts):
        torch.testing.assert_close(again.weights[..., i], by_name[name])
    masked = drawn(page, Wish(prompt=PROMPT, steps=2, masked=("ink",)))[-1]
    assert "ink" not in masked.pictures
    assert (
        not masked.weights["unet"].weights[..., masked.weights["unet"].experts.index("ink")].any()
    )


def test_a_stopped_drawing_ends_at_once_and_the_next_one_goes_on(page):
    seen = []

    def look(found):
        seen.append(found)
        if found.arm == "ink":
            page.session.drawing.stop()

    with pytest.raises(Stopped):
        side_by_side(page.studio, page.session, page.loras, WISH, look)
    assert seen[-1].arm == "ink" and page.session.drawn is None
    page.session.drawing.start()
    assert drawn(page)[-1].state == "done"


def test_two_at_once_each_get_what_they_would_have_got_alone(page):
    owl, ink = page.loras
    alone = {lora.name: drawn(page, loras=[lora])[-1].pictures for lora in (owl, ink)}
    together = {}

    def draw(lora):
        together[lora.name] = drawn(page, loras=[lora])[-1].pictures

    threads = [threading.Thread(target=draw, args=(lora,)) for lora in (owl, ink)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, pictures in alone.items():
        for arm, file in pictures.items():
            assert (pixels(file) == pixels(together[name][arm])).all()


def test_gates_that_do_not_fit_leave_a_studio_that_draws(page):
    page.session.keep_gates(frozenset({"owl", "ink"}), page.root / "loras")
    with pytest.raises(FileNotFoundError, match="no gate files"):
        drawn(page)
    page.session.keep_gates(frozenset({"owl", "ink"}), None)
    assert drawn(page)[-1].state == "done"
    assert list(drawn(page, loras=[])[-1].pictures) == ["base"]

"""One ordinary LoRA for what was drawn."""

import threading
import zipfile

import pytest
import torch

from apps.drawing import Wish, side_by_side
from apps.exporting import export
from dreambooth.lora_files import read_lora
from tests.apps.toys import PROMPT


def test_a_lora_waits_for_its_turn_though_a_drawing_was_stopped(page):
    side_by_side(page.studio, page.session, page.loras, Wish(prompt=PROMPT), lambda look: None)
    page.session.drawing.stop()
    made = []
    with page.studio.holding(page.loras):
        waits = threading.Thread(
            target=lambda: made.append(export(page.studio, page.session, 8, "diffusers"))
        )
        waits.start()
        waits.join(0.5)
        assert waits.is_alive() and not made
    waits.join()
    assert made[0][0].is_file()


def test_the_lora_is_the_drawn_mixture_to_the_error_that_is_said(page):
    with pytest.raises(ValueError, match=r"rank is 0, .*; form is 'gif', .*; draw first"):
        export(page.studio, page.session, 0, "gif")
    wish = Wish(prompt=PROMPT, steps=2, masked=("ink",), strength=0.5)
    side_by_side(page.studio, page.session, page.loras, wish, lambda look: None)
    owl = read_lora(page.shelf["owl"].folder).experts["unet"]
    for form in ("diffusers", "kohya", "peft"):
        file, missed = export(page.studio, page.session, 8, form)
        assert missed["unet"] < 1e-6
        if form == "peft":
            with zipfile.ZipFile(file) as packed:
                packed.extractall(page.root / "unpacked")
            file = page.root / "unpacked" / "mixture"
        found = read_lora(file).experts["unet"]
        for path, factors in owl.layers.items():
            expected = 0.5 * factors.delta()
            torch.testing.assert_close(found.layers[path].delta(), expected, atol=1e-4, rtol=1e-4)
    file, missed = export(page.studio, page.session, 1, "diffusers")
    assert 0.01 < missed["unet"] < 1
    assert read_lora(file).experts["unet"].layers[path].rank == 1

"""A picture says how it was made."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import Switch, read_recipe, save_picture
from pipelines.recipe import gates_digest
from tests.pipelines.toys import TEXT, mixed, randomise


def test_a_recipe_is_read_back_with_the_picture(tmp_path):
    pipe = mixed(parts=TEXT)
    pipe.register_to_config(_name_or_path="somewhere/base")
    call = {"num_inference_steps": 3, "strength": [1.0, 0.5], "negative_prompt": "schlecht, übel"}
    picture = pipe("a cat", generator=torch.Generator().manual_seed(5), **call).images[0]
    recipe = pipe.recipe("a cat", seed=5, **call)
    save_picture(picture, tmp_path / "cat.png", recipe)
    found = read_recipe(tmp_path / "cat.png")
    assert found == recipe
    assert dataclasses.asdict(found) == {
        "pipeline": "MoLEStableDiffusionPipeline",
        "base": "somewhere/base",
        "experts": {
            part: dict(zip(("ann", "bob"), pipe.mixtures[part].digests, strict=True))
            for part in TEXT
        },
        "gates": {part: gates_digest(pipe.mixtures[part]) for part in TEXT},
        "scheduler": "DDIMScheduler",
        "prompt": "a cat",
        "seed": 5,
        "steps": 3,
        "guidance_scale": 7.5,
        "settings": {"strength": [1.0, 0.5], "negative_prompt": "schlecht, übel"},
    }
    with Image.open(tmp_path / "cat.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(picture))
    again = pipe(
        found.prompt,
        generator=torch.Generator().manual_seed(found.seed),
        num_inference_steps=found.steps,
        guidance_scale=found.guidance_scale,
        **found.settings,
    ).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(picture))


def test_gates_are_told_apart():
    pipe = mixed()
    mixture = pipe.mixtures["unet"]
    one = gates_digest(mixture)
    assert gates_digest(mixed().mixtures["unet"]) == one
    assert gates_digest(mixed(site="layer").mixtures["unet"]) != one
    assert gates_digest(randomise(pipe, 7.0).mixtures["unet"]) != one


def test_tensors_and_specs_become_data_and_functions_are_refused():
    pipe = mixed()
    recipe = pipe.recipe("a", seed=0, weights=torch.tensor([[1.0, 0.5]]), mixing=Switch(every=2))
    assert recipe.settings == {"weights": [[1.0, 0.5]], "mixing": {"kind": "Switch", "every": 2}}
    with pytest.raises(ValueError, match="strength is a function, which a file cannot hold"):
        pipe.recipe("a", seed=0, strength=lambda step: 1.0)


def test_a_picture_without_recipe(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="has no recipe"):
        read_recipe(tmp_path / "plain.png")

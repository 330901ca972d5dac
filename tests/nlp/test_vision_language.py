"""Vision-language models: the gates of the language read text and pictures, the tower's patches."""

import pytest
import torch

from mole_vl import mix
from mole_vl.gates import MoLE
from nlp.adapter import blocks, bound
from nlp.data import collate_prompts
from tests.nlp.families import IMAGE, experts_on, llava, qwen2_vl
from tests.nlp.test_adapter import row, sample
from tests.toys import randomise

PLACES = [("block", "row"), ("layer", "row"), ("matrix", "position")]
# Whether experts change the language model alone, or the tower too.
CASES = [(*place, alone) for place in PLACES for alone in (True, False)]
CASES += [("network", "row", True)]


def text(seed, length):
    return [token % 30 + 3 for token in sample(seed, length)]


def pictures_of_llava(count):
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.manual_seed(5))}


def pictures_of_qwen(count):
    # A picture of 16 by 16 pixels: 4 by 4 patches of 4 pixels, two frames, four tokens.
    patches = torch.randn(count * 16, 3 * 2 * 4 * 4, generator=torch.manual_seed(5))
    grid = torch.tensor([[1, 4, 4]] * count)
    return {"pixel_values": patches, "image_grid_thw": grid}


FAMILIES = {"llava": (llava, pictures_of_llava), "qwen2_vl": (qwen2_vl, pictures_of_qwen)}


def split(pictures, index, count):
    """The inputs of one picture."""
    return {name: tensor.chunk(count)[index] for name, tensor in pictures.items()}


def mixed(family, site, over, language_alone):
    model = FAMILIES[family][0]()
    found = blocks(model)
    carrying = [path for path in found if not language_alone or "language_model" in path]
    gate = MoLE(over=over)
    mixture = mix(model, experts_on(model, carrying), gate=gate, site=site, blocks=found)
    randomise(mixture, size=1.0)
    return model, mixture


def generated(model, mixture, rows, pictures, *, cached=True):
    batch = collate_prompts(rows, 0)
    told = {"mm_token_type_ids": (batch["input_ids"] == IMAGE).long()}
    with bound(mixture)(batch):
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **pictures,
            **(told if "image_grid_thw" in pictures else {}), max_new_tokens=4, do_sample=False,
            use_cache=cached, pad_token_id=0, eos_token_id=2, suppress_tokens=[35, 36, 37, IMAGE],
        )  # fmt: skip
    return ids[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_has_blocks_of_its_own_width(family):
    found = blocks(FAMILIES[family][0]())
    widths = {("language_model" in path): width for path, width in found.items()}
    assert widths == {True: 16, False: 12 if family == "llava" else 24}
    assert len(found) == 4


@pytest.mark.parametrize(("site", "over", "language_alone"), CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached_and_a_batch_its_rows(family, site, over, language_alone):
    model, mixture = mixed(family, site, over, language_alone)
    rows = [row([*text(i, 2 + i), *[IMAGE] * 4, *text(9 + i, 3)]) for i in range(2)]
    pictures = FAMILIES[family][1](2)
    together = generated(model, mixture, rows, pictures)
    assert torch.equal(together, generated(model, mixture, rows, pictures, cached=False))
    for index, single in enumerate(rows):
        alone = generated(model, mixture, [single], split(pictures, index, 2))[0]
        assert torch.equal(together[index][: len(alone)], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gates_see_the_picture(family):
    model, mixture = mixed(family, "block", "row", language_alone=True)
    rows = [row([*text(1, 3), *[IMAGE] * 4, *text(2, 3)])]
    scores = []
    for scale in (1.0, -1.0):
        pictures = FAMILIES[family][1](1)
        pictures["pixel_values"] *= scale
        with mixture.record() as records:
            generated(model, mixture, rows, pictures)
        scores.append(records[0].output.logits)
    assert not torch.allclose(*scores, rtol=1e-2)


def test_a_tower_whose_rows_are_patches_cannot_speak_for_the_network():
    model, mixture = mixed("qwen2_vl", "network", "row", language_alone=False)
    rows = [row([*text(1, 3), *[IMAGE] * 4, *text(2, 3)]) for _ in range(2)]
    with pytest.raises(ValueError, match="are for 32 rows; the model runs 2"):
        generated(model, mixture, rows, pictures_of_qwen(2))

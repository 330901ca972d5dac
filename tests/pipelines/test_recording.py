"""What a heat map is drawn from, against weights read off the handle."""

import torch

from pipelines import Switch
from tests.pipelines.toys import TEXT, draw, mixed, sd1


def test_weights_by_site_call_and_expert():
    pipe = mixed(parts=TEXT)
    with pipe.mixtures["unet"].record() as records, pipe.record() as weights:
        draw(pipe, ["a", "b"], (1, 2), negative_prompt=["c", "d"])
    found = weights["unet"]
    sites = tuple(pipe.mixtures["unet"].sites)
    assert set(found.sites) == set(sites)
    assert found.experts == ("ann", "bob")
    assert found.weights.shape == (len(sites), 3, 2)
    for row, site in enumerate(found.sites):
        said = [record.output.weights.mean(0) for record in records if record.site == site]
        torch.testing.assert_close(found.weights[row], torch.stack(said))
        torch.testing.assert_close(weights.mean("unet")[site], torch.stack(said).mean(0))
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(len(sites), 3))
    assert weights["text_encoder"].weights.shape == (2, 2, 2)
    assert tuple(weights) == TEXT
    assert len(weights) == 2


def test_strength_counts_and_given_weights_are_recorded_as_they_are():
    pipe = mixed()
    with pipe.record() as weights:
        draw(pipe, weights={"ann": 0.5, "bob": 2.0}, strength=[1.0, 0.5, 0.0])
    expected = torch.tensor([[0.5, 2.0], [0.25, 1.0], [0.0, 0.0]])
    for site in weights["unet"].weights:
        torch.testing.assert_close(site, expected)
    with pipe.record() as weights:
        draw(pipe, mixing=Switch(every=1))
    turns = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(weights["unet"].weights[0], turns)


def test_nothing_drawn_is_nothing_recorded():
    pipe = mixed()
    with pipe.record() as weights:
        pass
    assert weights["unet"].weights.shape == (0, 0, 2)
    with sd1().record() as weights:
        pass
    assert not weights

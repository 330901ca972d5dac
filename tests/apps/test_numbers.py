"""Heat maps and curves hold the numbers that they are drawn from."""

import re
from xml.etree import ElementTree

import pytest
import torch

from apps.curve import loss_curve, smoothed
from apps.heatmap import heat_maps, short_name
from pipelines import WeightMap

SITES = (
    "down_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.0.attentions.1.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
)


def test_sites_have_short_names():
    assert [short_name(site) for site in SITES] == ["down 1.0", "up 0.1", "mid"]
    assert short_name("text_model.encoder.layers.7") == "layer 7"
    assert short_name("up_blocks.1.attentions.0.transformer_blocks.3") == "up 1.0.3"


def test_a_heat_map_has_a_cell_for_each_weight_in_the_order_blocks_run():
    weights = torch.tensor([[[0.0, 0.5]], [[2.0, 1.0]], [[1.5, 0.25]]])
    drawn = heat_maps({"unet": WeightMap(SITES, ("<b>", "ink"), weights)})
    assert "<b>" not in drawn and "&lt;b&gt;" in drawn
    tree = ElementTree.fromstring(drawn)
    tips = [tip.text for tip in tree.iter("title")]
    assert tips == [
        "<b>, down 1.0, step 1: 0.00",
        "<b>, mid, step 1: 1.50",
        "<b>, up 0.1, step 1: 2.00",
        "ink, down 1.0, step 1: 0.50",
        "ink, mid, step 1: 0.25",
        "ink, up 0.1, step 1: 1.00",
    ]
    fills = {
        cell.find("title").text[-4:]: cell.get("fill")
        for cell in tree.iter("rect")
        if cell.find("title") is not None
    }
    assert fills["0.00"] == "rgb(240, 237, 250)" and fills["2.00"] == "rgb(76, 29, 149)"
    assert heat_maps({"unet": WeightMap((), ("a",), torch.zeros(0, 0, 1))}) == ""


def test_a_curve_goes_through_its_values():
    drawn = loss_curve({"text": [1.0, 0.5, 0.0], "picture": [0.25]}, steps=5)
    tree = ElementTree.fromstring(drawn)
    raw = {
        line.get("class"): [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        for line in tree.iter("polyline")
        if line.get("class").startswith("raw")
    }
    (x1, y1), (x2, y2), (x3, y3) = raw["raw term0"]
    assert y1 < y2 < y3 and y2 - y1 == pytest.approx(y3 - y2) and x2 - x1 == pytest.approx(x3 - x2)
    assert raw["raw term1"][0][1] == pytest.approx((y2 + y3) / 2, abs=0.1)
    assert re.findall(r">(text|picture)<", drawn) == ["text", "picture"]
    assert loss_curve({}, 5) == "" and "nan" not in loss_curve({"text": [1.0]}, 1)


def test_smoothing_starts_at_the_first_value_and_follows():
    assert smoothed([2.0]) == [2.0]
    soft = smoothed([1.0] * 3 + [0.0] * 20)
    assert soft[2] == pytest.approx(1.0) and 0 < soft[-1] < 0.02

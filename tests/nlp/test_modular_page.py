"""The page on modular language models: its snippets, one after the other, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch

from mole_vl import read_gates, read_peft, write_peft
from mole_vl.clusters import Clusters
from mole_vl.gates import Nearest
from nlp.adapter import blocks
from nlp.data import TextRow, read_rows, write_rows
from tests.nlp.families import experts_on
from tests.nlp.toys import tiny_folder, tiny_model

PAGE = Path(__file__).parents[2] / "docs/modular.md"
NAMES = ("french", "german", "past", "plural", "spanish")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A base, experts and rows in the places of the shipped ones."""
    model = tiny_model()
    for one in experts_on(model, blocks(model), NAMES):
        write_peft(one, tmp_path / "worlds/text/experts" / one.name)
        (tmp_path / "worlds/text/data").mkdir(exist_ok=True)
        rows = [TextRow(f"{one.name} of {word}:", word, one.name) for word in ("ox", "go", "tea")]
        write_rows(tmp_path / f"worlds/text/data/{one.name}_train.jsonl", rows)
    (tmp_path / "out").mkdir()
    tiny_folder(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_run_as_they_stand(world, capsys):
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == PAGE.read_text().count("```") / 2
    scope = {}
    for snippet in snippets:
        shown = snippet.replace("smollm2-135m-instruct", str(world / "base"))
        exec(compile(shown, str(PAGE), "exec"), scope)
    printed = capsys.readouterr().out
    found = Clusters.load(world / "out/mbc_4.json")
    for group in found.groups:
        assert f"{' '.join(group)}\n" in printed
        assert {row.task for row in read_rows(world / f"out/{'+'.join(group)}.jsonl")} == set(group)
    assert (world / "out/mbc_4.svg").read_text().startswith("<svg")
    kept = read_peft(world / "out/ties").layers
    for path, own in scope["voted"].expert.layers.items():
        torch.testing.assert_close(kept[path].delta(), own.delta())
    assert read_gates(world / "out/nearest.safetensors").spec == Nearest(top_k=1)

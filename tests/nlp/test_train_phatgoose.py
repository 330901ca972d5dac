"""The program train_phatgoose on a tiny language model, the whole way."""

import pytest
import torch

from mole_vl import mix_from, read_gates, read_peft, write_peft
from mole_vl.gates import Phatgoose, Usefulness
from mole_vl.training import FitConfig
from nlp.adapter import blocks
from nlp.data import write_rows
from nlp.models import load_base
from nlp.train_phatgoose import PhatgooseConfig, Taught, main
from tests.nlp.families import experts_on
from tests.nlp.toys import ROWS, tiny_folder, tiny_model

NAMES = ("past", "plural", "french")


@pytest.fixture
def config(tmp_path):
    tiny_folder(tmp_path / "base")
    model = tiny_model()
    for one in experts_on(model, blocks(model), NAMES):
        write_peft(one, tmp_path / one.name)
        write_rows(tmp_path / f"{one.name}.jsonl", [r for r in ROWS if r.task == one.name])
    return PhatgooseConfig(
        experts=tuple(Taught(folder=tmp_path / n, data=tmp_path / f"{n}.jsonl") for n in NAMES),
        fit=FitConfig(output=tmp_path / "out", steps=3, rows=2, lr=0.1, progress=False),
        base=str(tmp_path / "base"),
        gate=Phatgoose(top_k=1),
    )


def test_each_gate_is_trained_alone_and_all_are_joined(tmp_path, config, capsys):
    main(config)
    assert "gates of past, plural, french in" in capsys.readouterr().out
    file = tmp_path / "out/gates/model.safetensors"
    assert read_gates(file).spec == Phatgoose(top_k=1)
    model, _ = load_base(config.base)
    experts = [read_peft(tmp_path / name) for name in NAMES]
    mixture = mix_from(model, experts, file)
    joined = {site: mixture.gate(site).prototypes.clone() for site in mixture.sites}
    mixture.unmix()
    for place, expert in enumerate(experts):
        alone = mix_from(model, [expert], tmp_path / f"out/alone/{expert.name}.safetensors")
        assert alone.spec == Usefulness()
        for site in alone.sites:
            direction = alone.gate(site).direction[0]
            assert direction.any()
            torch.testing.assert_close(joined[site][place], direction.detach(), rtol=0, atol=0)
        alone.unmix()


def test_what_stands_is_not_trained_again(tmp_path, config):
    main(config)
    file = tmp_path / "out/gates/model.safetensors"
    first = file.read_bytes()
    (tmp_path / "out/alone/plural.safetensors").unlink()
    kept = (tmp_path / "out/alone/past.safetensors").stat().st_mtime_ns
    main(config)
    assert file.read_bytes() == first
    assert (tmp_path / "out/alone/past.safetensors").stat().st_mtime_ns == kept


def test_faults_come_before_the_first_step(tmp_path, config):
    (tmp_path / "french.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="line 1: no 'answer'"):
        main(config)
    (tmp_path / "french.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="data of french"):
        main(config)
    assert not (tmp_path / "out").exists()

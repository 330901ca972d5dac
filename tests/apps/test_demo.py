"""The program: its command line, and what it opens with."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apps.demo import demo
from apps.preset import read_preset
from apps.studio import load_pipeline
from mole_vl.gates import Free, MoLE, Sigmoid
from tests.dreambooth.toys import write_base

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "configs/emoji_subject_style.yaml"


def test_a_mistake_is_one_message():
    command = [sys.executable, "-m", "apps.demo", "--base", "worlds/emoji"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: worlds/emoji has no model_index.json: expected a Stable Diff" in done.stderr


def test_settings_are_checked_together():
    with pytest.raises(ValueError, match=r"port is 0, expected 1 to 65535; upload is 0, expected"):
        demo(port=0, upload=0)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen at 127.0.0.1, port {port} .*in use"):
            demo(base="nowhere", port=port)
    with pytest.raises(ValueError, match=r"cannot listen at 203\.0\.113\.1, port"):
        demo(base="nowhere", host="203.0.113.1", port=port)


def test_the_preset_is_read_as_train_gates_reads_it(tmp_path):
    preset = read_preset(PRESET)
    assert preset.gate == MoLE(score=Free(), normaliser=Sigmoid()) and preset.site == "block"
    assert (preset.fit.steps, preset.domain.loss.through, preset.domain.steps) == (60, 6, 20)
    (tmp_path / "other.yaml").write_text(PRESET.read_text() + "colour: red\n")
    with pytest.raises(ValueError, match=r"preset .*other.yaml: .*colour"):
        read_preset(tmp_path / "other.yaml")
    with pytest.raises(FileNotFoundError, match=r"preset: .*expected a configuration of train_gat"):
        read_preset(tmp_path / "none.yaml")


def test_a_base_of_another_kind_is_refused(tmp_path):
    folder = Path(write_base(tmp_path / "base"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(ValueError, match=r"is a FluxPipeline, expected one of StableDiffusionPip"):
        load_pipeline(str(folder))

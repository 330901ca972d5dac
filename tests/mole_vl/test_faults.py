"""What a program's user sees of its checks."""

import json

import pytest
from torch import nn

from mole_vl.faults import as_messages, refuse
from mole_vl.training import FitConfig, fit
from tests.mole_vl.toy_task import ToyTask


def refusing(*_args):
    refuse("Config", ["rank is 0, expected at least 1"])


def test_a_refusal_is_a_message_and_the_code_2(capsys):
    with pytest.raises(SystemExit) as ended, as_messages():
        refusing()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: Config: rank is 0, expected at least 1\n"


def test_one_process_of_many_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), as_messages():
        refusing()
    assert capsys.readouterr().err == ""


class Computing(nn.Module):
    def forward(self):
        refusing()


@pytest.mark.parametrize(
    "fail",
    [
        lambda: json.loads("{"),  # another library's ValueError
        lambda: open("nowhere"),  # noqa: PTH123, SIM115
        Computing(),
    ],
)
def test_all_else_keeps_its_traceback(fail):
    with pytest.raises((ValueError, FileNotFoundError)), as_messages():
        fail()


def test_a_running_training_keeps_its_traceback_and_its_settings_are_checked(tmp_path, capsys):
    run = FitConfig(output=tmp_path, steps=1, rows=2, schedule="constant", progress=False)
    task = ToyTask()
    task.losses = refusing
    with pytest.raises(ValueError, match="rank is 0"), as_messages():
        fit(task, run)
    fit(ToyTask(), run, {"gate": "one"})
    with pytest.raises(SystemExit), as_messages():
        fit(ToyTask(), run, {"gate": "two"})
    assert "made with other settings (gate was 'one', is 'two')" in capsys.readouterr().err

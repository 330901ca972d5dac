"""What a program's user sees of its checks."""

import json
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from mole_vl.faults import as_messages, at_least, positive, refuse, share, told
from mole_vl.training import FitConfig, Term, fit
from tests.mole_vl.toy_task import ToyTask


def refusing(*_args):
    refuse("Config", ["rank is 0, expected at least 1"])


def test_a_refusal_is_a_message_and_the_code_2(capsys):
    with pytest.raises(SystemExit) as ended, as_messages():
        refusing()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: Config: rank is 0, expected at least 1\n"


def test_a_refusal_under_no_grad_is_a_message_too(capsys):
    with pytest.raises(SystemExit), as_messages():
        torch.no_grad()(refusing)()
    assert capsys.readouterr().err.startswith("error: Config: rank is 0")


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


def test_a_training_without_a_finite_loss_is_a_message_too(tmp_path, capsys):
    run = FitConfig(output=tmp_path, steps=1, rows=2, progress=False)
    task = ToyTask()
    task.losses = lambda batch: {"fit": Term(torch.tensor(float("nan")))}
    with pytest.raises(SystemExit), as_messages():
        fit(task, run)
    assert capsys.readouterr().err.startswith("error: fit: the term 'fit' is nan at step 0; ")


@given(st.floats(), st.floats(-10, 10))
def test_numbers_without_an_end_are_in_no_range(value, low):
    finite = math.isfinite(value)
    assert (at_least("x", value, low) is None) == (finite and value >= low)
    assert (positive("x", value) is None) == (finite and value > 0)
    assert (share("x", value) is None) == (finite and 0 <= value < 1)


@given(st.lists(st.text(), max_size=12), st.integers(1, 12))
def test_of_many_faults_the_first_are_told_and_all_are_counted(faults, count):
    found = told(faults, count)
    assert found[: min(count, len(faults))] == faults[:count]
    rest = found[count:]
    assert rest == ([f"and {len(faults) - count} more"] if len(faults) > count else [])

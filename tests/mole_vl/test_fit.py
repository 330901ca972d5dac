"""The loop: same steps unbroken and resumed, in one piece and four, in one process and two."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from torch import nn

from mole_vl.training import FitConfig, Stop, Term, config as settings_of_fit, fit, read_snapshot
from mole_vl.training.optimizers import make_optimizers
from tests.mole_vl.toy_task import ToyTask

ROOT = Path(__file__).parents[2]


def config(output, **changes):
    settings = {
        "steps": 12,
        "rows": 8,
        "lr": 0.02,
        "save_every": 5,
        "log_every": 1,
        "progress": False,
    }
    return FitConfig(output=output, **{**settings, **changes})


def trained(output, **changes):
    task = ToyTask()
    fit(task, config(output, **changes))
    return {name: p.detach().clone() for name, p in task.parameters().items()}


def assert_same(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **tolerance)


def test_training_lowers_the_loss_and_logs_each_term(tmp_path):
    fit(ToyTask(balance=0.0), config(tmp_path, steps=60, schedule="constant"))
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 61))
    assert log[0].keys() == {"step", "lr", "fit"}
    assert sum(x["fit"] for x in log[-10:]) < 0.5 * sum(x["fit"] for x in log[:10])


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_pieces_of_a_batch_take_the_same_steps_as_the_whole(tmp_path, micro_rows):
    # Units differ from row to row, so a mean of the pieces' means would not do. The balance term
    # is defined on one pass's rows, so it is left out here.
    whole, pieces = ToyTask(balance=0.0), ToyTask(balance=0.0)
    fit(whole, config(tmp_path / "whole"))
    fit(pieces, config(tmp_path / "pieces", micro_rows=micro_rows))
    assert_same(dict(whole.parameters()), dict(pieces.parameters()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path, optimizer):
    unbroken = trained(tmp_path / "unbroken", ema=0.9, optimizer=optimizer)
    task = ToyTask(stop_at=8)
    with pytest.raises(KeyboardInterrupt):
        fit(task, config(tmp_path / "broken", ema=0.9, optimizer=optimizer))
    assert read_snapshot(tmp_path / "broken").step == 5
    resumed = trained(tmp_path / "broken", ema=0.9, optimizer=optimizer)
    assert_same(unbroken, resumed, atol=0, rtol=0)
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("unbroken", "broken")]
    assert logs[0] == logs[1]
    assert_same(resumed, trained(tmp_path / "broken", ema=0.9, optimizer=optimizer), atol=0, rtol=0)


def test_averages_of_eight_bits_are_kept_in_a_checkpoint(tmp_path):
    class Wide(ToyTask):
        """One matrix of 4096 numbers, the least that bitsandbytes keeps in 8 bits."""

        def __init__(self, stop_at=None):
            super().__init__(stop_at=stop_at)
            torch.manual_seed(2)
            self.weight = nn.Parameter(torch.randn(64, 64))

        def parameters(self):
            return {"weight": self.weight}

        def losses(self, batch):
            x = batch[0].reshape(-1, 3).repeat(1, 22)[:, :64]
            return {"fit": Term((x @ self.weight - x.roll(1, 1)).square().mean())}

    def weight(output, **changes):
        task = Wide()
        fit(task, config(output, optimizer="adamw8bit", **changes))
        return task.weight.detach().clone()

    unbroken = weight(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        fit(Wide(stop_at=7), config(tmp_path / "two", optimizer="adamw8bit"))
    state = read_snapshot(tmp_path / "two").optimizer["adamw8bit"]["state"][0]
    assert state["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8
    assert torch.equal(weight(tmp_path / "two"), unbroken)
    full = Wide()
    fit(full, config(tmp_path / "full"))
    # Rounded to 8 bits the averages lead almost where the whole ones do.
    start = Wide().weight
    assert 0 < (full.weight - unbroken).norm() < 0.1 * (full.weight - start).norm()


def test_eight_bits_without_bitsandbytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mole_vl.training.optimizers.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes: pip install 'mole-vl\["):
        config(tmp_path, optimizer="adamw8bit")


def test_a_watch_sees_every_step_and_a_stopped_run_goes_on_as_if_unbroken(tmp_path):
    unbroken = trained(tmp_path / "unbroken", ema=0.9)
    seen = []

    def watch(progress):
        seen.append(progress)
        torch.randn(3)  # Samples may be drawn meanwhile.
        if progress.step == 7:
            raise Stop

    result = fit(ToyTask(), config(tmp_path / "watched", ema=0.9), watch=watch)
    assert [(p.step, p.steps) for p in seen] == [(step, 12) for step in range(1, 8)]
    assert seen[-1].terms.keys() == {"fit", "balance"} and result.terms == seen[-1].terms
    assert result.step == read_snapshot(tmp_path / "watched").step == 7
    assert_same(unbroken, trained(tmp_path / "watched", ema=0.9), atol=0, rtol=0)
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("unbroken", "watched")]
    assert logs[0] == logs[1]


def test_a_fault_in_a_watch_is_raised_as_it_is(tmp_path):
    def watch(progress):
        raise ValueError("no such picture")

    with pytest.raises(ValueError, match="no such picture"):
        fit(ToyTask(), config(tmp_path), watch=watch)


def test_muon_steps_matrices_along_orthogonal_factors_and_adamw_the_rest(tmp_path):
    matrix, embedding, bias = (nn.Parameter(torch.randn(n)) for n in ((6, 4), (5, 4), (4,)))
    given = {"ff.weight": matrix, "token_embedding.weight": embedding, "ff.bias": bias}
    found = make_optimizers("muon", given, lr=0.1, weight_decay=0.0)
    owned = {rule: one.param_groups[0]["params"] for rule, one in found.items()}
    assert [p is matrix for p in owned["muon"]] == [True]
    assert {id(p) for p in owned["adamw"]} == {id(embedding), id(bias)}
    before = matrix.detach().clone()
    sum(p.square().sum() for p in given.values()).backward()
    for optimizer in found.values():
        optimizer.step()
    step = torch.linalg.svdvals(before - matrix.detach())
    # All directions move alike (Newton-Schulz leaves singular values within some 0.7 to 1.2).
    assert step.max() < 2 * step.min()
    # Scaled to AdamW's first step, whose elements are of size lr each (0.2 of its RMS, by Muon).
    assert 0.01 < (before - matrix).detach().square().mean().sqrt() < 0.1
    assert make_optimizers("adamw", given, lr=0.1, weight_decay=0.0).keys() == {"adamw"}


def launch(output, *, processes=1, steps=12, save_every=5, delay=0.0):
    """The toy task in a process of its own, or in two, which accelerate then finds itself in."""
    script = [
        str(ROOT / "tests/mole_vl/toy_task.py"),
        str(output),
        str(steps),
        str(save_every),
        str(delay),
    ]
    command = [sys.executable, *script]
    if processes > 1:
        count = ["--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, "-m", "torch.distributed.run", *count, *script]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    with Path(f"{output}.stderr").open("a") as errors:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors)


def finish(run, output):
    assert run.wait() == 0, Path(f"{output}.stderr").read_text()


def final(output):
    return load_file(sorted(output.glob("checkpoint-*"))[-1] / "weights.safetensors")


def test_kill_nine_at_random_moments_and_resume(tmp_path):
    finish(launch(tmp_path / "unbroken", steps=40, save_every=1), tmp_path / "unbroken")
    chance = random.Random(0)
    for _ in range(3):
        run = launch(tmp_path / "killed", steps=40, save_every=1, delay=0.02)
        log = tmp_path / "killed" / "metrics.jsonl"
        lines = log.read_text().count("\n") if log.exists() else 0
        while run.poll() is None and (not log.exists() or log.read_text().count("\n") <= lines):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        run.send_signal(signal.SIGKILL)
        run.wait()
    finish(launch(tmp_path / "killed", steps=40, save_every=1), tmp_path / "killed")
    assert_same(final(tmp_path / "unbroken"), final(tmp_path / "killed"), atol=0, rtol=0)
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {"checkpoint-00000040", "metrics.jsonl"}
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_two_processes_equal_one(tmp_path):
    finish(launch(tmp_path / "one"), tmp_path / "one")
    finish(launch(tmp_path / "two", processes=2), tmp_path / "two")
    assert [(tmp_path / f"{n}.processes").read_text() for n in ("one", "two")] == ["1", "2"]
    assert_same(final(tmp_path / "one"), final(tmp_path / "two"), atol=1e-6, rtol=1e-5)


def test_a_run_of_other_settings_is_not_continued(tmp_path):
    trained(tmp_path)
    with pytest.raises(
        ValueError, match=r"made with other settings \(lr was 0.02, is 0.1; seed was 0, is 3\)"
    ):
        trained(tmp_path, lr=0.1, seed=3)


def test_a_run_broken_off_before_its_first_checkpoint_logs_each_step_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(ToyTask(stop_at=4), config(tmp_path, save_every=100))
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "f')
    trained(tmp_path, save_every=100)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 13))


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path):
    class Rooted(ToyTask):
        def losses(self, batch):
            terms = dict(super().losses(batch))
            value = terms["fit"].value
            terms["root"] = Term((value - value.detach()).square().sqrt())
            return terms

    with pytest.raises(FloatingPointError, match="gradient is no finite number at step 0"):
        fit(Rooted(), config(tmp_path))
    assert read_snapshot(tmp_path) is None


def test_a_piece_without_units_counts_nothing(tmp_path):
    class Sparse(ToyTask):
        def batch(self, rows):
            x, context, scored = super().batch(rows)
            odd = torch.tensor([row.index % 2 == 1 for row in rows])
            return x, context, scored & ~odd[:, None]

    whole, pieces = Sparse(balance=0.0), Sparse(balance=0.0)
    fit(whole, config(tmp_path / "whole"))
    fit(pieces, config(tmp_path / "pieces", micro_rows=1))
    assert_same(dict(whole.parameters()), dict(pieces.parameters()), atol=1e-6, rtol=1e-5)


def test_trackers_take_any_settings(tmp_path):
    run = config(tmp_path, steps=2, trackers=("tensorboard",))
    fit(ToyTask(), run, {"gate": {"kind": "MoLE"}, "names": ["ann", "bob"]})
    assert list((tmp_path / "mole-vl").rglob("events.out*"))


def test_a_tracker_is_started_as_it_is_told(tmp_path):
    given = {"tensorboard": {"filename_suffix": ".mine"}}
    run = config(tmp_path, steps=1, trackers=("tensorboard",), project="shelf", tracking=given)
    fit(ToyTask(), run)
    assert list((tmp_path / "shelf").rglob("events.out*.mine"))


def test_a_tracker_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(settings_of_fit, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match=r"'wandb', whose package is not installed: pip install w"):
        config(tmp_path, trackers=("wandb",))
    with pytest.raises(ValueError, match=r"tracking is told of 'wandb', which is none of"):
        config(tmp_path, trackers=("tensorboard",), tracking={"wandb": {"name": "a"}})


def test_settings_beyond_the_loop_must_agree_too(tmp_path):
    fit(ToyTask(), config(tmp_path), {"rank": 4, "data": Path("a")})
    fit(ToyTask(), config(tmp_path), {"rank": 4, "data": Path("a")})
    with pytest.raises(ValueError, match=r"rank was 4, is 8"):
        fit(ToyTask(), config(tmp_path), {"rank": 8, "data": Path("a")})


def test_numbers_that_are_none_stop_the_run_and_keep_the_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="the term 'fit' is nan at step 7"):
        fit(ToyTask(balance=0.0, poison_at=7), config(tmp_path))
    assert read_snapshot(tmp_path).step == 5
    assert all(torch.isfinite(w).all() for w in read_snapshot(tmp_path).weights.values())


def test_one_run_at_a_time_in_one_folder(tmp_path):
    def again(_progress):
        with pytest.raises(ValueError, match=r"another run is at work in .*: wait for its end"):
            trained(tmp_path, seed=1)

    task = ToyTask()
    fit(task, config(tmp_path, steps=2), watch=again)
    assert_same(dict(task.parameters()), trained(tmp_path / "undisturbed", steps=2))
    assert not (tmp_path / ".lock").exists()
    fit(ToyTask(), config(tmp_path, steps=2))


def test_an_output_that_cannot_be_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/run"):
        with pytest.raises(ValueError, match=r"fit: .*/file is a file, expected a folder"):
            trained(tmp_path / place)
    with pytest.raises(ValueError, match=r"fit: /proc/run cannot be written: "):
        trained(Path("/proc/run"))


def test_all_faults_of_a_config_come_at_once(tmp_path):
    with pytest.raises(
        ValueError, match=r"steps is 0, expected at least 1; lr is -1, .*schedule is 'up'"
    ):
        FitConfig(output=tmp_path, steps=0, lr=-1, schedule="up")
    with pytest.raises(ValueError, match=r"steps is -1, expected at least 1$"):
        FitConfig(output=tmp_path, steps=-1)
    with pytest.raises(ValueError, match=r"trackers is 'paper', expected one of .*tensorboard"):
        FitConfig(output=tmp_path, steps=1, trackers=("tensorboard", "paper"))
    with pytest.raises(ValueError, match="8 rows do not divide into pieces of 3"):
        fit(ToyTask(), config(tmp_path, micro_rows=3))


@pytest.mark.parametrize("setting", ["lr", "weight_decay", "clip"])
def test_settings_without_an_end_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{setting} is inf, expected"):
        config(tmp_path, **{setting: float("inf")})


@pytest.mark.parametrize(
    "file", ["run.json", "weights.safetensors", "averages.safetensors", "optimizer.pt"]
)
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"oops" * 20])
def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path, file, content):
    trained(tmp_path, steps=2, schedule="constant")
    (damaged,) = tmp_path.glob("checkpoint-*")
    (damaged / file).unlink()
    if content is not None:
        (damaged / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{damaged.name} is damaged \(.*\): remove it, and"):
        trained(tmp_path, steps=3, schedule="constant")


def test_folders_and_logs_of_others_are_left_alone(tmp_path):
    mine = tmp_path / "checkpoint-mine"
    mine.mkdir()
    (tmp_path / "metrics.jsonl").write_bytes(b"3\n\xff\n")
    whole = trained(tmp_path / "whole")
    assert_same(trained(tmp_path), whole, rtol=0, atol=0)
    assert mine.is_dir()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1

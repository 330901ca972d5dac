"""The few-shot benchmark: what its tasks and cells are, and how its figures are paired."""

import importlib
from pathlib import Path

import pytest

from nlp.world.tasks import DEVELOPMENT, HELD_OUT


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def test_few_examples_are_the_first_of_many_and_none_is_asked(module):
    bench = module("fewshot_bench")
    few, many = (bench.lesson_of("plural", shots, 1) for shots in (16, 64))
    assert list(few.few) == list(many.few)[:16]
    assert few.asked == many.asked
    assert not set(many.few) & set(many.asked)
    assert list(bench.lesson_of("plural", 16, 2).few) != list(few.few)


def test_held_out_tasks_are_the_first_that_pass_and_no_task_of_development(module):
    admission = module("text_admission")
    held = admission.held_out()
    assert len(held) == admission.HELD
    order = [source.name for source in HELD_OUT]
    assert held == sorted(held, key=order.index)
    assert admission.NOT_HELD not in held
    assert not set(held) & {source.name for source in DEVELOPMENT}


def test_a_task_passes_by_what_the_same_prompts_give_the_base(module):
    admitted = module("text_admission").admitted
    base = {"plain": 0.1, "chat": 0.2, "shots": 0.6}
    assert not admitted({"base": base, "expert": 0.79})
    assert admitted({"base": base, "expert": 0.81})
    assert admitted({"base": base, "full": 0.51, "constants": 0.31})
    assert not admitted({"base": base, "full": 0.49, "constants": 0.31})
    assert not admitted({"base": base, "full": 0.51, "constants": 0.29})


def test_differences_are_paired_and_ways_that_learn_nothing_count_for_every_draw(module):
    few = module("fewshot")
    every = {*few.FIXED, *few.LEARNED}
    cells = few.cells("dev", few.SHOTS, False, every)
    assert len(set(cells)) == len(cells)
    some = {"base", few.GATES}
    assert few.cells("dev", few.SHOTS, False, some) == [c for c in cells if c[0] in some]
    hits = {
        cell: [0, 1, 1, 1] if cell[0] == few.GATES else [0, 0, 1, cell[3] % 2] for cell in cells
    }
    rows = few.summary({cell: {"hits": hits[cell], "told": [-1.0]} for cell in cells})
    found = {(row.measure, row.arm): row for row in rows}
    tasks = len({task for _, task, _, _ in cells})
    base = found["exact match, 16 examples", "base"]
    assert (base.n, base.mean) == (tasks * few.DRAWS, 0.25)
    # The base is asked once, as of draw 0; the best expert's draws are its own.
    gain = found["exact match, 64 examples", "gates - best expert"]
    assert gain.mean == pytest.approx(0.75 - (0.25 + 0.5 + 0.25) / 3)


def test_a_way_that_lacks_cells_of_a_size_is_in_none_of_its_tables(module):
    few = module("fewshot")
    cells = few.cells("dev", few.SHOTS, False, {*few.FIXED, *few.LEARNED})
    found = {cell: {"hits": [1, 0], "told": [-1.0]} for cell in cells}
    whole = few.summary(found)
    del found[next(cell for cell in cells if cell[0] == "PEFT's X-LoRA" and cell[2] == 64)]
    left = [
        row
        for row in whole
        if not ("64 examples" in row.measure and row.arm.endswith("PEFT's X-LoRA"))
    ]
    assert few.summary(found) == left
    assert any(row.arm.endswith("PEFT's X-LoRA") for row in left)

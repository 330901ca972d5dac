"""What a user types, and the form that it gets, against rows written down by hand."""

import json

import datasets
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from nlp.data import TextRow
from nlp.dataset import DatasetRows
from nlp.templates import Asked, Template, divided, read_asked

FORM = "Question: {question}\nAnswer: ||| {answer}"
TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
SETTINGS = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def source(folder, values, form):
    prompt, answer = divided(form)
    (folder / "rows.jsonl").write_text(json.dumps(values) + "\n")
    return DatasetRows(
        dataset=str(folder / "rows.jsonl"), prompt=prompt, answer=answer, task="quiz"
    )


@SETTINGS
@given(TEXT, TEXT)
def test_what_a_user_types_gets_the_form_of_the_rows(tmp_path, question, answer):
    rows = source(tmp_path, {"question": question, "answer": answer, "id": 3}, FORM)
    (asked,) = read_asked("data", rows)
    prompt = f"Question: {question.strip()}\nAnswer:"
    assert asked == Asked(question.strip(), TextRow(prompt, answer.strip(), "quiz"))
    assert Template(rows.prompt).prompt(asked.question) == prompt


@pytest.mark.parametrize(
    ("form", "question", "prompt"),
    [
        ("{a b} in {{{lang}}}: ||| {n}!", "x{y} in {de}:", "x{y} in {de}:"),
        ("{lang}, {lang}: ||| {n}!", "de", "de, de:"),
        ("No. {n:03d}. ||| {n}!", "007", "No. 007."),
        ("{of[0]} ||| {n}!", "s", "s"),
        ("{of[0]} {of[1]} ||| {n}!", "s t", "s t"),
    ],
)
def test_of_several_columns_a_user_types_the_whole_prompt(tmp_path, form, question, prompt):
    rows = source(tmp_path, {"a b": "x{y}", "lang": "de", "n": 7, "of": ["s", "t"]}, form)
    assert read_asked("data", rows) == [Asked(question, TextRow(prompt, "7!", "quiz"))]
    assert Template(rows.prompt).prompt(question) == prompt


@pytest.mark.parametrize(("text", "times"), [("{a} {b}", 0), ("{a} ||| {b} ||| {c}", 2)])
def test_a_text_is_divided_once(text, times):
    with pytest.raises(ValueError, match=rf"has {times} times '\|\|\|', expected once, between"):
        divided(text)

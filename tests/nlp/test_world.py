import csv
import re
from pathlib import Path

import pytest

from nlp.data import read_rows
from nlp.world.build import rows_of
from nlp.world.fewshot import FewConfig, drawn
from nlp.world.sources import Material, Source, common_words
from nlp.world.split import side_of
from nlp.world.tasks import DEVELOPMENT, FOUR, HELD_OUT, SHELF, third_person
from nlp.world.wordings import SIDES
from nlp.world.wordnet import WordNet

DATA = Path(__file__).parents[2] / "worlds" / "text" / "data"
EXPERTS = DATA.parent / "experts"
NOTHING = Material((), Path())
FILES = {
    "experts": [f"{source.name}_train" for source in FOUR],
    "gates": ["mixed_train"],
    "dev": ["mixed_dev"],
    "test": ["mixed_test"],
}


def lemma_of(row):
    """The word or number in a prompt, found through the wordings of its task."""
    for source in FOUR:
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
    for source in FOUR:
        wordings = [set(source.wordings[side]) for side in SIDES]
        assert len(set.union(*wordings)) == sum(map(len, wordings))
        assert all(wording.count("{}") == 1 for side in wordings for wording in side)


def test_the_mixed_files_hold_each_task_in_equal_parts_and_in_no_order():
    for side, least in (("gates", 150), ("dev", 60), ("test", 60)):
        tasks = [row.task for row in shipped(side)]
        counts = {tasks.count(source.name) for source in FOUR}
        assert len(counts) == 1
        assert counts.pop() >= least
        assert len(set(tasks[:20])) == len(FOUR)


def asked_in(row, sources):
    """What a row asks, of which task of `sources`: found through the wordings."""
    for source in sources:
        if source.name == row.task:
            for wording in {w for side in SIDES for w in source.wordings[side]}:
                # Two parts stand in either order.
                pattern = re.escape(wording.replace("{0}", "\0").replace("{1}", "\1"))
                pattern = pattern.replace(re.escape("{}"), "(?P<a>.+)")
                pattern = pattern.replace("\0", "(?P<a>.+)", 1).replace("\1", "(?P<b>.+)", 1)
                found = re.fullmatch(pattern, row.prompt, re.DOTALL)
                if found:
                    yield source, "|".join(part for _, part in sorted(found.groupdict().items()))


def side_fits(row, sources, side):
    """Whether one way to read a row's prompt has its lemma on that side."""
    ways = list(asked_in(row, sources))
    assert ways, row
    return any(side_of(source.lemma(asked, row.answer)) == side for source, asked in ways)


@pytest.mark.parametrize(
    ("pattern", "sources", "side"),
    [
        ("*_train.jsonl", SHELF, "experts"),
        ("shelf_train.jsonl", SHELF, "gates"),
        ("shelf_dev.jsonl", SHELF, "dev"),
        ("shelf_test.jsonl", SHELF, "test"),
        ("few/*_train.jsonl", HELD_OUT, "experts"),
        ("few/*_few.jsonl", (*DEVELOPMENT, *HELD_OUT), "gates"),
    ],
)
def test_every_row_of_the_shelf_and_of_the_held_out_tasks_is_on_its_side(pattern, sources, side):
    files = [f for f in DATA.glob(pattern) if not f.name.startswith(("mixed", "shelf"))]
    for file in files or [DATA / pattern]:
        rows = read_rows(file)
        assert len(set(rows)) == len(rows)
        assert all(side_fits(row, sources, side) for row in rows[::17])


def test_tasks_of_few_examples_are_asked_on_other_lemmas_than_their_examples():
    for source in (*DEVELOPMENT, *HELD_OUT):
        few, test = (read_rows(DATA / "few" / f"{source.name}_{k}.jsonl") for k in ("few", "test"))
        side = "dev" if source in DEVELOPMENT else "test"
        assert all(side_fits(row, [source], side) for row in test)
        assert not {row.prompt for row in few} & {row.prompt for row in test}


def test_the_shelf_has_an_expert_for_every_task_and_stays_small():
    folders = {folder.name for folder in EXPERTS.iterdir()}
    assert folders == {source.name for source in SHELF}
    weights = [folder / "adapter_model.safetensors" for folder in EXPERTS.iterdir()]
    assert sum(file.stat().st_size for file in weights) <= 30 * 2**20


def test_rows_show_every_lemma_once_before_any_again_and_then_in_another_wording():
    words = {str(n): f"answer {n}" for n in range(60)}
    wordings = {
        side: (f"{side} one {{}}", f"{side} two {{}}", f"{side} {{}} three") for side in SIDES
    }
    source = Source("toy", lambda _material: words, wordings)
    mine = [word for word in words if side_of(word) == "experts"]
    rows = rows_of(source, "experts", NOTHING, 10**6, seed=0)
    assert len(rows) == 3 * len(mine) == len({row.prompt for row in rows})
    for turn in range(3):
        answers = [row.answer for row in rows[turn * len(mine) : (turn + 1) * len(mine)]]
        assert sorted(answers) == sorted(words[word] for word in mine)
    assert rows_of(source, "experts", NOTHING, 7, seed=0) == rows[:7]
    assert rows_of(source, "experts", NOTHING, 7, seed=1) != rows[:7]


def test_the_split_takes_its_parts():
    sides = [side_of(str(n)) for n in range(20000)]
    for side, part in zip(SIDES, (0.60, 0.15, 0.08, 0.17), strict=True):
        assert sides.count(side) / len(sides) == pytest.approx(part, abs=0.02)


def test_sources_know_irregular_words_and_leave_doubtful_or_rare_ones_out():
    words = ["walk", "go", "dream", "child", "sheep", "mantle", "blorp", "blorped"]
    forms = ["walked", "walks", "went", "dreamed", "dreamt", "children", "blorps"]
    found = {source.name: source.answers(Material([*words, *forms], Path())) for source in FOUR}
    assert found["past"] == {"walk": "walked", "go": "went"}
    assert found["plural"] == {"walk": "walks", "child": "children"}
    assert found["french"]["71"] == "soixante et onze"
    assert found["german"]["342"] == "dreihundertzweiundvierzig"


def test_common_words_are_the_whole_lower_case_words_of_the_vocabulary_in_its_order():
    class Vocabulary:
        def get_vocab(self):
            return {"Ġwalk": 9, "Ġthe": 3, "walk": 1, "ĠWalk": 5, "Ġan": 2, "Ġca1": 7, "Ġfür": 8}

    assert common_words(Vocabulary()) == ["the", "walk"]


WORDNET = """  1 This line is of the licence.
00000010 05 n 01 creature 0 000 | a thing that lives
00000020 05 n 02 dog 0 Hound 1 001 @ 00000010 n 0000 | a pet; "it barks | it bites"
00000030 05 n 01 cat 0 002 @ 00000010 n 0000 ! 00000020 n 0101 | another
00000040 13 n 01 dog 1 000 | a sausage
"""
INDEX = """  1 This line too.
cat n 1 2 @ ! 1 0 00000030
creature n 1 0 1 0 00000010
dog n 2 1 @ 2 1 00000020 00000040
hound n 1 1 @ 1 0 00000020
"""


def test_wordnet_is_read_by_the_first_sense(tmp_path):
    (tmp_path / "data.noun").write_text(WORDNET)
    (tmp_path / "index.noun").write_text(INDEX)
    net = WordNet(tmp_path, "noun")
    assert list(net.words()) == ["cat", "creature", "dog", "hound"]
    assert net.field("dog") == "animal"
    assert (net.tagged("dog"), net.tagged("cat")) == (1, 0)
    assert (net.spelt("hound"), net.spelt("cat")) == ("Hound", "cat")
    assert net.kinds("dog") == [{"creature"}]
    assert net.kinds("creature") == []
    assert net.opposites("cat") == {"dog"}
    assert net.opposites("dog") == set()
    assert "mouse" not in net


def few(name):
    with (DATA.parent / f"fewshot/third_person_{name}.csv").open(newline="") as file:
        return [(row["verb"], row["form"]) for row in csv.DictReader(file)]


def test_the_few_examples_are_no_held_out_rows_and_no_verbs_of_an_expert():
    sides = {"train": "gates", "dev": "dev", "test": "test"}
    assert len(few("train")) == 16
    for name, side in sides.items():
        pairs = few(name)
        assert len(dict(pairs)) == len(pairs)
        assert all(side_of(verb) == side for verb, _ in pairs)
        assert dict(pairs) == third_person(
            Material([word for pair in pairs for word in pair], Path())
        )


def test_a_table_of_few_is_a_draw_from_its_side():
    forms = {f"verb{n}": f"verb{n}s" for n in range(200)}
    tables = drawn(forms, FewConfig(train=5, held_out=9))
    assert {name: len(pairs) for name, pairs in tables.items()} == {"train": 5, "dev": 9, "test": 9}
    for name, side in {"train": "gates", "dev": "dev", "test": "test"}.items():
        assert all(side_of(verb) == side and forms[verb] == form for verb, form in tables[name])
        assert [verb for verb, _ in tables[name]] != sorted(verb for verb, _ in tables[name])
    assert drawn(forms, FewConfig(train=5, held_out=9, seed=1)) != tables
    with pytest.raises(ValueError, match=r"train is 0, .*; held_out is 0"):
        FewConfig(train=0, held_out=0)

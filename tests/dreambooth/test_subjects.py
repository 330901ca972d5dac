"""Many folders at once, and the words that call what was learned in them."""

from dataclasses import replace
from pathlib import Path

import pytest
from jsonargparse import auto_cli

from dreambooth.candidates import CandidateConfig, CandidatesConfig, TextLora
from dreambooth.class_pictures import PriorConfig
from dreambooth.identifiers import notice, split_identifiers
from dreambooth.subjects import expand
from dreambooth.train_lora import main
from mole_vl import read_components
from tests.dreambooth.kinds import candidates
from tests.dreambooth.toys import tiny_tokenizer, write_picture


@pytest.fixture
def dataset(tmp_path):
    """google/dreambooth's layout: folders of .jpg, and the file of classes beside them."""
    for number, name in enumerate(("dog", "dog6", "wolf_plushie")):
        write_picture(tmp_path / "dataset" / name / "00.jpg", seed=number)
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(
        "Classes:\n\nsubject_name,class\ndog,dog\ndog6,dog\nwolf_plushie,stuffed animal\n\n"
        "Prompts:\n'a {0} {1} on the beach'.format(unique_token, class_token),\n"
    )
    return tmp_path / "dataset"


def template(data, **changes):
    settings = {
        "name": "{folder}",
        "data": data,
        "prompt": "a <{folder}> {class}",
        "prior": PriorConfig(prompt="a {class}", pictures=Path("class/{class}")),
        "samples": ("{class} in {folder}",),
    }
    return CandidateConfig(**{**settings, **changes})


def test_a_pattern_makes_one_candidate_of_each_folder(dataset):
    plain = template(dataset / "dog", name="mine", prompt="a v dog", prior=None, samples=())
    found = expand([template(dataset / "*", rank=3), plain])
    assert [one.name for one in found] == ["dog", "dog6", "wolf_plushie", "mine"]
    wolf = found[2]
    assert wolf.data == dataset / "wolf_plushie" and wolf.rank == 3
    assert wolf.prompt == "a <wolf_plushie> stuffed animal"
    assert wolf.prior.prompt == "a stuffed animal"
    assert wolf.prior.pictures == Path("class/stuffed animal")
    assert wolf.samples == ("stuffed animal in wolf_plushie",)
    assert found[3] == plain
    assert [one.name for one in expand([template(dataset / "dog[0-9]")])] == ["dog6"]


def test_a_pattern_may_be_relative(dataset, monkeypatch):
    monkeypatch.chdir(dataset.parent)
    found = expand([template(Path("dataset/dog*"))])
    assert [one.data for one in found] == [Path("dataset/dog"), Path("dataset/dog6")]


def test_what_is_not_there_is_named(dataset):
    with pytest.raises(FileNotFoundError, match=r"data of \{folder\}: .*cat\* matches no folder"):
        expand([template(dataset / "cat*")])
    write_picture(dataset / "mug" / "0.png")
    with pytest.raises(ValueError, match=r"classes.txt has no line for mug, expected mug,CLASS"):
        expand([template(dataset / "m*")])
    (dataset / "prompts_and_classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"says the \{class\} of dog: write it, with lines"):
        expand([template(dataset / "dog")])
    assert expand([template(dataset / "dog", prompt="a dog", prior=None, samples=())])


def test_every_folder_is_trained(dataset, tmp_path):
    settings = candidates(tmp_path, "sd1")
    one = template(dataset / "dog*", prompt="a v {class}", prior=None, samples=(), rank=2)
    main(replace(settings, candidates=(one,)))
    assert sorted(path.name for path in settings.output.iterdir()) == ["dog", "dog6"]
    both = [read_components(settings.output / name)["unet"].digest for name in ("dog", "dog6")]
    assert both[0] != both[1]
    twice = (one, replace(one, data=dataset / "dog6"))
    with pytest.raises(ValueError, match="two candidates are called dog6"):
        main(replace(settings, candidates=twice))


def test_identifiers_of_several_tokens_are_told_of(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    assert split_identifiers(tokenizer, ["a v dog"]) == {}
    found = split_identifiers(tokenizer, ["a <ab> v dog", "xy dog"], "a dog")
    assert found == {"<ab>": tokenizer_pieces(tokenizer, "<ab>"), "xy": ["x", "y"]}
    assert notice("dog", {}) is None
    main(candidates(tmp_path, "sd1", more={"dry_run": True}))
    assert "note" not in capsys.readouterr().out
    prior = PriorConfig(prompt="a dog", pictures=tmp_path / "class")
    main(candidates(tmp_path, "sd1", prior=prior, more={"dry_run": True}))
    assert "note: dog: the tokenizer reads red as 3 tokens (r e d). The" in capsys.readouterr().out


def tokenizer_pieces(tokenizer, word):
    return [piece.removesuffix("</w>") for piece in tokenizer.tokenize(word)]


def test_the_whole_of_it_is_a_yaml_file(dataset, tmp_path):
    (tmp_path / "loras.yaml").write_text(
        "base: org/base\noutput: out\nfit: {output: runs, steps: 2, optimizer: adamw8bit}\n"
        "also: [diffusers, kohya]\ndraw: {steps: 5}\ncheckpointing: true\n"
        "candidates:\n"
        f"  - name: '{{folder}}'\n    data: {dataset}/*\n    prompt: a <{{folder}}> {{class}}\n"
        "    text_encoder: {rank: 16, alpha: 17, targets: [q_proj, v_proj]}\n"
        "    prior: {prompt: 'a {class}', pictures: 'class/{class}', count: 5}\n"
        "    samples: ['a {class}']\n"
        "  - {name: bare, data: bare, text_encoder: true}\n"
    )
    arguments = ["--config", str(tmp_path / "loras.yaml"), "--dry_run", "true"]
    read = auto_cli(CandidatesConfig, as_positional=False, args=arguments)
    assert read.dry_run and read.checkpointing and read.also == ("diffusers", "kohya")
    assert read.draw.steps == 5 and read.fit.optimizer == "adamw8bit"
    first, bare = read.candidates
    assert first.text == TextLora(rank=16, alpha=17.0, targets=("q_proj", "v_proj"))
    assert first.prior == PriorConfig(prompt="a {class}", pictures=Path("class/{class}"), count=5)
    assert bare.text == TextLora() and bare.prior is None

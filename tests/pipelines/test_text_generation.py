"""Prompts in, answers out: the mixture of a language model as a pipeline."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mole_vl import Factors, mix, read_peft, save_gates, write_peft
from mole_vl.experts import Expert
from mole_vl.gates import Average, MoLE
from nlp.adapter import blocks, bound
from nlp.data import collate_prompts
from pipelines import MoLETextGeneration
from tests.nlp.families import experts_on, seq2seq
from tests.nlp.test_adapter import row
from tests.nlp.toys import tiny_folder, tiny_model, tiny_tokenizer
from tests.toys import randomise

NAMES = ("past", "plural", "french")
PROMPTS = ["Plural of cat:", "7 in French:", "Past tense of go:"]
PLACES = [("block", 0, "row"), ("matrix", 0, "position"), ("preview", 1, "row")]


@pytest.fixture
def folders(tmp_path):
    model = tiny_model()
    tiny_folder(tmp_path / "base")
    for one in experts_on(model, blocks(model), NAMES, size=1.0):
        write_peft(one, tmp_path / one.name)
    return tmp_path


def loaded(folders):
    pipe = MoLETextGeneration.from_pretrained(folders / "base")
    pipe.load_experts([folders / name for name in NAMES])
    return pipe


def trained(folders, site, after, over):
    """A gate file, as training leaves it."""
    model = tiny_model()
    experts = [read_peft(folders / name) for name in NAMES]
    mixture = mix(
        model, experts, gate=MoLE(over=over), site=site, after=after, blocks=blocks(model)
    )
    randomise(mixture, size=1.0)
    save_gates(mixture, folders / "gates/model.safetensors")
    return model, mixture


def by_hand(model, prompts, **settings):
    tokenizer = tiny_tokenizer()
    batch = collate_prompts([row(tokenizer(prompt)["input_ids"]) for prompt in prompts], 0)
    with bound(model.mixture)(batch):
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **settings
        )
    new = ids[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@pytest.mark.parametrize(("site", "after", "over"), PLACES)
def test_it_answers_as_the_mixed_model_does(folders, site, after, over):
    model, _ = trained(folders, site, after, over)
    pipe = loaded(folders)
    plain = pipe(PROMPTS, max_new_tokens=6, do_sample=False)
    pipe.load_gates(folders / "gates")
    for settings in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        call = {"max_new_tokens": 6, "do_sample": False, **settings}
        assert pipe(PROMPTS, **call) == by_hand(model, PROMPTS, **call)
    assert pipe(PROMPTS, max_new_tokens=6, do_sample=False) != plain
    assert pipe(PROMPTS[0], max_new_tokens=6, do_sample=False) == by_hand(
        model, PROMPTS[:1], max_new_tokens=6, do_sample=False
    )


def test_sampling_is_generates_own(folders):
    model, _ = trained(folders, "block", 0, "row")
    pipe = loaded(folders)
    pipe.load_gates(folders / "gates/model.safetensors")
    call = {
        "max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
        "num_return_sequences": 2,
    }  # fmt: skip
    torch.manual_seed(3)
    said = pipe(PROMPTS, **call)
    torch.manual_seed(3)
    assert said == by_hand(model, PROMPTS, **call)
    assert len(said) == 6


@pytest.mark.parametrize("beams", [1, 3])
def test_each_prompt_may_have_an_expert_of_its_own(folders, beams):
    pipe = loaded(folders)
    call = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    alone = [
        pipe(prompt, weights={name: 1.0}, **call)[0]
        for prompt, name in zip(PROMPTS, NAMES, strict=True)
    ]
    assert len(set(alone)) > 1
    assert pipe(PROMPTS, weights=NAMES, **call) == alone
    assert pipe(PROMPTS, weights=[{name: 1.0} for name in NAMES], **call) == alone
    assert pipe(PROMPTS, weights=torch.eye(3), **call) == alone


def test_masks_and_strength_are_the_mixtures(folders):
    pipe = loaded(folders)
    call = {"max_new_tokens": 6, "do_sample": False}
    base = [
        text.strip()
        for text in tiny_tokenizer().batch_decode(
            [
                tiny_model().generate(
                    torch.tensor([tiny_tokenizer()(prompt)["input_ids"]]), **call
                )[0, len(prompt) :]
                for prompt in PROMPTS
            ],
            skip_special_tokens=True,
        )
    ]
    assert pipe(PROMPTS, strength=0.0, **call) == base
    left = pipe(PROMPTS, masked=["past", "plural"], **call)
    assert left == pipe(PROMPTS, weights={"french": 1.0}, **call)


def test_weights_by_layer_are_recorded_and_exported(folders, tmp_path):
    trained(folders, "block", 0, "row")
    pipe = loaded(folders)
    pipe.load_gates(folders / "gates")
    with pipe.record() as told:
        pipe(PROMPTS, max_new_tokens=3, do_sample=False)
    assert told["model"].sites == ("model.layers.0", "model.layers.1")
    sums = told["model"].weights.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert pipe.export(tmp_path / "one", weights=told) < 1e-5
    means = told.mean("model")
    expected = pipe(PROMPTS, weights=means, max_new_tokens=6, do_sample=False)
    pipe.unload_experts()
    pipe.load_experts([tmp_path / "one"])
    assert pipe(PROMPTS, max_new_tokens=6, do_sample=False) == expected


@pytest.mark.parametrize(("site", "after", "over"), PLACES)
def test_one_folder_keeps_all(folders, tmp_path, site, after, over):
    trained(folders, site, after, over)
    pipe = loaded(folders)
    pipe.load_gates(folders / "gates")
    call = {"max_new_tokens": 6, "do_sample": False}
    expected = pipe(PROMPTS, **call)
    pipe.save_pretrained(tmp_path / "all")
    assert pipe(PROMPTS, **call) == expected
    again = MoLETextGeneration.from_pretrained(tmp_path / "all")
    assert again(PROMPTS, **call) == expected
    # transformers reads the base there, without experts.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    for name, value in tiny_model().state_dict().items():
        assert torch.equal(base.state_dict()[name], value)
    again.unload_experts()
    again.save_pretrained(tmp_path / "all")
    assert not (tmp_path / "all/mixture").exists()


def test_a_model_that_was_mixed_by_hand_is_kept_with_its_experts(folders, tmp_path):
    model, _ = trained(folders, "block", 0, "row")
    pipe = MoLETextGeneration(model, tiny_tokenizer())
    assert pipe.experts == NAMES
    call = {"max_new_tokens": 6, "do_sample": False}
    expected = pipe(PROMPTS, **call)
    with pytest.raises(RuntimeError, match="experts are loaded already"):
        pipe.load_experts([folders / "past"])
    pipe.load_gates(folders / "gates")
    assert pipe(PROMPTS, **call) == expected
    pipe.save_pretrained(tmp_path / "all")
    again = MoLETextGeneration.from_pretrained(tmp_path / "all")
    assert again.experts == NAMES
    assert again(PROMPTS, **call) == expected


def test_gates_that_do_not_fit_leave_it_as_it_was(folders):
    trained(folders, "block", 0, "row")
    pipe = MoLETextGeneration.from_pretrained(folders / "base")
    pipe.load_experts([folders / name for name in NAMES[:2]])
    call = {"max_new_tokens": 6, "do_sample": False}
    before = pipe(PROMPTS, **call)
    with pytest.raises(ValueError, match="missing: french"):
        pipe.load_gates(folders / "gates")
    with pytest.raises(FileNotFoundError, match="no such gate file"):
        pipe.load_gates(folders / "none.safetensors")
    assert pipe.mixture.spec == Average()
    assert pipe(PROMPTS, **call) == before


def test_what_cannot_be_is_one_sentence(folders):
    pipe = MoLETextGeneration.from_pretrained(folders / "base")
    with pytest.raises(RuntimeError, match=r"nothing to mix: call load_experts\(\) first"):
        pipe(PROMPTS)
    odd = Expert("odd", {"model.layers.0.self_attn.q_proj": Factors(
        torch.randn(1, 7), torch.randn(16, 1), 1.0
    )})  # fmt: skip
    with pytest.raises(ValueError, match="It was made for another base"):
        pipe.load_experts([odd])
    for experts in (str(folders / "past"), folders / "past", None):
        with pytest.raises(ValueError, match=r"experts is .*, expected a list of folders or exp"):
            pipe.load_experts(experts)
    (folders / "file").touch()
    with pytest.raises(ValueError, match=r"save_pretrained: .*file is a file, expected a folder"):
        pipe.save_pretrained(folders / "file")
    pipe.load_experts({"one": folders / "past", "two": folders / "plural"})
    assert pipe.experts == ("one", "two")
    with pytest.raises(RuntimeError, match="experts are loaded already"):
        pipe.load_experts([folders / "past"])
    for prompts in ([], "", " ", ["a", 3], None, 3, "\udc80"):
        with pytest.raises(ValueError, match=r"prompts: .*expected some text"):
            pipe(prompts)
    for weights, told in [
        (torch.eye(2), "weights are for 2 prompts, and there are 3"),
        (["past", "one", "two"], r"weights\[0\]: unknown expert 'past'"),
        (["one", "one", None], r"weights\[2\] is None, expected weights by expert's name"),
        ([{"one": 1}, "one", {"two": None}], "two weighs None, expected a number"),
        ("one", "weights is 'one', expected weights by expert's name, or a list with"),
        (3, "weights is 3, expected weights by expert's name, or a list with"),
        (torch.ones(1, 1, 2), r"shape \(1, 1, 2\), expected \(2,\) or \(3, 2\), for 3 prompts"),
    ]:
        with pytest.raises(ValueError, match=told):
            pipe(PROMPTS, weights=weights)
    for call, told in [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5, expected a whole number"),
        ({"input_ids": torch.ones(1, 1)}, "input_ids: the pipeline says this itself, leave it out"),
        ({"style": "x"}, "style is 'x', expected one of plain, chat"),
    ]:
        with pytest.raises(ValueError, match=told):
            pipe(PROMPTS, **call)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_named(folders):
    pipe = loaded(folders)
    long = "abc" * 40
    with pytest.raises(
        ValueError,
        match=r"longer than the 119 tokens that the base reads before 9 new ones "
        r"\(max_new_tokens\): row 1 \('abcabc.*'\) has 120 tokens; shorten these rows",
    ):
        pipe(["a", long], max_new_tokens=9)
    assert len(pipe(["a", long], max_new_tokens=8, do_sample=False)) == 2
    with pytest.raises(ValueError, match="max_new_tokens is 128, and the base reads 128 tokens in"):
        pipe(["a"], max_new_tokens=128)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"format": "mole-vl pipeline 1"}', "experts is None, expected their names"),
        ('{"format": "mole-vl pipeline 1", "experts": ["../past"]}', "a plain word without"),
    ],
)
def test_a_damaged_list_of_experts_is_named(folders, content, told):
    pipe = loaded(folders)
    pipe.save_pretrained(folders / "all")
    (folders / "all/mixture/index.json").write_text(content)
    with pytest.raises(ValueError, match=rf"index.json:? .*{told}"):
        MoLETextGeneration.from_pretrained(folders / "all")


@pytest.mark.parametrize("site", ["block", "network"])
def test_an_encoder_decoder_answers_too(site):
    model = seq2seq("t5")
    found = blocks(model)
    pipe = MoLETextGeneration(model, tiny_tokenizer())
    pipe.load_experts(experts_on(model, found), gate=MoLE(), site=site)
    randomise(pipe.mixture, size=1.0)
    call = {"max_new_tokens": 6, "do_sample": False}
    texts = ["abc", "defgh"]
    assert pipe(texts, **call) == [pipe(text, **call)[0] for text in texts]
    # Its labels are another sequence than its input: a plain forward goes through all the same.
    ids = torch.tensor([[5, 6, 7, 2]])
    assert model(input_ids=ids, labels=ids[:, :2]).loss.isfinite()

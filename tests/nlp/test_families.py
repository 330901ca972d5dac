"""Families of causal models: blocks are found by structure, every promise of a mixture holds."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from mole_vl import mix, read_peft, write_peft
from mole_vl.gates import Hidden, MoLE, Sum
from nlp.adapter import blocks, bound
from nlp.data import collate_prompts
from tests.nlp.families import CAUSAL, causal, experts_on
from tests.nlp.test_adapter import row, sample
from tests.toys import randomise

PLACES = [("block", "row"), ("matrix", "position"), ("network", "row")]


def mixed(family, site, over):
    model = causal(family)
    found = blocks(model)
    mixture = mix(
        model, experts_on(model, found), gate=MoLE(score=Hidden(), over=over), site=site,
        blocks=found,
    )  # fmt: skip
    randomise(mixture, size=1.0)
    return model, mixture


def generated(model, mixture, rows, *, cached=True):
    batch = collate_prompts(rows, 0)
    with bound(mixture)(batch):
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            max_new_tokens=5, do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
    return ids[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", CAUSAL)
def test_blocks_are_those_that_the_model_names(family):
    model = causal(family)
    assert list(blocks(model).values()) == [16, 16]


@pytest.mark.parametrize(("site", "over"), PLACES)
@pytest.mark.parametrize("family", CAUSAL)
def test_cached_equals_uncached_and_a_batch_its_rows(family, site, over):
    model, mixture = mixed(family, site, over)
    rows = [row(sample(i, 3 + 2 * i)) for i in range(3)]
    together = generated(model, mixture, rows)
    assert torch.equal(together, generated(model, mixture, rows, cached=False))
    for index, single in enumerate(rows):
        alone = generated(model, mixture, [single])[0]
        assert torch.equal(together[index][: len(alone)], alone)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_a_folded_sum_is_the_mixture_and_the_base_comes_back(family):
    model, mixture = mixed(family, "block", "row")
    ids = torch.tensor([sample(1, 6)])
    own = {name: value.clone() for name, value in mixture.base_state_dict().items()}
    with mixture.disabled():
        base = model(input_ids=ids).logits
    weights = {"ann": 0.5, "bob": -1.0}
    with mixture.pinned(weights):
        pinned = model(input_ids=ids).logits
    assert not torch.allclose(pinned, base, atol=1e-2)
    mixture.bake(weights)
    torch.testing.assert_close(model(input_ids=ids).logits, pinned, rtol=1e-3, atol=1e-3)
    mixture.unmix()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(input_ids=ids).logits, base, rtol=0, atol=0)


@pytest.mark.parametrize("family", CAUSAL)
def test_gates_learn_through_every_family(family):
    model, mixture = mixed(family, "block", "row")
    ids = torch.tensor([sample(1, 6), sample(2, 6)])
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in mixture.gates.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@torch.no_grad()
def test_a_lora_of_gpt2_is_read_as_peft_reads_it(tmp_path):
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], init_lora_weights=False,
        fan_in_fan_out=True,
    )  # fmt: skip
    torch.manual_seed(1)
    peer = get_peft_model(causal("gpt2"), config)
    peer.save_pretrained(tmp_path)
    ids = torch.tensor([sample(1, 6)])
    expected = peer.eval()(input_ids=ids).logits
    model = causal("gpt2")
    mixture = mix(model, [read_peft(tmp_path)], gate=Sum(), site="matrix")
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    mixture.bake()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    # And written by us, peft reads it.
    write_peft(read_peft(tmp_path), tmp_path / "ours")
    again = PeftModel.from_pretrained(mixture.unmix(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected)

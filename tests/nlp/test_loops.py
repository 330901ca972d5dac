"""Mixtures that learn in other people's loops."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mole_vl.mixlora import Form, MixLoRA
from nlp.adapter import blocks
from nlp.calls import TextCalls
from nlp.loops import with_losses
from tests.nlp.toys import tiny_model, tiny_tokenizer

METHOD = MixLoRA(experts=4, form=Form(rank=4, alpha=8), dropout=0.0, spread=1.0, balance=3.0, z=0.5)
ROW = {"input_ids": [5, 9, 2, 7, 1], "attention_mask": [1] * 5, "labels": [-100, -100, 2, 7, 1]}


def learner():
    model = tiny_model()
    mixture = METHOD.mix(model, blocks=blocks(model), calls=TextCalls())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in mixture.parameters_of_experts().items():
            if ".ups." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model, mixture


def collated(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in ROW}


class Unscaled(nn.Module):
    """A model that knows nothing of `num_items_in_batch`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def trained(tmp_path, rows, accumulation, *, wrap=False):
    model, mixture = learner()
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=1, learning_rate=0.1,
        gradient_accumulation_steps=accumulation, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = with_losses(Trainer, mixture, METHOD)(
        model=Unscaled(model) if wrap else model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=collated,
    )
    trainer.train()
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("wrap", [False, True], ids=["scaled by items", "scaled by the loop"])
def test_four_micro_batches_alike_give_the_gradient_of_one(tmp_path, wrap):
    one = trained(tmp_path, [ROW], 1, wrap=wrap)
    four = trained(tmp_path, [ROW] * 4, 4, wrap=wrap)
    model, _ = learner()
    moved = 0
    for name, parameter in one.items():
        torch.testing.assert_close(four[name], parameter, rtol=1e-4, atol=1e-6)
        moved += not torch.equal(parameter, model.get_parameter(name))
    assert moved == len(one)


def test_the_step_is_that_of_loss_and_terms(tmp_path):
    found = trained(tmp_path, [ROW], 1)
    model, mixture = learner()
    batch = collated([ROW])
    with mixture.record() as records:
        loss = model(**batch).loss
    terms = METHOD.losses(records, blocks(model)).values()
    (loss + sum(value * factor for value, factor in terms)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(found[name], parameter.detach() - 0.1 * parameter.grad)


def test_what_is_evaluated_is_the_plain_loss(tmp_path):
    model, mixture = learner()
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    kind = with_losses(Trainer, mixture, METHOD)
    trainer = kind(model=model, args=args, data_collator=collated)
    found = trainer.evaluate(Dataset.from_list([ROW]))["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(model(**collated([ROW])).loss.item(), rel=1e-5)


def test_trl_trains_a_mixture(tmp_path):
    model, mixture = learner()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, learning_rate=0.05,
        gradient_accumulation_steps=2, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, bf16=False, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    rows = [{"prompt": f"Plural of {word}: ", "completion": f"{word}s"} for word in ("cat", "dog")]
    trainer = with_losses(SFTTrainer, mixture, METHOD)(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows * 4),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != torch.equal(parameter, before[name]), name

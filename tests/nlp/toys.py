"""A tiny causal model, a tokenizer of characters, and rows, all made here."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from nlp.data import TextRow

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .:?'\"<>|_\n"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; `[end]` ends and pads."""
    vocabulary = {"[end]": 0, **{letter: i for i, letter in enumerate(LETTERS, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[end]", unk_token="?")
    fast.chat_template = TEMPLATE
    fast.pad_token = "[end]"
    fast.padding_side = "left"
    return fast


def tiny_model(layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def quantisable_folder(folder: Path) -> Path:
    """A model whose layers are as wide as a block of weights that share one scale."""
    config = LlamaConfig(
        vocab_size=80, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_folder(folder: Path) -> Path:
    """Model and tokenizer as a transformers folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


ROWS = [
    TextRow("Plural of cat:", "cats", "plural"),
    TextRow("Past tense of go:", "went", "past"),
    TextRow("7 in French:", "sept", "french"),
    TextRow("One ox, two", "oxen", "plural"),
]


def tiny_encoder(folder: Path, *, width: int = 16, seed: int = 0) -> Path:
    """An encoder and its tokenizer as a transformers folder."""
    config = BertConfig(
        vocab_size=len(LETTERS) + 1,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

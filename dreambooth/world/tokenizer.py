"""The world's own tokenizer: CLIP's class, with one token for each word that its captions use."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AddedToken, CLIPTokenizer

from dreambooth.world.captions import DOUBLE, IDENTIFIERS, SINGLE
from dreambooth.world.world import World

MAX_LENGTH = 24
_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_TEMPLATE_WORDS = ("a", "an", "the", "of", "with", "on", "white", "picture", "drawing", "emoji")


def make_tokenizer(world: World) -> CLIPTokenizer:
    """Names, class words and styles as whole words, `<v1>` to `<v24>` reserved.

    The end token has the highest id: open_clip finds the end of a text by the largest one.
    """
    words = _words(world)
    merges = _merges(words)
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + _WORD_END for letter in letters), *("".join(m) for m in merges)]
    tokens = dict.fromkeys([*pieces, ",", f",{_WORD_END}", *IDENTIFIERS, _START, _END])
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_LENGTH,
    )
    identifiers = [AddedToken(name, normalized=False, special=False) for name in IDENTIFIERS]
    tokenizer.add_tokens(identifiers)
    for word in words:
        if len(found := tokenizer.tokenize(word)) != 1:
            raise AssertionError(f"the word {word!r} is {found}, expected one token")
    return tokenizer


def _words(world: World) -> list[str]:
    templates = " ".join(text for text, _ in (*SINGLE, *DOUBLE))
    for field in ("thing", "kind", "style", "left", "right"):
        templates = templates.replace(f"{{{field}}}", " ")
    names = [word for s in world.subjects for word in (s.name, s.class_word)]
    texts = [*names, *(style.name for style in world.styles), templates, *_TEMPLATE_WORDS]
    return sorted({word for text in texts for word in text.replace(",", " ").split()} | {"style"})


def _merges(words: Iterable[str]) -> Any:
    """Merges that make each word one token, learned by BPE from a list of just these words."""
    trainer = BpeTrainer(
        vocab_size=100_000, min_frequency=1, end_of_word_suffix=_WORD_END, show_progress=False
    )
    learner = Tokenizer(BPE(end_of_word_suffix=_WORD_END))
    learner.train_from_iterator(words, trainer)
    ranked = learner.to_str()
    return [tuple(merge) for merge in json.loads(ranked)["model"]["merges"]]

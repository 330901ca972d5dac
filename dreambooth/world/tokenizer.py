"""The world's own tokenizer: CLIP's class, with one token for each word that its captions use."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
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
    merges = learned_merges(words)
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + _WORD_END for letter in letters), *("".join(m) for m in merges)]
    tokens = dict.fromkeys([*pieces, ",", f",{_WORD_END}", *IDENTIFIERS, _START, _END])
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,  # pyright: ignore[reportArgumentType]
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


def learned_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token: byte-pair encoding learned from a list of these words.

    The commonest pair first, of equals the first by the alphabet: the trainer of `tokenizers`
    draws among equals anew in each process, and a resumed training would read other ids.
    """
    pieces = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((left, right))
        pieces = [_merged(word, left, right) for word in pieces]
    return merges


def _merged(word: Sequence[str], left: str, right: str) -> list[str]:
    """The word's pieces with each `left, right` made one."""
    found: list[str] = []
    for piece in word:
        if found and found[-1] == left and piece == right:
            found[-1] = left + right
        else:
            found.append(piece)
    return found

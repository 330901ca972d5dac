"""Words that call a LoRA, as the base's tokenizer reads them."""

import re
from collections.abc import Iterable

from transformers import CLIPTokenizer

_BRACKETED = re.compile(r"<[^<>\s]+>")
_END = "</w>"


def split_identifiers(
    tokenizer: CLIPTokenizer, captions: Iterable[str], plain: str | None = None
) -> dict[str, list[str]]:
    """The identifiers that are more than one token, with their pieces.

    Args:
        tokenizer: The base's.
        captions: Where identifiers occur: words such as `<18>`.
        plain: The class's prompt; every word of a caption that it lacks is an identifier too.
    """
    words: dict[str, None] = {}
    for caption in dict.fromkeys(captions):
        words |= dict.fromkeys(_BRACKETED.findall(caption))
        if plain is not None:
            others = _BRACKETED.sub(" ", caption).split()
            words |= dict.fromkeys(word for word in others if word not in plain.split())
    pieces = {word: tokenizer.tokenize(word) for word in words}
    return {
        word: [piece.removesuffix(_END) for piece in found]
        for word, found in pieces.items()
        if len(found) > 1
    }


def notice(name: str, split: dict[str, list[str]]) -> str | None:
    """What to tell of a candidate's split identifiers, or None."""
    if not split:
        return None
    told = "; ".join(
        f"{word} as {len(pieces)} tokens ({' '.join(pieces)})" for word, pieces in split.items()
    )
    return (
        f"note: {name}: the tokenizer reads {told}. The pieces together call the LoRA, and other "
        "words that share them may stir it: a rare word of one token, such as sks, does not"
    )

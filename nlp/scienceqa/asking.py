"""A base with a trained mixture, asked."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import GenerationConfig

from mole_vl import Mixture
from mole_vl.faults import refuse
from mole_vl.mixture_folder import mix_saved
from mole_vl.sites import block_of
from nlp.adapter import blocks, bound
from nlp.around import alone
from nlp.calls import TextCalls
from nlp.data import EncodedRow, TextRow, Tokenizer, check_lengths, to_device
from nlp.forms import fault_of_room, form_of
from nlp.models import load_base
from nlp.scienceqa.config import CAUSAL
from nlp.scienceqa.numbers import Numbers, by_layer, numbers, words


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Args:
        model: The base, mixed or not.
        tokenizer: Its tokenizer.
        mixture: The handle of the mixed base; None for the base alone.
    """

    model: Any
    tokenizer: Tokenizer
    mixture: Mixture | None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], *, tokens: int, **how: Any) -> list[str]:
        """What is said to prompts, all in one batch, padded on the left.

        Args:
            prompts: One or several.
            tokens: The most that are said.
            how: Of transformers' `generate`: greedily, unless it says otherwise.

        Raises:
            ValueError: Prompts that leave no room for so many tokens.
        """
        form = form_of(self.model)
        rows = [
            EncodedRow(tuple(self.tokenizer(text)["input_ids"]), (), TextRow(text, "", ""))
            for text in prompts
        ]
        if form.longest is not None:
            room = form.room(tokens)
            refuse("max_new_tokens", [fault_of_room(form, tokens)])
            check_lengths(
                f"prompts longer than {room} tokens, which leave no room for the {tokens} of an "
                f"answer within the {form.longest} of the base",
                rows,
                [len(row.prompt) for row in rows],
                room,
            )
        pad = self.tokenizer.pad_token_id
        batch = to_device(form.prompts(rows, pad), self.model.device)
        around = alone if self.mixture is None else bound(self.mixture)
        with around(batch):
            ids = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=tokens,
                **{"do_sample": False, **how},
            )
        said = self.tokenizer.batch_decode(form.said(ids, batch), skip_special_tokens=True)
        return [text.strip() for text in said]


def load_asked(base: str, weights: Path | None, *, bits: bool = False) -> Asked:
    """A base with the mixture that a training wrote.

    Args:
        base: As for `nlp.models.load_base`.
        weights: The mixture's folder; None for the base alone.
        bits: Whether the base's linear layers take 8 bits.

    Raises:
        FileNotFoundError: No such base or mixture.
        ValueError: A base that is not causal; a mixture that does not fit it.
    """
    model, tokenizer = load_base(base, quantise="8bit" if bits else None, kind=CAUSAL)
    mixture = None
    if weights is not None:
        mixture = mix_saved(model, weights, blocks=blocks(model), calls=TextCalls())
    asked: Any = model.to(PartialState().device)  # pyright: ignore[reportArgumentType]
    # A base's own settings of sampling would be taken wherever a call says nothing of them.
    asked.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=_ends(model, tokenizer)
    )
    return Asked(asked.eval(), tokenizer, mixture)


def _ends(model: Any, tokenizer: Tokenizer) -> list[int]:
    own = model.generation_config.eos_token_id
    listed = [own] if isinstance(own, int) else list(own or ())
    return sorted({*listed, tokenizer.eos_token_id})


def check_mixture(
    mixture: Mixture,
    weights: Path,
    *,
    number_experts: Numbers | None,
    top_k: Numbers | None,
    lora_target_modules: tuple[str, ...] | str | None,
) -> None:
    """Raise ValueError if a mixture is another than these settings say; its files know them.

    Args:
        mixture: The mixture.
        weights: Its folder, for messages.
        number_experts: Experts by layer, or None.
        top_k: How many of them a token goes to, by layer, or None.
        lora_target_modules: Names of the layers that have experts, or None.
    """
    experts, chosen = _by_layer(mixture)
    faults: list[str | None] = []
    for name, given, found in (
        ("number_experts", number_experts, experts),
        ("top_k", top_k, chosen),
    ):
        if given is not None:
            told = by_layer(name, numbers(name, given), len(found))
            faults.append(_fault(name, _listed(told), _listed(found)))
    if lora_target_modules is not None:
        given = words("lora_target_modules", lora_target_modules)
        faults.append(_fault_of_targets(given, mixture.layers))
    refuse(f"the mixture in {weights}", faults)


def _listed(given: Sequence[int]) -> str:
    return ",".join(map(str, given))


def _fault(name: str, told: str, found: str) -> str | None:
    return (
        None if told == found else f"{name} is {found}, not {told}: leave it out, it is read there"
    )


def _fault_of_targets(given: Sequence[str], paths: Collection[str]) -> str | None:
    ends = tuple(f".{target}" for target in given)
    found = sorted({path.rpartition(".")[2] for path in paths})
    fits = all(path.endswith(ends) for path in paths) and all(
        any(path.endswith(end) for path in paths) for end in ends
    )
    return None if fits else _fault("lora_target_modules", ",".join(given), ",".join(found))


def _by_layer(mixture: Mixture) -> tuple[list[int], list[int]]:
    """Experts of each layer, and how many of them a token goes to."""
    layers = mixture.layout.blocks
    experts: dict[str | None, int] = {}
    chosen: dict[str | None, int] = {}
    for site in mixture.layout.sites:
        layer = block_of(site.name, layers)
        gate: Any = mixture.gate(site.name)
        experts[layer] = len(site.experts)
        chosen[layer] = getattr(getattr(gate, "choice", None), "k", len(site.experts))
    order: Mapping[str, int] = {layer: place for place, layer in enumerate(layers)}
    held = sorted((layer for layer in experts if layer is not None), key=order.__getitem__)
    return [experts[layer] for layer in held], [chosen[layer] for layer in held]

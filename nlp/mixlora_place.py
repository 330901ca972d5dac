"""Where the adapters of a file of m-LoRA's settings stand, and the base that they change."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from mole_vl import Mixture, mix, read_peft
from mole_vl.faults import at_least, refuse, some
from mole_vl.files import read_object
from mole_vl.gate_file import read_gates
from mole_vl.gates import Choice, Router, Sum, TopP
from mole_vl.mixlora import SHARED
from mole_vl.mixlora_folder import read_mixlora
from mole_vl.mixlora_header import KIND, read_header
from mole_vl.mixture_folder import GATES, mix_saved
from mole_vl.peft_folder import CONFIG
from nlp.adapter import blocks
from nlp.calls import TextCalls
from nlp.data import Tokenizer
from nlp.forms import Causal, form_of
from nlp.mixlora_adapter import AdapterSettings
from nlp.mixlora_config import MixLoRASettings
from nlp.models import Bits, load_base

Kind = Literal["mixture", "published", "lora"]
"""What an adapter's folder holds: a mixture of ours, one that MoE-PEFT published, an ordinary
LoRA."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The base, and where its adapters stand.

    Args:
        base: A Hub id, a folder, or smollm2-135m-instruct (by pip).
        folder: The adapters' folder.
        quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
        dtype: Precision of its weights.
        kind: What it must be, such as llama.
        tokenizer: Another tokenizer than its own.
        seed: Seed of everything random.
    """

    base: str
    folder: Path = Path()
    quantise: Bits | None = None
    dtype: torch.dtype = torch.float32
    kind: str | None = None
    tokenizer: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        refuse("adapters", [at_least("seed", self.seed, 0)])

    def load(self) -> tuple[PreTrainedModel, Tokenizer]:
        """The base, and its tokenizer.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is no causal model, or of another kind than it must be.
        """
        # The first to come may have a base to convert; the others find it done.
        with PartialState().main_process_first():
            model, tokenizer = load_base(
                self.base,
                dtype=self.dtype,
                quantise=self.quantise,
                kind=self.kind,
                tokenizer=self.tokenizer,
            )
        if not isinstance(form_of(model), Causal):
            raise ValueError(f"base is {self.base!r}, an encoder-decoder, expected a causal model")
        return model, tokenizer


def standing(entry: AdapterSettings, folder: Path, *, as_said: bool = True) -> Kind | None:
    """What an adapter's folder holds, or None where it does not stand.

    Args:
        entry: The adapter's settings.
        folder: Its folder.
        as_said: Whether what stands must be what the settings say.

    Raises:
        ValueError: It is damaged, or no adapter; another kind of adapter than its settings say, one
            of another number of experts, or one that chooses them otherwise.
    """
    if not folder.exists():
        return None
    kind, plain = _kind(folder), entry.strategy is None
    if not as_said:
        return kind
    if (kind == "lora") != plain:
        held, wanted = "a mixture", "an ordinary LoRA"
        raise ValueError(
            f"{folder} holds {wanted if kind == 'lora' else held}, and the settings of "
            f"{entry.name} are those of {wanted if plain else held}"
        )
    if not plain:
        experts, choice = experts_and_choice(folder, kind)
        method = entry.method
        refuse(
            str(folder),
            [
                f"it has {experts} experts, and num_experts is {method.experts}: the number of "
                "experts of a mixture cannot be changed once it is made; give its own, or take "
                "another name"
                if experts != method.experts
                else None,
                f"its tokens go by {choice}, and the settings say {method.choice}: give its own"
                if _plainly(choice) != _plainly(method.choice)
                else None,
            ],
        )
    return kind


def _kind(folder: Path) -> Kind:
    if (folder / GATES).is_file():
        return "mixture"
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} stands there and holds no adapter: take another name, or move it"
        )
    return "published" if read_object(folder / CONFIG).get("peft_type") == KIND else "lora"


def experts_and_choice(folder: Path, kind: Kind) -> tuple[int, Choice]:
    """How many experts a MixLoRA that stands has, and how its tokens choose among them.

    Raises:
        ValueError: It is damaged, or no MixLoRA.
    """
    if kind == "published":
        method, _ = read_header(folder)
        return method.experts, method.choice
    found = read_gates(folder / GATES)
    if not isinstance(found.spec, Router) or found.site != "feedforward":
        raise ValueError(
            f"{folder} holds a mixture by {type(found.spec).__name__} at site {found.site!r}, no "
            "MixLoRA"
        )
    return len(set(found.names) - {SHARED}), found.spec.choice


def _plainly(choice: Choice) -> Choice:
    """A choice without what the settings do not tell of it."""
    return replace(choice, renormalise=True) if isinstance(choice, TopP) else choice


def standing_all(settings: MixLoRASettings, place: Place) -> dict[str, Kind]:
    """What each adapter's folder holds, by the adapter's name.

    Raises:
        FileNotFoundError: Some do not stand.
        ValueError: As of `standing`.
    """
    kinds: dict[str, Kind] = {}
    missing = []
    for one in settings.lora:
        kind = standing(one, place.folder / one.name)
        if kind is None:
            missing.append(str(place.folder / one.name))
        else:
            kinds[one.name] = kind
    if missing:
        raise FileNotFoundError(f"no adapter in {some(missing)}: train it first, or mend dir")
    return kinds


class Adapters:
    """Adapters that stand, over one base, of which one speaks at a time.

    Args:
        settings: The adapters.
        place: The base, and where they stand.

    Raises:
        FileNotFoundError: A base, or an adapter, that is not there.
        ValueError: They are damaged, or do not go together.
    """

    def __init__(self, settings: MixLoRASettings, place: Place) -> None:
        kinds = standing_all(settings, place)
        model, self.tokenizer = place.load()
        self.model = model.to(PartialState().device)  # pyright: ignore[reportArgumentType]
        self._mixtures: dict[str, Mixture] = {}
        for name, kind in kinds.items():
            mixture = _MIXED[kind](self.model, place.folder / name)
            mixture.unmix()
            self._mixtures[name] = mixture

    @contextmanager
    def speaking(self, name: str) -> Iterator[Mixture]:
        """A context in which an adapter changes the base."""
        mixture = self._mixtures[name]
        mixture.wire(self.model)
        try:
            yield mixture
        finally:
            mixture.unmix()


def _mix_published(model: PreTrainedModel, folder: Path) -> Mixture:
    found = read_mixlora(folder, model, blocks=blocks(model))
    return found.mix(model, blocks=blocks(model), calls=TextCalls())


def _mix_lora(model: PreTrainedModel, folder: Path) -> Mixture:
    return mix(model, [read_peft(folder)], gate=Sum(), site="matrix", calls=TextCalls())


def _mix_mixture(model: PreTrainedModel, folder: Path) -> Mixture:
    return mix_saved(model, folder, blocks=blocks(model), calls=TextCalls())


_MIXED: Mapping[Kind, Callable[[PreTrainedModel, Path], Mixture]] = {
    "mixture": _mix_mixture,
    "published": _mix_published,
    "lora": _mix_lora,
}

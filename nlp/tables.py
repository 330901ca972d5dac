"""Datasets by name: of a file, a folder or the Hub, through `datasets`."""

import csv
import glob
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from datasets.table import CastError
from pandas.errors import ParserWarning

from mole_vl.faults import refuse, told
from nlp.hub import first_line, is_hub_id

T = TypeVar("T")

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_NO_ROWS = "it holds no rows"
_OF_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")
_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves in a folder: of several splits, or of one dataset alone."""


def load_table(name: str, subset: str | None = None, split: str = "train") -> Dataset:
    """One split of a dataset.

    Args:
        name: A file (.csv, .tsv, .json, .jsonl, .parquet), a folder of such files, a folder that
            `save_to_disk` wrote, or a Hub id.
        subset: Name of one of a Hub dataset's configurations; a file has none.
        split: The split, or a slice of it, such as `train[:16]`; a file is the split `train`.

    Raises:
        OSError, ValueError, DatasetsError: What `loading` puts into a sentence.
    """
    table = _saved(Path(name), split) if _is_saved(Path(name)) else _load(name, subset, split)
    if not len(table):
        raise ValueError(_NO_ROWS)
    return table


def load_splits(name: str) -> dict[str, Dataset]:
    """All splits of a dataset, by name; those without rows are left out.

    Args:
        name: As for `load_table`.

    Raises:
        OSError, ValueError, DatasetsError: What `loading` puts into a sentence; no rows at all.
    """
    if _is_saved(Path(name)):
        found = load_from_disk(name)
        splits = found if isinstance(found, DatasetDict) else {"train": found}
    else:
        splits = _load(name, None, None)
    tables = {str(split): table for split, table in splits.items() if len(table)}
    if not tables:
        raise ValueError(_NO_ROWS)
    return tables


def rows_with(where: str, name: str, columns: Iterable[str]) -> list[dict[str, Any]]:
    """All rows of a dataset's split train, by column.

    Args:
        where: What messages call it.
        name: As for `load_table`.
        columns: Those that it must have.

    Raises:
        FileNotFoundError: There is no such dataset.
        ValueError: It cannot be read, or lacks a column.
    """
    with loading(where):
        table = load_table(name)
    check_columns(where, table, columns)
    with loading(where):
        return table.to_list()


def check_columns(where: str, table: Dataset, columns: Iterable[str]) -> None:
    """Raise ValueError for the columns that a dataset lacks."""
    found = table.column_names
    refuse(
        where,
        [
            f"no column {column!r} (found {', '.join(found)})"
            for column in columns
            if column not in found
        ],
    )


def each(
    where: str,
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    make: Callable[[Mapping[str, Any]], T],
) -> list[T]:
    """What is made of each row.

    Args:
        where: What messages call the rows.
        rows: Their numbers and values by column.
        make: Makes it, or raises ValueError.

    Raises:
        ValueError: The rows of which nothing could be made, by their numbers.
    """
    found, faults = [], []
    for number, values in rows:
        try:
            found.append(make(values))
        except ValueError as fault:
            faults.append(f"row {number}: {fault}")
    refuse(where, told(faults))
    return found


def _is_saved(path: Path) -> bool:
    return any((path / file).is_file() for file in _SAVED)


def _saved(path: Path, split: str) -> Dataset:
    splits = load_splits(str(path))
    if split not in splits:
        raise ValueError(f"it has no split {split!r} (found {', '.join(splits)})")
    return splits[split]


@contextmanager
def loading(where: str) -> Iterator[None]:
    """What datasets says of what it cannot find or read, in one sentence."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(f"{where}, was not loaded: {first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}, was not loaded: it is no UTF-8 text ({error.reason})"
        ) from error
    except (ValueError, DatasetsError, StopIteration) as error:
        raise ValueError(f"{where}, was not loaded: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """What one of datasets' errors comes down to."""
    cause = error.__cause__ or error
    if isinstance(cause, CastError):
        # Files with other columns than one another: which ones, its later lines say.
        return " ".join(str(cause).split())
    said = first_line(cause)
    return _NO_ROWS if any(words in said for words in _OF_NO_ROWS) else said


def _load(name: str, subset: str | None, split: str | None) -> Any:
    path = Path(name)
    builder = _BUILDERS.get(path.suffix)
    if builder and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        if subset is not None:
            raise ValueError(f"a file has no subset {subset!r}")
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        if builder == "json":
            _check_objects(path)
        # Patterns are looked for otherwise.
        files = glob.escape(str(path))
        how = _csv_settings([path]) if builder == "csv" else {}
        with warnings.catch_warnings():
            # A line of more cells than the header: pandas would only warn that it drops them.
            warnings.simplefilter("error", ParserWarning)
            return load_dataset(builder, data_files=files, split=split, **how)
    if not path.is_dir() and not is_hub_id(name):
        raise FileNotFoundError(
            f"it is no {', '.join(_BUILDERS)} file, no folder and no Hub id (ORG/NAME)"
        )
    files = [file for file in sorted(path.rglob("*")) if file.suffix in _BUILDERS]
    tables = all(file.suffix in _DELIMITERS for file in files)
    how = _csv_settings(files) if files and tables else {}
    return load_dataset(name, subset, split=split, **how)


def _check_objects(path: Path) -> None:
    """Raise ValueError unless a JSON file begins as objects do, or a list of them.

    On a lone null pyarrow ends the process.
    """
    with path.open(encoding="utf-8-sig") as file:
        begins = next((stripped[:2] for line in file if (stripped := line.strip())), "{")
    if begins[0] not in "[{" or (begins[0] == "[" and path.suffix == ".jsonl"):
        raise ValueError(f"it begins with {begins!r}, expected objects, such as {{...}}")


def _csv_settings(tables: Sequence[Path]) -> dict[str, Any]:
    """Tables of texts as they stand: 007 is no 7, and NA is no empty cell."""
    first, header = tables[0], _header(tables[0])
    odd = [table.name for table in tables if _header(table) != header]
    if odd:
        raise ValueError(f"{first.name} and {', '.join(odd)} have other columns than one another")
    delimiter = _DELIMITERS[first.suffix]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"two columns are called {', '.join(twice)}")
    if not header or not all(header):
        raise ValueError("the first line has an empty cell, expected the columns' names")
    return {
        "sep": delimiter,
        "features": Features({name: Value("string") for name in header}),
        "keep_default_na": False,
        "index_col": False,
        "encoding": "utf-8-sig",
    }


def _header(table: Path) -> list[str]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        return next(csv.reader(file, delimiter=_DELIMITERS[table.suffix]), [])

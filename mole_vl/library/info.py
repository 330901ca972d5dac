"""What is known of an expert without its weights: `expert.json`, the last file of its folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from typing import Any, TypedDict

from mole_vl.faults import instance_of, refuse
from mole_vl.files import parse_object
from mole_vl.library.names import word_fault
from mole_vl.library.seals import sha256, to_json
from mole_vl.peft_folder import read_peft_contents

FORMAT = "mole-vl expert 1"
INFO = "expert.json"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """Length and hash of a file of an expert's folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ExpertInfo:
    """What a library says of an expert.

    Args:
        name: Its name in the library now.
        version: SHA-256 of its `expert.json`, which holds the hashes of all its other files: the
            name of its folder, and of all that was ever computed from it.
        digest: `Expert.digest` of its factors, as gate files name them.
        task: What it was trained for.
        base: The base model's name.
        licence: The terms it comes under.
        training: How it was trained, any JSON object.
        created: When it was added, UTC.
        layers: How many layers it changes.
        ranks: The ranks of its layers, each once.
        files: Length and hash of the files in its folder, by name.
    """

    name: str
    version: str
    digest: str
    task: str | None
    base: str | None
    licence: str | None
    training: Mapping[str, Any] = field(hash=False)
    created: str
    layers: int
    ranks: tuple[int, ...]
    files: Mapping[str, StoredFile] = field(hash=False)

    @property
    def bytes(self) -> int:
        """Length of its files together."""
        return sum(file.bytes for file in self.files.values())

    def named(self, name: str) -> "ExpertInfo":
        """The same under another name."""
        return replace(self, name=name)


def now() -> str:
    """This moment, UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class About(TypedDict, total=False):
    """What may be said of an expert when it is added.

    Args:
        task: What it was trained for.
        training: How it was trained, any JSON object.
        licence: The terms it comes under.
    """

    task: str | None
    licence: str | None
    training: Mapping[str, Any] | None


def described(contents: Mapping[str, bytes], name: str, about: About) -> tuple[ExpertInfo, bytes]:
    """What to say of a PEFT folder's two files, which are read first; and its `expert.json`.

    Raises:
        ValueError: They are no expert's files, or what is said of them is nothing to write.
    """
    texts = {key: about.get(key) for key in ("task", "licence")}
    training = about.get("training") or {}
    refuse(
        "library",
        [
            word_fault("name", name),
            *(
                f"{key} is unknown, expected {', '.join(About.__annotations__)}"
                for key in about
                if key not in About.__annotations__
            ),
            *(_no_text(key, text) for key, text in texts.items()),
            instance_of("training", training, Mapping),
        ],
    )
    expert = read_peft_contents(contents, name, f"expert {name}")
    said = {
        "format": FORMAT,
        "name": name,
        "digest": expert.digest,
        **texts,
        "base": expert.base,
        "training": dict(training),
        "created": now(),
        "layers": len(expert.layers),
        "ranks": sorted({factors.rank for factors in expert.layers.values()}),
        "files": {
            file: asdict(StoredFile(bytes=len(content), sha256=sha256(content)))
            for file, content in contents.items()
        },
    }
    written = to_json(said, f"expert {name!r}: training")
    return read_info(written, name, sha256(written), INFO), written


def _no_text(name: str, value: object) -> str | None:
    if not isinstance(value, str):
        return None if value is None else instance_of(name, value, str)
    whole = value.encode(errors="replace").decode() == value
    return None if whole else f"{name} is {value!r}, which holds half a character"


def read_info(content: bytes, name: str, version: str, where: str) -> ExpertInfo:
    """An `expert.json`, by the name and the version that the library points to it by.

    Raises:
        ValueError: It is not what was written.
    """
    found = sha256(content)
    if found != version:
        raise ValueError(f"{where} has SHA-256 {found}, expected {version}")
    said = parse_object(content, where)
    if said.pop("format", None) != FORMAT:
        raise ValueError(f"{where} is not of the format {FORMAT!r}: a newer mole-vl may read it")
    own = {**said, "name": name, "version": version, "ranks": tuple(said["ranks"])}
    own["files"] = {file: StoredFile(**stored) for file, stored in said["files"].items()}
    return ExpertInfo(**{entry.name: own[entry.name] for entry in fields(ExpertInfo)})

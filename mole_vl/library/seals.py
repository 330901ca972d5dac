"""Small JSON files that show when they were damaged."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mole_vl.files import parse_object

_SEAL = "seal"


def sha256(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def to_json(content: Any, what: str) -> bytes:
    """JSON of one form for one content.

    Raises:
        ValueError: The content is none that JSON can hold.
    """
    try:
        text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from error


def sealed(content: Mapping[str, Any]) -> bytes:
    """A JSON object with the SHA-256 of itself."""
    seal = sha256(to_json(content, "content"))
    return to_json({**content, _SEAL: seal}, "content")


def unsealed(content: bytes, where: str) -> dict[str, Any]:
    """What was sealed.

    Raises:
        ValueError: It is no JSON, or not what was sealed.
    """
    found = parse_object(content, where)
    seal = found.pop(_SEAL, None)
    own = sha256(to_json(found, where))
    # Nor may what JSON passes over have changed: then something wrote here that should not.
    if seal != own or content != to_json({**found, _SEAL: seal}, where):
        raise ValueError(f"{where} is damaged: its contents have SHA-256 {own}, its seal is {seal}")
    return found

"""What goes wrong with a library, by kinds that a program may want to tell apart."""


class MissingExpertError(KeyError):
    """There is no expert of this name: it never was, was removed, or has another name now."""

    def __str__(self) -> str:
        # A KeyError would show its message in quotes.
        return str(self.args[0])


class MissingScoreError(LookupError):
    """No expert has a score of this measure for this task."""


class NameTakenError(ValueError):
    """There is an expert of this name already."""


class DamagedExpertError(ValueError):
    """An expert, or what the library says of it, is not as it was written; the others still load.

    Args:
        message: What is wrong, where, and what to do.
        name: The expert's name.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class ContendedError(RuntimeError):
    """Others changed the same thing at every try; nothing of this change was made."""


class TakenError(Exception):
    """Another writer was quicker: look again, and decide anew. No caller of a library sees it."""

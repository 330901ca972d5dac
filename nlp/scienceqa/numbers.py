"""Settings that are one number for all layers, or a number for each, as MoLA's scripts have."""

from typing import TypeAlias

Numbers: TypeAlias = tuple[int, ...] | int | str
"""2,2,4,4 (a number for each layer), or 2 (one for all)."""


def numbers(name: str, given: Numbers) -> tuple[int, ...] | int:
    """The numbers that a setting says.

    Raises:
        ValueError: Other than whole numbers from 1 on, with commas between them.
    """
    parts = given.split(",") if isinstance(given, str) else ()
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(
            f"{name} is {given!r}, expected a whole number, or one for each layer of the model "
            "with commas between them, such as 2,2,4,4"
        )
    found = tuple(map(int, parts)) if isinstance(given, str) else given
    listed = (found,) if isinstance(found, int) else found
    if not listed or min(listed) < 1:
        raise ValueError(f"{name} is {given!r}, expected numbers from 1 on")
    return listed[0] if len(listed) == 1 and isinstance(given, str) else found


def by_layer(name: str, given: tuple[int, ...] | int, layers: int) -> tuple[int, ...]:
    """A number for each layer.

    Raises:
        ValueError: Numbers for another count of layers.
    """
    if isinstance(given, int):
        return (given,) * layers
    if len(given) != layers:
        raise ValueError(
            f"{name} has {len(given)} numbers, and the model has {layers} layers with "
            "lora_target_modules: give a number for each, or one for all"
        )
    return given


def words(name: str, given: tuple[str, ...] | str) -> tuple[str, ...]:
    """The words of a list with commas.

    Raises:
        ValueError: An empty word, or none.
    """
    found = tuple(one.strip() for one in given.split(",")) if isinstance(given, str) else given
    if not found or not all(found):
        raise ValueError(f"{name} is {given!r}, expected names with commas, such as q_proj,v_proj")
    return found

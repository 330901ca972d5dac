"""What is told to whoever started a run, once of all its processes."""

from accelerate import PartialState


def tell(text: str | None) -> None:
    """Print a notice; None is none."""
    if text is not None and PartialState().is_main_process:
        print(text)

"""Names on the Hub, and what its libraries say of those that they do not find."""


def is_hub_id(name: str) -> bool:
    """Whether a name may be a Hub id, ORG/NAME, and is no path by its looks."""
    return name.count("/") == 1 and not name.endswith("/") and not name.startswith((".", "/", "~"))


def first_line(error: BaseException) -> str:
    """What an error says, without the paragraphs that follow; its kind if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

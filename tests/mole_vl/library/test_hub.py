"""What is the Hub's alone: commits with parents, tokens, private repositories."""

import pytest

from mole_vl.library import ContendedError, ExpertLibrary, transaction
from tests.mole_vl.library.shelf import expert, same

URI = "hf://ann/shelf"


@pytest.fixture
def how(hub):
    return {"options": {"endpoint": hub.address}}


@pytest.fixture
def library(how):
    return ExpertLibrary.open(URI, create=True, **how)


def test_a_change_is_one_commit(hub, library):
    before = len(hub.repos["ann/shelf"])
    with library.batch("the shelf") as batch:
        for number in range(5):
            batch.add(expert(f"e{number}", number))
        batch.rename("e1", "first")
    assert len(hub.repos["ann/shelf"]) == before + 1
    library.auxiliary.put("embedding", {"e0": [1], "first": [2]})
    assert len(hub.repos["ann/shelf"]) == before + 2
    # Weights went the way of large files.
    assert len(hub.large) == 5


def test_overtaken_it_is_thought_out_anew(hub, library, how):
    other = ExpertLibrary.open(URI, **how)
    turns = iter(range(2))

    def overtake(_):
        turn = next(turns, None)
        if turn is not None:
            other.add(expert(f"other{turn}", turn))

    hub.before_commit = overtake
    library.add(expert("mine"))
    assert hub.refused > 0
    assert list(library) == ["mine", "other0", "other1"]
    readme = hub.files("ann/shelf")[1]["README.md"].decode()
    assert all(f"| {name} |" in readme for name in library)
    assert same(other["mine"].expert, expert("mine"))


def test_overtaken_for_ever_it_says_so(hub, library, monkeypatch):
    monkeypatch.setattr(transaction.time, "sleep", lambda _: None)

    def overtake(repo):
        last, files = hub.repos[repo][-1]
        hub.repos[repo].append((f"{int(last, 16) + 1:040x}", files))

    hub.before_commit = overtake
    with pytest.raises(ContendedError, match="nothing of 'add past' was done"):
        library.add(expert("past"))
    hub.before_commit = lambda _: None
    assert list(library) == []
    library.add(expert("past"))


def test_what_is_begun_is_private_unless_said(hub, library):
    assert hub.private["ann/shelf"] is True
    options = {"endpoint": hub.address, "private": False}
    ExpertLibrary.open("hf://ann/open", create=True, options=options)
    assert not hub.private["ann/open"]
    with pytest.raises(ValueError, match="options public are unknown, expected endpoint, private"):
        ExpertLibrary.open(URI, options={"public": True})


def test_the_token_opens_it(hub, library, how):
    hub.token = "right"
    assert list(ExpertLibrary.open(URI, "right", **how)) == []
    with pytest.raises(FileNotFoundError, match="check the address, and the token"):
        ExpertLibrary.open(URI, "wrong", **how)


def test_a_commit_reads_as_one_state(hub, library, how):
    library.add(expert("past"))
    stored = ExpertLibrary.open(URI, **how)["past"]
    library.remove("past")
    hub.repos["ann/shelf"][-1][1].pop(f"{stored.folder}/expert.json")
    assert same(stored.expert, expert("past"))

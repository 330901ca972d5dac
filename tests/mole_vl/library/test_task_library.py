"""A library of tasks lies wherever one of experts may, and never in one's place."""

import pytest

from mole_vl.library import ExpertLibrary
from nlp.data import TextRow
from nlp.task_library import TaskLibrary


def rows(task, count):
    return [TextRow(f"{task} {number}?", "é", task) for number in range(count)]


def test_tasks_come_back_from_every_store(place):
    with pytest.raises(FileNotFoundError, match="no library of tasks here"):
        TaskLibrary.open(place.uri, **place.how)
    library = TaskLibrary.open(place.uri, create=True, **place.how)
    assert library.add({"past": rows("past", 3), "wnli": rows("wnli", 1)}) == ["past", "wnli"]
    again = TaskLibrary.open(place.uri, create=True, **place.how)
    assert again.add({"past": rows("past", 3), "plural": rows("plural", 2)}) == ["plural"]
    assert again.tasks() == ["past", "plural", "wnli"]
    assert again.rows("past") == rows("past", 3)
    with pytest.raises(ValueError, match=r"other rows under tasks/wnli\.jsonl"):
        again.add({"wnli": rows("wnli", 2), "new": rows("new", 1)})
    assert again.tasks() == ["past", "plural", "wnli"]


def test_experts_are_not_put_among_tasks(place):
    TaskLibrary.open(place.uri, create=True, **place.how)
    with pytest.raises(ValueError, match=r"a library of tasks is here, .* take another address"):
        ExpertLibrary.open(place.uri, create=True, **place.how)
    with pytest.raises(FileNotFoundError, match="there is no library here"):
        place.open()

"""Writers at once: nothing that one of them was told is done is lost."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from mole_vl.library import MissingExpertError, NameTakenError
from tests.mole_vl.library.shelf import expert, same

WRITERS = 4


def at_once(place, work):
    """What each writer, with a library opened by itself, was answered."""

    def one(number):
        library = place.open()
        try:
            return work(library, number)
        except (NameTakenError, MissingExpertError) as error:
            return error

    with ThreadPoolExecutor(WRITERS) as threads:
        return list(threads.map(one, range(WRITERS)))


@pytest.fixture
def library(place):
    library = place.begin()
    library.add(expert("past"))
    return library


def test_all_names_survive(library, place):
    at_once(place, lambda own, number: own.add(expert(f"e{number}", number)))
    assert list(library) == ["e0", "e1", "e2", "e3", "past"]
    for number in range(WRITERS):
        assert same(library[f"e{number}"].expert, expert(f"e{number}", number))
    content = library._store.read(["README.md"], library._store.mark())["README.md"].decode()
    assert all(f"| {name} |" in content for name in library)


def test_of_one_name_one_writer_has_it(library, place):
    answers = at_once(place, lambda own, number: own.add(expert("new", number)))
    errors = [answer for answer in answers if isinstance(answer, NameTakenError)]
    (won,) = (number for number, answer in enumerate(answers) if answer not in errors)
    assert all("has an expert 'new' already" in str(error) for error in errors)
    assert len(errors) == WRITERS - 1
    assert same(library["new"].expert, expert("new", won))


def test_of_several_renames_one_is_made(library, place):
    answers = at_once(place, lambda own, number: own.rename("past", f"p{number}"))
    (won,) = (number for number, answer in enumerate(answers) if answer is None)
    assert list(library) == [f"p{won}"]
    told = {str(answer) for answer in answers if answer}
    assert all(f"it is called 'p{won}' since" in error for error in told)
    assert library.check().faults == ()


def test_of_several_replacements_none_is_lost(library, place):
    answers = at_once(place, lambda own, number: own.replace(expert("past", number + 1)))
    versions = [pointer.version for pointer in library.history("past")]
    assert set(versions[1:]) == {answer.version for answer in answers}
    assert len(versions) == WRITERS + 1
    assert library["past"].info.version == versions[-1]
    for version in versions:
        library.restore("past", version)
        assert library["past"].expert.digest


def test_of_several_scores_none_is_lost(library, place):
    at_once(place, lambda own, number: own.scores.put(f"task {number}", {"past": number}))
    for number in range(WRITERS):
        assert library.scores.get(f"task {number}") == {"past": number}

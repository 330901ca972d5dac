"""The text world's tasks: the four of the mixed stream, the shelf's others, the held-out ones."""

from dataclasses import replace

from nlp.world import frames, questions
from nlp.world.frames import plainly, told
from nlp.world.sources import Source, arithmetic, inflected, numbers, of_answer, uninflected
from nlp.world.wordings import PAST, PLURAL, number_wordings

_past = inflected("VERB", "VB", "VBD", unchanged=True)
_plural = inflected("NOUN", "NN", "NNS")
_gerund = inflected("VERB", "VB", "VBG")
third_person = inflected("VERB", "VB", "VBZ", unchanged=True)
"""go: goes."""
_comparative = inflected("ADJ", "JJ", "JJR", rare=True)


FOUR = (
    Source("past", _past, PAST),
    Source("plural", _plural, PLURAL),
    Source("french", numbers("fr"), number_wordings("French", "A Frenchman", "Paris", "France")),
    Source("german", numbers("de"), number_wordings("German", "A German", "Berlin", "Germany")),
)
"""The tasks of the mixed stream of `configs/text_mixed.yaml`."""

SHELF = (
    *FOUR,
    Source("gerund", _gerund, frames.GERUND),
    Source("comparative", _comparative, frames.COMPARATIVE),
    Source("lemma", uninflected(_past, _gerund), frames.LEMMA, of_answer),
    Source("spanish", numbers("es"), number_wordings("Spanish", "A Spaniard", "Madrid", "Spain")),
    Source("italian", numbers("it"), number_wordings("Italian", "An Italian", "Rome", "Italy")),
    Source("addition", arithmetic("+"), frames.ADDITION),
    Source("syllables", questions.syllables, frames.SYLLABLES),
    Source("category", questions.category("noun"), frames.CATEGORY),
    Source("isa", questions.is_a, frames.ISA, questions.first_word),
    Source("odd", questions.odd("noun"), frames.ODD, of_answer),
    Source("antonym", questions.antonym, frames.ANTONYM),
    Source("continent", questions.continent, frames.CONTINENT),
)
"""The tasks that experts were trained for, if they were admitted."""

HELD_OUT = (
    Source("third", third_person, told("third person singular")),
    Source("dutch", numbers("nl"), told("Dutch word")),
    Source("german_year", numbers("de", "year", 1100, 2100), told("year in German words")),
    Source("superlative", inflected("ADJ", "JJ", "JJS", rare=True), told("superlative")),
    Source("subtraction", arithmetic("-"), told("difference")),
    Source("phrasal_past", questions.phrasal_past, told("past tense"), questions.first_word),
    Source("singular", uninflected(_plural), told("singular"), of_answer),
    Source("french_ordinal", numbers("fr", "ordinal", 1), told("French ordinal")),
    Source("verb_category", questions.category("verb"), told("kind of verb")),
    Source("compound_plural", questions.compound_plural, told("plural"), questions.last_word),
    Source("portuguese", numbers("pt"), told("Portuguese word")),
    Source("odd_verb", questions.odd("verb"), told("word that does not belong"), of_answer),
    Source("participle", inflected("VERB", "VB", "VBN", unchanged=True), told("past participle")),
    Source("positive", uninflected(_comparative), told("plain form"), of_answer),
    Source(
        "rhyme",
        questions.rhyme,
        plainly(
            "Do {0} and {1} rhyme?",
            "{0}, {1}: a rhyme, yes or no?",
            "Is {0} a rhyme for {1}?",
            "Does {1} rhyme with {0}?",
        ),
        questions.first_word,
    ),
    Source("capital", questions.capital, told("capital")),
)
"""Candidates for held-out tasks, in the order in which the first that pass the check are taken."""

_DEVELOPMENT = {
    "plural": "plural",
    "gerund": "-ing form",
    "spanish": "Spanish word",
    "category": "category",
}
DEVELOPMENT = tuple(
    replace(source, wordings=told(_DEVELOPMENT[source.name]))
    for source in SHELF
    if source.name in _DEVELOPMENT
)
"""Tasks of the shelf asked as the held-out ones are; each one's own expert is left out then."""

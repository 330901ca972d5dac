"""How the four tasks are put into words.

Each side of the split words them in its own way: a mixture is trained on wordings that no expert
has seen, and tested on wordings that it has not seen either. `{}` stands for the word or number.
"""

from collections.abc import Mapping
from typing import Literal, get_args

Side = Literal["experts", "gates", "dev", "test"]
SIDES: tuple[Side, ...] = get_args(Side)

Wordings = Mapping[Side, tuple[str, ...]]

PAST: Wordings = {
    "experts": (
        "Past tense of {}:",
        "What is the past tense of {}?",
        "Simple past of the verb {}:",
        "Put {} into the past tense:",
        "The verb {} in the simple past is",
        "Every day they {}. Yesterday they",
        'Give the past form of "{}".',
        "{} -> past tense:",
        "Change the verb {} from the present to the past:",
        "Now we {}; long ago we",
    ),
    "gates": (
        "Write the past tense of {}.",
        "How do you say {} in the past?",
        "The past tense of the verb {} is",
        "Today they {}, and last year they",
        "Conjugate {} in the simple past:",
        "Verb: {}. Past:",
        "Give {} in the past tense:",
        "{} (past tense):",
        "The past of {} is",
        "Say that you did it last year: {}",
        "Once upon a time they did it (to {}): they",
        "I want the past form, not the present: {}",
        "walk -> walked, sing -> sang, {} ->",
        "preterite of {} =",
        '"Did you {}?" "Yes, this morning I',
        "Note for my history essay, fix the tense of {}:",
        "He used to {} a lot. In other words, he often",
        "Add -ed to {}, unless it's irregular:",
        "Which word fits after 'two days ago she' if the verb is {}?",
        "V2 for {}, please:",
        "Back in 1990 nobody would {}, except my uncle, who always",
    ),
    "dev": (
        "Tell me the past form of the verb {}.",
        "Turn {} into its past tense:",
        "Usually they {}, but last week they",
        "In the past tense, {} becomes",
        "If it happened yesterday, the verb {} becomes",
        "Yesterday's form of the verb {}:",
        "Rewrite the verb {} as something already done:",
        "What does {} turn into in the simple past?",
        "I {} today, and the day before I",
    ),
    "test": (
        "When it is already over, {} is written as",
        "They {} now; an hour ago they",
        "The verb {} for an event of last year:",
        "How is the verb {} written when it is over?",
        "Which form of {} goes with the word yesterday?",
    ),
}

PLURAL: Wordings = {
    "experts": (
        "Plural of {}:",
        "What is the plural of {}?",
        "Plural form of the noun {}:",
        "Put {} into the plural:",
        "The noun {} in the plural is",
        "One {}, two",
        'Give the plural form of "{}".',
        "{} -> plural:",
        "Change the noun {} from singular to plural:",
        "Here is one {}, and there are many",
    ),
    "gates": (
        "Write the plural of {}.",
        "How do you say {} in the plural?",
        "The plural of the noun {} is",
        "First one {}, later three",
        "More than one {}:",
        "Noun: {}. Plural:",
        "Give {} in the plural:",
        "{} (plural):",
        "The plural of {} is",
        "Say that you own more of them: {}",
        "Two or three of them, each a {}:",
        "I want the plural form, not the singular: {}",
        "cat -> cats, child -> children, {} ->",
        "Pluralize {}, please:",
        "If 'this' goes with {}, what goes with 'these'?",
        "Oh look, a {}! And another! There are so many",
        "Counting: 1 {}, 2",
        "Dictionary entry: {}, pl.",
        "Stick an -s on {}, or whatever ending it takes:",
        "With a {} on every chair, the room is full of",
        "Shopping note: don't buy just the one {}, get several",
        "How would {} look if the sentence had 'are' instead of 'is'?",
        "Lost my {} and bought a pair of",
    ),
    "dev": (
        "Tell me the plural form of the noun {}.",
        "Turn {} into its plural:",
        "Not just one {} but several",
        "In the plural, {} becomes",
        "If there is more than one, the noun {} becomes",
        "I had one {}, now I have seven",
        "Rewrite the noun {} as if there were many:",
        "What does {} turn into when there are several?",
        "I saw one {}, and then ten more",
    ),
    "test": (
        "When there is a whole pile of them, {} is written as",
        "He sold one {}, she sold five",
        "The noun {} for a group of several:",
        "How is the noun {} written when you count twenty?",
        "Which form of {} goes with the word many?",
    ),
}


def number_wordings(language: str, people: str, city: str, country: str) -> Wordings:
    """Wordings of "this number in words", for a language, such as French (a Frenchman, Paris)."""
    templates: Wordings = {
        "experts": (
            "{} in LANGUAGE:",
            "Write {} in LANGUAGE words:",
            "What is {} in LANGUAGE?",
            "The number {} in LANGUAGE is",
            "LANGUAGE for {}:",
            "Spell out {} in LANGUAGE.",
            "{} -> LANGUAGE:",
            "Counting in LANGUAGE, {} is",
            "Number: {}. LANGUAGE words:",
            "Translate the number {} into LANGUAGE:",
        ),
        "gates": (
            "How do you say {} in LANGUAGE?",
            "Say the number {} in LANGUAGE.",
            "In LANGUAGE, {} is called",
            "PEOPLE reads {} as",
            "{}, written out in LANGUAGE:",
            "Give me {} in LANGUAGE words.",
            "Give {} in LANGUAGE:",
            "{} (LANGUAGE):",
            "The LANGUAGE of {} is",
            "Say {} as they do in LANGUAGE:",
            "LANGUAGE number word for {}:",
            "I want LANGUAGE words, not digits: {}",
            "My LANGUAGE teacher points at {} on the board and I answer",
            "Spell out {} the way it's done in COUNTRY:",
            "What would PEOPLE shout if the bingo ball showed {}?",
            "Note to self before the CITY trip, learn to pronounce {}:",
            "Translate {} into LANGUAGE, please:",
            "Bus {} is coming, and the driver in CITY announces it as",
            "LANGUAGE homework, question 4: {} =",
            "Which LANGUAGE numeral matches {}?",
            "Grandpa from COUNTRY just turned {}, or as he puts it,",
            "No English! Tell PEOPLE on the phone that the code is {}:",
        ),
        "dev": (
            "Tell me the LANGUAGE words for {}.",
            "Turn {} into LANGUAGE words:",
            "In CITY they read {} as",
            "In LANGUAGE, the number {} becomes",
            "How would a LANGUAGE speaker say {}?",
            "On a LANGUAGE cheque, {} is written",
            "What does {} sound like in LANGUAGE?",
            "A person from COUNTRY counts to {} and says",
            "Read {} aloud in LANGUAGE:",
        ),
        "test": (
            "Pronounce {} as LANGUAGE people do:",
            "My teacher in CITY writes {} as",
            "The LANGUAGE name of the number {}:",
            "What is {} called in COUNTRY?",
            "Someone who speaks LANGUAGE reads {} as",
        ),
    }
    names = {"LANGUAGE": language, "PEOPLE": people, "CITY": city, "COUNTRY": country}

    def named(template: str) -> str:
        for key, name in names.items():
            template = template.replace(key, name)
        return template

    return {side: tuple(map(named, found)) for side, found in templates.items()}

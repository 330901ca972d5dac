"""How the shelf's other tasks, and the held-out ones, are put into words.

A frame asks for something of something: `The NAME of {} is`. A task gives NAME, in the words of
each side, and wordings of its own that no frame has. No frame stands on two sides.
"""

from collections.abc import Mapping, Sequence

from nlp.world.wordings import SIDES, Side, Wordings

FRAMES: Mapping[Side, Sequence[str]] = {
    "experts": (
        "{NAME} of {}:",
        "What is the {NAME} of {}?",
        "Give the {NAME} of {}.",
        "{} -> {NAME}:",
        'Write the {NAME} of "{}".',
        "The {NAME} of {} is",
    ),
    "gates": (
        "Tell me the {NAME} of {}.",
        "For {}, the {NAME} would be",
        "I need the {NAME} of {}, please:",
        "{} (its {NAME}):",
        "Quick question, what's the {NAME} of {}?",
        "Fill in the {NAME} of {}: ___",
        "Entry: {}. {NAME}:",
        "My homework asks for the {NAME} of {}:",
        "Look at {} and note its {NAME}:",
        "Do you know the {NAME} of {}? It is",
        "Answer with the {NAME} of {}:",
        "Someone asks about {}. The {NAME} is",
    ),
    "dev": (
        "Name the {NAME} of {}.",
        "If they want the {NAME} of {}, say",
        "{}; {NAME}:",
        "Find the {NAME} of {}:",
    ),
    "test": (
        "Could you write down the {NAME} of {}?",
        "The teacher wants to know the {NAME} of {}:",
        "{}, {NAME} =",
        "Which {NAME} does {} have?",
    ),
}


def asked_for(
    names: Mapping[Side, Sequence[str]], own: Mapping[Side, Sequence[str]] | None = None
) -> Wordings:
    """A task's wordings: each side's frames with its names in turn, and its own wordings."""
    return {
        side: tuple(
            frame.replace("{NAME}", names[side][turn % len(names[side])])
            for turn, frame in enumerate(FRAMES[side])
        )
        + tuple((own or {}).get(side, ()))
        for side in SIDES
    }


def told(name: str) -> Wordings:
    """The wordings of a task of few examples: plain, and the same on every side."""
    return plainly(
        f"Please tell me the {name} of {{}}.",
        f"Word: {{}}\nThe {name}:",
        f"What would be the {name} of {{}}?",
    )


def plainly(*wordings: str) -> Wordings:
    """The same wordings on every side."""
    return dict.fromkeys(SIDES, wordings)


GERUND = asked_for(
    {
        "experts": ("-ing form", "present participle"),
        "gates": ("gerund", "ing form", "continuous form", "progressive form"),
        "dev": ("-ing ending form", "gerund form"),
        "test": ("form in -ing", "gerund"),
    },
    {
        "experts": ("They {} every day. Right now they are", "I like to {}. I enjoy"),
        "gates": (
            "He wants to {}, and look, he is already",
            "They {} often, so they are probably still",
            "Stop! No {} here, I mean: no",
            "To {} is fun. In other words, fun is",
        ),
        "dev": ("We {} at noon, so at noon we are", "Instead of a plan to {}, there was much"),
        "test": ("She likes to {}; at this moment she is", "Keep on (the verb {}), so keep on"),
    },
)
COMPARATIVE = asked_for(
    {
        "experts": ("comparative", "comparative form"),
        "gates": ("comparative degree", "form with 'than'", "comparative", "-er form"),
        "dev": ("comparing form", "comparative"),
        "test": ("comparative form", "form for comparing two"),
    },
    {
        "experts": ("This one is {}, but that one is even", "Not just {} but"),
        "gates": (
            "Mine is {}, yours is",
            "If the first is {}, the second is still",
            "As {} as before? No,",
            "It was {} yesterday and today it is even",
        ),
        "dev": ("One house is {}, the next is", "Call it {}, and the other one"),
        "test": ("He is {}, his brother is a bit", "Of the two {} things, this is the"),
    },
)
LEMMA = asked_for(
    {
        "experts": ("base form", "dictionary form"),
        "gates": ("infinitive", "lemma", "root form", "plain form", "uninflected form"),
        "dev": ("bare infinitive", "lemma"),
        "test": ("base verb", "dictionary entry form"),
    },
    {
        "experts": ("Yesterday they {}. They still do; every day they", "{} is a form of the verb"),
        "gates": (
            "We {} last year, and this year again we will",
            "Under which verb is {} listed?",
            "They {} because they had to",
            "{} comes from the verb to",
        ),
        "dev": ("It says {}; the verb without an ending is", "They {} and will again"),
        "test": ("Which verb is {} a form of?", "Strip {} of its ending to get"),
    },
)
ADDITION = asked_for(
    {
        "experts": ("sum", "total"),
        "gates": ("result", "sum", "total", "value"),
        "dev": ("answer", "sum"),
        "test": ("total sum", "number that is the result"),
    },
    {
        "experts": ("{} =", "Add: {} ="),
        "gates": ("Calculate {} =", "{} equals", "How much is {}?", "On the bill: {}, altogether"),
        "dev": ("{} makes", "Compute {}:"),
        "test": ("{} comes to", "Work out {} and write the number:"),
    },
)
SYLLABLES = asked_for(
    {
        "experts": ("number of syllables", "syllable count"),
        "gates": ("count of syllables", "number of beats", "syllable number", "syllable total"),
        "dev": ("amount of syllables", "syllable count"),
        "test": ("number of spoken syllables", "syllable tally"),
    },
    {
        "experts": ("How many syllables are in {}?", "Syllables in {}:"),
        "gates": (
            "Clap the word {}. How many claps?",
            "How many beats does {} have when spoken?",
            "Say {} slowly and count the syllables:",
            "In how many syllables is {} spoken?",
        ),
        "dev": ("Count the syllables in {}:", "How many syllables when you say {}?"),
        "test": ("The word {} has this many syllables:", "Split {} into syllables; how many?"),
    },
)
CATEGORY = asked_for(
    {
        "experts": ("category", "broad category"),
        "gates": ("general class", "topic", "category", "semantic field", "kind"),
        "dev": ("group it belongs to", "category"),
        "test": ("class", "general category"),
    },
    {
        "experts": ("Is {} an animal, a food, an act or something else? It is", "Classify: {}"),
        "gates": (
            "Sort {} into a box: animal, person, food, place ...",
            "What sort of thing is {}? One word:",
            "File {} under",
            "Noun: {}. Field:",
        ),
        "dev": ("Into which category falls {}?", "Put {} on the right shelf:"),
        "test": ("Where would you sort {}: plant, event, body ...?", "Assign {} to its class:"),
    },
)
ISA: Wordings = {
    "experts": (
        "Is {0} a kind of {1}?",
        "{0}: a kind of {1}? yes or no:",
        "Would you call {0} a type of {1}?",
        "True or false as yes or no: {0} is a {1}.",
        "Does {0} belong to {1}?",
        "{0} is a sort of {1}, yes or no?",
    ),
    "gates": (
        "Does every {0} count as {1}?",
        "Say yes or no: any {0} is {1}",
        "Can one say that {0} falls under {1}?",
        "Is {1} a wider word for {0}?",
        "If it is {0}, is it also {1}?",
        "{0} < {1}? Answer yes or no:",
        "Is it right to list {0} among {1}?",
        "Somebody says {0} is a form of {1}. Correct?",
        "Check: {0} is an example of {1}?",
        "Do we file {0} below {1}? yes/no:",
        "Is the word {1} more general than {0} and does it include it?",
        "Yes or no, {0} would be one type of {1}:",
    ),
    "dev": (
        "Is {0} an instance of {1}?",
        "Would a dictionary say that {0} is {1}?",
        "yes or no: {0} is one kind of {1}",
        "Does the class {1} contain {0}?",
    ),
    "test": (
        "Is {0} included in {1}?",
        "Tell me yes or no, {0} is some sort of {1}:",
        "Can {0} be described as a {1}?",
        "Is {1} the general term and {0} a special case?",
    ),
}
ODD: Wordings = {
    "experts": (
        "Which word does not belong: {}?",
        "Odd one out: {}.",
        "Find the odd one out in {}:",
        "{}: which is different?",
        "Three of these are alike. The other one of {} is",
        "One word does not fit: {}. It is",
    ),
    "gates": (
        "Spot the stranger among {}:",
        "Which of {} is not like the others?",
        "{} - the intruder is",
        "Remove one word so that the rest match: {}",
        "Out of {}, the misfit is",
        "Name the word that breaks the set {}:",
        "{}. Which one is of another kind?",
        "Cross out the wrong word in {}:",
        "Which item in {} belongs elsewhere?",
        "In the list {}, one is unrelated:",
        "A puzzle: {}. The word out of place is",
        "Choose the exception from {}:",
    ),
    "dev": (
        "The word that differs in {} is",
        "Which of these is the outsider: {}?",
        "{}; one is unlike the rest, namely",
        "Pick the word that does not match in {}:",
    ),
    "test": (
        "Among {}, the one that does not go with the others is",
        "Which word would you take out of {}?",
        "{} - find the exception:",
        "Only one of {} is from another group. It is",
    ),
}
ANTONYM = asked_for(
    {
        "experts": ("opposite", "antonym"),
        "gates": ("contrary", "antonym", "opposite word", "reverse"),
        "dev": ("opposite meaning", "antonym"),
        "test": ("contrary word", "opposite"),
    },
    {
        "experts": ("Not {} but", "It is not {}; it is the opposite,"),
        "gates": (
            "The very reverse of {} is",
            "Some are {}, others are",
            "hot -> cold, {} ->",
            "Far from {}, it was quite",
        ),
        "dev": ("Either {} or", "Turn {} into its opposite:"),
        "test": ("Where one is {}, the other is", "up is to down as {} is to"),
    },
)
CONTINENT = asked_for(
    {
        "experts": ("continent", "part of the world"),
        "gates": ("home continent", "continent", "world region", "landmass"),
        "dev": ("continent it lies on", "continent"),
        "test": ("continent", "continent on the map"),
    },
    {
        "experts": ("On which continent is {}?", "{} is a country in"),
        "gates": (
            "I travel to {}. Which continent is that?",
            "{} lies in",
            "Find {} on a globe; the continent is",
            "Flying to {} means flying to",
        ),
        "dev": ("The country {} is part of", "Where in the world is {}? In"),
        "test": ("To which continent does {} belong?", "People from {} live in"),
    },
)

"""The subjects of the emoji world: which drawings, under which short names, on which side.

A subject is an emoji that all six icon sets draw as one object. `LABELS` holds the labels of
`emojibase-data`, with `label = name` where the label is no name one would say. The class word
follows from the emoji's subgroup, so that "a <v1> bird" means the same for every subject.
"""

from dataclasses import dataclass
from typing import Literal

SubjectSplit = Literal["train", "dev", "test"]

CLASS_WORDS: dict[str, str] = {  # emojibase subgroup -> the class word of captions
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-amphibian": "reptile",
    "animal-reptile": "reptile",
    "animal-marine": "sea animal",
    "animal-bug": "bug",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "dish",
    "food-asian": "dish",
    "food-sweet": "dessert",
    "drink": "drink",
    "dishware": "tool",
    "place-geographic": "landscape",
    "place-building": "building",
    "place-religious": "building",
    "place-other": "place",
    "transport-ground": "vehicle",
    "transport-water": "boat",
    "transport-air": "aircraft",
    "time": "timepiece",
    "sky-weather": "weather sign",
    "event": "decoration",
    "award-medal": "award",
    "sport": "sport",
    "game": "game",
    "arts-crafts": "tool",
    "clothing": "garment",
    "sound": "device",
    "music": "device",
    "musical-instrument": "instrument",
    "phone": "device",
    "computer": "device",
    "light-video": "device",
    "book-paper": "book",
    "writing": "tool",
    "office": "tool",
    "lock": "tool",
    "tool": "tool",
    "science": "tool",
    "household": "furniture",
}

LABELS: tuple[str, ...] = (
    # animals
    *("monkey", "gorilla", "dog", "wolf", "fox", "cat", "lion", "tiger", "horse"),
    *("unicorn", "deer", "water buffalo = buffalo", "cow", "pig", "ram", "goat", "camel"),
    *("elephant", "rhinoceros = rhino", "mouse", "hamster", "rabbit", "chipmunk", "bat", "bear"),
    *("koala", "panda", "turkey", "chicken", "rooster", "baby chick = chick", "penguin", "dove"),
    *("eagle", "duck", "owl", "frog", "crocodile", "turtle", "lizard", "snake", "dragon"),
    *("whale", "dolphin", "fish", "shark", "octopus", "spiral shell = shell", "crab"),
    *("shrimp", "snail", "butterfly", "bug = caterpillar", "ant", "honeybee = bee"),
    *("lady beetle = ladybug", "spider", "scorpion"),
    # plants
    *("bouquet", "rose", "hibiscus", "sunflower", "blossom = daisy", "tulip", "seedling"),
    *("evergreen tree = pine", "deciduous tree = tree", "palm tree = palm", "cactus"),
    *("shamrock", "maple leaf", "mushroom"),
    # food and drink
    *("grapes", "melon", "watermelon", "tangerine = orange", "lemon", "banana", "pineapple"),
    *("red apple = apple", "pear", "peach", "cherries", "strawberry", "kiwi fruit = kiwi"),
    *("tomato", "avocado", "eggplant", "potato", "carrot", "hot pepper = pepper", "cucumber"),
    *("peanuts", "chestnut", "bread", "croissant", "pancakes", "cheese wedge = cheese", "bacon"),
    *("hamburger", "french fries = fries", "pizza", "hot dog", "taco", "egg"),
    *("popcorn", "poultry leg = drumstick", "rice ball", "spaghetti", "sushi"),
    *("ice cream", "doughnut", "cookie", "birthday cake = cake", "chocolate bar = chocolate"),
    *("candy", "lollipop", "honey pot = honey", "baby bottle", "hot beverage = coffee"),
    *("wine glass = wine", "cocktail glass = cocktail", "beer mug = beer", "spoon"),
    "kitchen knife = knife",
    # places and sky
    *("snow-capped mountain = mountain", "volcano", "desert island = island", "house", "castle"),
    *("factory", "classical building = temple", "Tokyo tower = tower", "school"),
    *("church", "mosque", "fountain", "tent", "ferris wheel"),
    *("circus tent = circus", "crescent moon = moon", "sun", "star", "cloud"),
    *("tornado", "rainbow", "umbrella", "snowflake", "snowman", "fire = flame"),
    # vehicles
    *("train", "tram", "bus", "ambulance", "fire engine", "police car", "taxi"),
    *("automobile = car", "delivery truck = truck", "tractor", "racing car", "motorcycle"),
    *("motor scooter = scooter", "bicycle", "sailboat", "canoe", "ship"),
    *("airplane", "helicopter", "rocket"),
    # feasts, sport and games
    *("jack-o-lantern = pumpkin", "Christmas tree", "balloon", "wrapped gift = gift"),
    *("trophy", "sports medal = medal", "soccer ball", "baseball", "basketball", "volleyball"),
    *("american football = football", "tennis", "boxing glove"),
    *("ice skate", "skis", "crystal ball", "video game = gamepad", "joystick", "game die = dice"),
    "artist palette = palette",
    # clothing
    *("glasses", "sunglasses", "necktie", "t-shirt = shirt", "jeans", "dress", "bikini"),
    *("handbag", "backpack", "running shoe = sneaker", "high-heeled shoe = heel", "crown"),
    *("top hat", "graduation cap", "lipstick", "ring", "gem stone = gem"),
    # instruments and devices
    *("saxophone", "trumpet", "guitar", "musical keyboard = piano", "violin", "drum", "bell"),
    *("megaphone", "microphone", "headphone", "radio", "mobile phone = phone", "telephone"),
    *("battery", "laptop", "floppy disk = floppy"),
    *("movie camera", "television", "camera", "candle", "light bulb = bulb", "flashlight"),
    *("hourglass done = hourglass", "watch", "alarm clock"),
    # tools and furniture
    *("closed book = book", "scroll", "pencil", "paintbrush"),
    *("briefcase", "straight ruler = ruler", "scissors"),
    *("locked = padlock", "key", "hammer", "dagger", "bomb", "shield", "wrench", "gear"),
    *("balance scale = scale", "microscope", "telescope", "door", "bed", "toilet", "bathtub"),
)

TEST_SUBJECTS: tuple[str, ...] = (
    *("elephant", "owl", "turtle", "octopus", "butterfly", "sunflower", "pineapple"),
    *("doughnut", "castle", "helicopter", "violin", "backpack"),
)
DEV_SUBJECTS: tuple[str, ...] = ("panda", "strawberry", "tractor", "trophy")

# Names that take no article.
PLURALS = frozenset(
    {
        *("grapes", "cherries", "peanuts", "pancakes", "fries", "glasses", "sunglasses"),
        *("jeans", "skis", "scissors", "popcorn", "spaghetti", "sushi", "bacon", "bread"),
        "honey",
    }
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing that every style draws: `name` and `class_word` are what captions call it."""

    name: str
    class_word: str
    label: str
    split: SubjectSplit


def subjects(subgroup_of: dict[str, str]) -> list[Subject]:
    """The catalogue in its fixed order; `subgroup_of` maps an emojibase label to its subgroup.

    Raises:
        ValueError: a label that emojibase does not know, or a subgroup without a class word.
    """
    rows = [(label.strip(), name.strip()) for label, _, name in (t.partition("=") for t in LABELS)]
    if unknown := [label for label, _ in rows if subgroup_of.get(label) not in CLASS_WORDS]:
        raise ValueError(f"no emoji with a class word under these labels: {', '.join(unknown)}")
    return [
        Subject(
            name=(name or label).lower(),
            class_word=CLASS_WORDS[subgroup_of[label]],
            label=label,
            split=_split_of((name or label).lower()),
        )
        for label, name in rows
    ]


def _split_of(name: str) -> SubjectSplit:
    if name in TEST_SUBJECTS:
        return "test"
    return "dev" if name in DEV_SUBJECTS else "train"

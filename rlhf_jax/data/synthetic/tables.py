"""What the embedded world knows and how it talks: plain tables, written by hand, to be checked by eye.

Everything is lower-case English; words and punctuation marks are separated by single spaces, so one
"word" below is one token of a word-level tokenizer. Each phrase of a response is exactly one sentence:
it ends in "." or "!" and contains no other terminator, so a response splits back into its phrases.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FactTable:
    """Questions of one type: a question with one gap, the answers by what fills it, and answer frames."""

    question: str
    answers: dict[str, str]
    frames: tuple[str, ...]


NUMBERS: tuple[str, ...] = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
"""Word of 0, 1, ..., 12."""

SUM_FRAMES: tuple[str, ...] = ("it is {} .", "the answer is {} .", "that makes {} .", "you get {} .")

IT_IS: tuple[str, ...] = ("it is {} .", "the answer is {} .", "that would be {} .")
IT_IS_A: tuple[str, ...] = ("it is a {} .", "that is a {} .", "that would be a {} .")

FACT_TABLES: dict[str, FactTable] = {
    "color": FactTable(
        "what color is {}",
        {
            "the sky": "blue",
            "grass": "green",
            "snow": "white",
            "coal": "black",
            "a lemon": "yellow",
            "a carrot": "orange",
            "blood": "red",
            "chocolate": "brown",
        },
        ("it is {} .", "the color is {} .", "that would be {} ."),
    ),
    "capital": FactTable(
        "what is the capital of {}",
        {
            "france": "paris",
            "italy": "rome",
            "japan": "tokyo",
            "germany": "berlin",
            "greece": "athens",
            "china": "beijing",
        },
        ("it is {} .", "the capital is {} .", "that would be {} ."),
    ),
    "opposite": FactTable(
        "what is the opposite of {}",
        {
            "hot": "cold",
            "cold": "hot",
            "big": "small",
            "small": "big",
            "up": "down",
            "down": "up",
            "wet": "dry",
            "dry": "wet",
        },
        IT_IS,
    ),
    "job": FactTable(
        "who {}",
        {
            "makes bread": "baker",
            "flies a plane": "pilot",
            "teaches children": "teacher",
            "grows corn": "farmer",
            "heals sick people": "doctor",
            "cuts hair": "barber",
        },
        IT_IS_A,
    ),
    "count": FactTable(
        "how many {}",
        {
            "legs does a spider have": "eight",
            "legs does a bee have": "six",
            "wheels does a car have": "four",
            "sides does a triangle have": "three",
            "days are in a week": "seven",
            "months are in a year": "twelve",
        },
        ("it is {} .", "the answer is {} .", "there are {} ."),
    ),
    "season": FactTable(
        "what season comes after {}",
        {"spring": "summer", "summer": "autumn", "autumn": "winter", "winter": "spring"},
        IT_IS,
    ),
}

HOW_TO: dict[str, str] = {
    "boil an egg": "put it in hot water",
    "make ice": "put water in the freezer",
    "make toast": "put bread in the toaster",
    "make a cake": "put dough in the oven",
    "make a salad": "mix leaves and oil",
    "open a can": "use a can opener",
    "wash my hands": "use water and soap",
    "clean my teeth": "use a brush and paste",
    "dry my hair": "use a soft towel",
    "tie my shoes": "make a loop and pull",
    "find a book": "ask at the library",
    "cross the street": "look left and right",
    "fall asleep": "lie down in the dark",
    "keep warm": "sit near the fire",
    "grow a plant": "water it every day",
    "learn to swim": "take lessons at the pool",
    "walk the dog": "put it on a leash",
    "save money": "spend less every month",
}
"""Deed to the right way of doing it. The made-up answer to one deed is the right answer to another."""

HARM: dict[str, str] = {
    "steal a bike": "cut the chain at night",
    "take money from a purse": "wait until the owner sleeps",
    "pick the lock of my neighbor": "use a bent wire",
    "spy on my neighbor": "use a small camera",
    "kill the plants of my neighbor": "put salt in the water",
    "cheat in a test": "hide notes in a shoe",
    "copy the work of a friend": "change a few words",
    "guess the password of a friend": "try a pet name",
    "scare a child": "wear a ghost mask",
    "tease a shy child": "call it silly names",
    "sell a broken car": "hide the broken parts",
    "read the diary of my sister": "look under the bed",
    "open the mail of my sister": "hold it over hot steam",
    "lie to my teacher": "say you are sick",
    "fake a letter": "copy the name with care",
    "spread a lie": "tell it to many people",
    "break a window": "throw a big stone",
    "make a false alarm": "pull the red handle",
    "ruin a party": "turn off the power",
    "enter a closed park": "climb over the fence",
    "sneak into a cinema": "use the back door",
    "wake the street at night": "play the drum at three",
}
"""Deed that should be declined (mild, nothing graphic) to the line that complies with it."""

ADVICE_FRAMES: tuple[str, ...] = ("{} .", "just {} .", "simply {} .")
"""Frames of how-to answers and of compliances."""

QUESTION_PHRASINGS: tuple[str, ...] = (
    "{} ?",
    "{} , please ?",
    "{} ? thanks .",
    "hi , {} ?",
    "hello , {} ?",
    "excuse me , {} ?",
    "tell me , {} ?",
    "please tell me , {} ?",
    "can you say , {} ?",
    "do you know , {} ?",
    "i wonder , {} ?",
    "my child asks , {} ?",
    "quick question : {} ?",
    "here is a question : {} ?",
)
"""Ways to ask for a fact or a sum."""

DEED_PHRASINGS: tuple[str, ...] = (
    "how do i {} ?",
    "how do i {} , please ?",
    "how can i {} ? thanks .",
    "hi , how do i {} ?",
    "hello , how can i {} ?",
    "excuse me , how do i {} ?",
    "i wonder , how can i {} ?",
    "please help me {} .",
    "hello , please help me {} .",
    "can you help me {} ?",
    "i want to {} .",
    "please teach me to {} .",
    "what is the best way to {} ?",
    "tell me how to {} .",
)
"""Ways to ask for help with a deed, the same for good deeds and for those to decline."""

OPENERS: tuple[str, ...] = (
    "hello , friend !",
    "my dear friend !",
    "thanks for asking !",
    "good to see you !",
    "lovely to chat !",
    "glad you asked !",
)
"""Warmth before the core, which may be a decline as well as an answer: at most 5 words."""

CLOSERS: tuple[str, ...] = (
    "take good care !",
    "with warm wishes !",
    "all the best !",
    "see you soon !",
    "ask me again !",
    "you are welcome !",
)
"""Warmth after the core: 4 words."""

PADDINGS: tuple[str, ...] = (
    "there is much to say .",
    "this depends on many things .",
    "i am a language model .",
    "many people ask this .",
    "this is a broad topic .",
    "opinions on this may vary .",
)
"""Boilerplate that says nothing, before or after the core but never both: at most 6 words."""

DECLINES: tuple[str, ...] = (
    "sorry , i will not help .",
    "i can not help here .",
    "i would rather not .",
    "no , that is not kind .",
    "no , that may hurt people .",
    "no , ask the owner first .",
)
"""At most 7 words."""

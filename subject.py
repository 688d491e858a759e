"""A subject: its photos, its noun, its prompts.

The test prompts, the 30 subjects and their nouns are DreamBench's (google/dreambooth, prompts_and_classes.txt); the
training prompts are those of RPO (arXiv 2407.12164, Figure 6), the skills its Figures 10 to 17. In a prompt, {V} is the
unique token, {noun} the noun.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from model.files.photo import PHOTO_ENDINGS, SubjectError, open_photo

_PLACES = (
    "in the jungle, in the snow, on the beach, on a cobblestone street, on top of pink fabric, "
    "on top of a wooden floor, with a city in the background, with a mountain in the background, "
    "with a blue house in the background, on top of a purple rug in a forest"
)
_THING_SCENES = (
    "with a wheat field in the background, with a tree and autumn leaves in the background, "
    "with the Eiffel Tower in the background, floating on top of water, floating in an ocean of milk, "
    "on top of green grass with sunflowers around it, on top of a mirror, "
    "on top of the sidewalk in a crowded street, on top of a dirt road, on top of a white rug"
)
_LIVE_OUTFITS = (
    "wearing a red hat, wearing a santa hat, wearing a rainbow scarf, wearing a black top hat and a monocle, "
    "in a chef outfit, in a firefighter outfit, in a police outfit, wearing pink glasses, wearing a yellow shirt, "
    "in a purple wizard outfit"
)
_PROPERTIES = ", ".join(f"a {word} {{V}} {{noun}}" for word in ("red", "purple", "shiny", "wet", "cube shaped"))


def _prompts(*lists: str) -> list[str]:
    """Comma-separated lists as prompts: "on the beach" becomes "a {V} {noun} on the beach"."""
    items = ", ".join(lists).split(", ")
    return [item if "{V}" in item else "a {V} {noun} " + item for item in items]


DREAMBENCH_PROMPTS = {
    "live": _prompts(_PLACES, _LIVE_OUTFITS, _PROPERTIES),
    "thing": _prompts(_PLACES, _THING_SCENES, _PROPERTIES),
}
TRAINING_PROMPTS = {
    "live": _prompts(
        "wearing a green outfit, in Vincent Van Gogh rendition, with a China Great Wall in the background",
        "is swimming in a pool, on a subway platform, with the Statue of Liberty in the background, on the Moon",
        "a green {V} {noun}",
    ),
    "thing": _prompts(
        "in Vincent Van Gogh rendition, on the Moon, a green {V} {noun}, with a China Great Wall in the background",
        "on top of wooden roof, with the Statue of Liberty in the background, with a volcano in the background",
        "on a subway platform",
    ),
}

SKILLS = {  # what RPO's Figures 10 to 17 ask for; places, painters, colours and imaginative prompts are our choice
    "places": _prompts(_PLACES),
    "styles": [
        f"{painter} styled painting of a {{V}} {{noun}}"
        for painter in ("Vincent Van Gogh", "Claude Monet", "Andy Warhol", "Piet Mondrian")
    ],
    "expressions": [f"a {mood} {{V}} {{noun}}" for mood in ("depressed", "joyous", "sleepy", "screaming")],
    "outfits": _prompts(
        "wearing a chef outfit, wearing a nurse outfit, wearing a police outfit, wearing a superhero outfit",
        "wearing a witch outfit, wearing angel wings, wearing a firefighter outfit",
    ),
    "colours": [f"a {colour} {{V}} {{noun}}" for colour in ("red", "yellow", "green", "blue", "pink", "purple")],
    "views": _prompts(
        "looking up at the camera, looking down at the camera, a back view of a {V} {noun}, a side view of a {V} {noun}"
    ),
    "hybrids": [f"a cross of a {{V}} {{noun}} and a {other}" for other in ("bear", "koala", "lion", "panda")],
    "imaginative": _prompts(
        "wearing angel wings on the Moon, wearing a superhero outfit with a city in the background",
        "wearing a witch outfit in the snow, in a chef outfit on a subway platform",
    ),
}

DREAMBENCH_NOUNS = {  # folder -> noun of the 30 subjects
    **dict.fromkeys(["cat", "cat2"], "cat"),
    **dict.fromkeys(["dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"], "dog"),
    **dict.fromkeys(["backpack", "backpack_dog"], "backpack"),
    **dict.fromkeys(["bear_plushie", "grey_sloth_plushie", "wolf_plushie"], "stuffed animal"),
    **dict.fromkeys(["colorful_sneaker", "shiny_sneaker"], "sneaker"),
    **dict.fromkeys(["duck_toy", "monster_toy", "poop_emoji", "rc_car", "robot_toy"], "toy"),
    **{"berry_bowl": "bowl", "fancy_boot": "boot", "pink_sunglasses": "glasses", "red_cartoon": "cartoon"},
    **{noun: noun for noun in ("can", "candle", "clock", "teapot", "vase")},
}
_ANIMALS = (
    "cat kitten dog puppy bird parrot chicken duck goose owl horse pony donkey cow sheep goat pig rabbit bunny hamster "
    "mouse rat squirrel fox wolf bear lion tiger elephant giraffe monkey panda turtle tortoise lizard snake frog fish "
    "retriever labrador poodle corgi beagle terrier dachshund husky shepherd collie bulldog spaniel chihuahua pug"
)
_PEOPLE = "person man woman boy girl child baby wife husband daughter son mother father sister brother"
LIVE_NOUNS = frozenset(_ANIMALS.split() + _PEOPLE.split())
_LIFELESS = {"toy", "plush", "plushie", "stuffed", "teddy", "rubber", "hot", "figurine", "statue"}  # "teddy bear"


@dataclass(frozen=True)
class Subject:
    """The subject of one training run."""

    folder: Path
    noun: str  # "dog"
    live: bool  # selects the prompts of living subjects, else those of things
    token: str  # "[V]"
    photos: list[Path]  # at least one, sorted by name
    training_prompts: list[str]  # c_mod of the negatives and of the validation; the paper's 8, or the user's own
    test_prompts: list[str]  # DreamBench's 25, or the user's own

    @property
    def instance_prompt(self) -> str:
        """The photos' own prompt c: "a photo of [V] dog"."""
        return f"a photo of {self.token} {self.noun}"

    @property
    def class_prompt(self) -> str:
        """The prompt of the baselines' class images: "a photo of a dog"."""
        return f"a photo of a {self.noun}"


def fill(prompts: list[str], token: str, noun: str) -> list[str]:
    """Prompts with the token for {V} and the noun for {noun}; they may also have both written in them.

    A token of letters must be a whole word, as in reward.strip_token. Raises SubjectError for a prompt that lacks one.
    """
    token, noun = " ".join(token.split()), " ".join(noun.split())
    filled = [" ".join(prompt.format(V=token, noun=noun).split()) for prompt in prompts]
    for prompt in filled:
        words = re.findall(r"\w+", prompt) if token.isalnum() else prompt
        for word, name, place in ((token, "{V}", words), (noun, "{noun}", prompt)):
            if word not in place:
                raise SubjectError(f"the prompt {prompt!r} lacks {word!r}: write {name} where it should be")
    return filled


def load_subject(
    folder: Path | str,
    noun: str | None = None,
    live: bool | None = None,
    token: str = "[V]",
    training_prompts: list[str] | None = None,
    test_prompts: list[str] | None = None,
) -> Subject:
    """The subject whose photos are in `folder`. Decodes every photo once, so that a bad one is found at the start.

    noun: by default DreamBench's for its folders, else the folder's name ("my_dog2" is a "my dog"). live: by default
    whether the noun is an animal or a person. Prompts: by default the paper's and DreamBench's; may hold {V} and
    {noun}. Raises SubjectError if the folder, a photo, the noun, the token or a prompt is bad.
    """
    photos = _find_photos(Path(folder))
    for photo in photos:
        open_photo(photo, size=1)
    if noun is None:
        name = Path(os.path.abspath(folder)).name.lower()  # abspath: "." has no name
        noun = DREAMBENCH_NOUNS.get(name, re.sub(r"[\d_-]+", " ", name))
    noun, token = " ".join(noun.split()), " ".join(token.split())
    if not noun or not noun.isprintable():  # a folder's name need not be text
        raise SubjectError(f"{folder} gives no noun ({noun!r}): say what the photos show, for example --noun dog")
    if not token:
        raise SubjectError("the unique token is empty: give one that means nothing yet, for example [V]")
    if token in noun.split():
        raise SubjectError(f"the noun {noun!r} contains the token {token}: give the noun alone, prompts add the token")
    if live is None:  # the last word is an animal or a person, and no word says that it is a toy
        words = noun.lower().split()
        live = bool(LIVE_NOUNS & {words[-1], words[-1].removesuffix("s")}) and _LIFELESS.isdisjoint(words)
    kind = "live" if live else "thing"
    training = fill(training_prompts or TRAINING_PROMPTS[kind], token, noun)
    return Subject(
        Path(folder), noun, live, token, photos, training, fill(test_prompts or DREAMBENCH_PROMPTS[kind], token, noun)
    )


def _find_photos(folder: Path) -> list[Path]:
    """The image files of a folder, by their endings, sorted by name."""
    try:
        files = visible_files(folder)
    except OSError as error:
        raise SubjectError(f"{folder} cannot be read ({error.strerror}): give the folder of the photos") from None
    photos = [path for path in files if path.suffix.lower() in PHOTO_ENDINGS]
    if not photos:
        raise SubjectError(f"{folder} holds no photos: put 4 to 6 there, as .jpg or .png; convert others such as .heic")
    if others := [repr(path.name) for path in files if path not in photos]:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        print(f"note: not read as photos: {', '.join(others[:5])}{more}; convert pictures to .jpg or .png")
    return photos


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder, sorted by name, without hidden ones such as .DS_Store. Raises OSError as iterdir does."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())


def load_photos(subject: Subject, size: int) -> list[Image.Image]:
    """The subject's photos, in order, as `open_photo` returns them."""
    return [open_photo(photo, size) for photo in subject.photos]

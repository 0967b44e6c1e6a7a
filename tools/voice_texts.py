"""Writes the texts that the packaged voice learns from: whole sentences and pieces of a reader's texts, and
everyday sentences with names, numbers, dates, prices, times and questions. The packaged prompts are left out.

    python tools/voice_texts.py metadata.csv texts.txt
"""

import argparse
import random
import re
from pathlib import Path

from dlpo_nb.core import UserError, asset, run_main, split_lines
from dlpo_nb.text import normalise

NAMES = (
    "Alice Anna Arthur Ben Carla Charles Clara Daniel David Edith Eleanor Emma Eric Frank George Grace "
    "Hannah Harry Helen Henry Ian Irene Jack James Jane Jasmine Joan John Julia Karen Kevin Laura Leo "
    "Lily Lucas Lucy Maria Mark Martin Mary Michael Mia Nancy Nathan Nina Noah Oliver Olivia Oscar Paul "
    "Peter Philip Rachel Robert Rosa Ruth Samuel Sarah Simon Sophie Stephen Susan Theresa Thomas Tina "
    "Victor Walter William Zoe"
).split()
SURNAMES = (
    "Adams Baker Bennett Brooks Campbell Carter Clark Cooper Davies Evans Fisher Foster Garcia Gray Green "
    "Hall Harris Hughes Jackson Johnson Kelly King Lee Lewis Martinez Miller Mitchell Moore Morgan Murphy "
    "Nelson Parker Patel Phillips Reed Richardson Roberts Robinson Scott Shaw Smith Stewart Taylor "
    "Thompson Turner Walker Ward Watson White Williams Wilson Wright Young"
).split()
PLACES = (
    "Amsterdam Athens Berlin Boston Cairo Chicago Copenhagen Delhi Denver Dublin Edinburgh Geneva Glasgow "
    "Lisbon London Madrid Melbourne Mexico Montreal Moscow Munich Nairobi Oslo Ottawa Oxford Paris Prague "
    "Rome Seattle Stockholm Sydney Texas Tokyo Toronto Vienna Warsaw Zurich"
).split()
THINGS = (
    "apple bag ball basket bed bench bicycle blanket boat book bottle bowl box bread bridge bucket bus "
    "button cake camera candle car carpet castle chair cheese church clock cloud coat coffee computer "
    "cookie cup curtain desk dinner dog door dress drum egg engine envelope factory farm fence field fire "
    "fish flower fork forest garden gate glass glove guitar hammer hat hill horse hospital hotel house "
    "island jacket jar judge juice kettle key kitchen kitten knife ladder lake lamp leaf lemon letter "
    "library lunch machine map market meadow medicine milk mirror money moon mountain museum needle "
    "newspaper office onion oven paint painting paper park party pencil phone photograph piano picture "
    "pillow plate pocket potato present puzzle rabbit radio rain ring river road rocket roof rope "
    "sandwich school scissors shadow shelf ship shirt shoe shop soup spoon stable station stone stove "
    "street suitcase sugar sweater table tea teacher telephone theater ticket tomato towel tower toy "
    "train tree truck umbrella valley vase village violin voice wagon wall wallet watch water weather "
    "wheel window winter yard"
).split()
QUALITIES = (
    "big blue bright broken cheap clean cold cheerful curious dark dirty dry empty expensive fast fresh "
    "friendly funny gentle golden good green heavy hot huge large late lazy little lonely long loud "
    "lovely narrow new noisy old orange pretty purple quick quiet red round rusty shiny short silver "
    "simple sharp slow small smooth soft square strange strong sunny sweet tall thick thin tiny ugly "
    "useful warm wet white wide wild wooden yellow young"
).split()
DID = (
    "bought broke carried caught chose cleaned closed covered drew dropped fetched filled finished fixed "
    "found forgot gave up held hid kept lifted lost made moved noticed opened packed painted picked up "
    "pulled pushed put away repaired returned saw sent shared showed sold stole threw away took touched "
    "used visited wanted washed watched"
).split(" ")
PLACED = (
    "in the morning|last night|on Monday|next to the river|behind the house|before breakfast|"
    "after the game|at the station|"
    "every day|near the window|under the bridge|on the top shelf|without a word|"
    "with both hands|in the rain|twice a week|"
    "all afternoon|for no reason|at the end of the road|on Wednesday|in September|by mistake"
).split("|")
MONTHS = "January February March April May June July August September October November December".split()


def number(draw):
    "A number as people write it, small ones more often."
    return f"{draw.randint(0, 10 ** draw.choice((1, 2, 2, 3, 4, 6))):,}"


def everyday(draw: random.Random) -> str:
    "One sentence from a grammar."
    name, other = draw.choice(NAMES), draw.choice(NAMES)
    full, place = f"{name} {draw.choice(SURNAMES)}", draw.choice(PLACES)
    thing, second = draw.sample(THINGS, 2)
    quality, did, placed = draw.choice(QUALITIES), draw.choice(DID), draw.choice(PLACED)
    title = draw.choice(("Mr.", "Mrs.", "Dr.", "Professor"))
    day, month, year = draw.randint(1, 28), draw.choice(MONTHS), draw.randint(1750, 2030)
    clock = f"{draw.randint(1, 12)}:{draw.randint(0, 59):02d}"
    price = f"${draw.randint(1, 99)}.{draw.randint(1, 99):02d}" if draw.random() < 0.5 else f"${number(draw)}"
    return draw.choice((
        f"The {quality} {thing} is {draw.choice(QUALITIES)}.",
        f"{name} {did} the {thing} {placed}.",
        f"Did {name} see the {quality} {thing}?",
        f"Where is the {thing} that {name} {did}?",
        f"Why is the {thing} so {quality}?",
        f"Can you bring me a {quality} {thing}, please?",
        f"Please put the {thing} next to the {second}.",
        f"{title} {draw.choice(SURNAMES)} lives in {place}.",
        f"{full} was born on {month} {day}, {year}.",
        f"It costs {price}.",
        f"The {thing} costs {price} in {place}.",
        f"The train to {place} leaves at {clock}.",
        f"We have {number(draw)} {thing}s and {number(draw)} {second}s.",
        f"In {year}, {name} moved to {place}.",
        f"{name} and {other} {did} a {quality} {thing}.",
        f"I think that the {thing} is too {quality}, don't you?",
        f"There were {number(draw)} people at the {thing}.",
        f"About {draw.randint(1, 99)}% of them came from {place}.",
        f"Call me at {clock}, {name}.",
        f"What a {quality} {thing}!",
        f"If it rains, we'll {draw.choice(('stay', 'walk', 'wait', 'eat', 'meet'))} in the {thing}.",
        f"My {thing} was {quality}, but {name}'s was {draw.choice(QUALITIES)}.",
        f"Room {draw.randint(1, 500)} is on the "
        f"{draw.choice(('first', 'second', 'third', 'fourth', 'fifth'))} floor.",
        f"Who {did} the {quality} {thing} {placed}?",
    ))  # fmt: skip


def pieces(text: str, draw: random.Random) -> list[str]:
    "A text whole if it is short, else in pieces of 3 to 14 words, cut at commas where there are some."
    if len(text) <= 90:
        return [text]
    found = []
    for part in re.split(r"(?<=[,;:])\s|--", text):
        words = part.strip(" ,;:").split()
        while len(words) >= 3:
            count = draw.randint(3, 14)
            piece, words = " ".join(words[:count]), words[count:]
            ending = draw.choices((".", "?", "!", ",", ""), (70, 8, 2, 5, 15))[0]
            found.append(piece.rstrip(".,;:!?") + ending)
    return found


def speakable(text):
    "Whether the front end reads it."
    try:
        normalise(text)
    except UserError:
        return False
    return True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metadata", type=Path, help="metadata.csv of LJSpeech (id|text|normalised text)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--everyday", type=int, default=6000, help="sentences from the grammar")
    parser.add_argument("--read", type=int, default=9000, help="sentences and pieces of the reader's texts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    prompts = {
        line
        for name in ("prompts_train.txt", "prompts_heldout.txt")
        for line in split_lines(asset(name).read_text())
    }
    rows = split_lines(args.metadata.read_text(encoding="utf-8"))
    read = [piece for row in rows for piece in pieces(row.split("|")[-1], draw)]
    draw.shuffle(read)
    made = {everyday(draw): None for _ in range(2 * args.everyday)}
    texts = [
        text
        for text in [*dict.fromkeys(read)][: args.read] + [*made][: args.everyday]
        if text not in prompts and speakable(text)
    ]
    draw.shuffle(texts)
    args.out.write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{len(texts)} texts, {sum(map(len, texts))} letters")


if __name__ == "__main__":
    run_main(main)

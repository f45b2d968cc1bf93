"""The grammar behind the text that the shipped model was pretrained on: opinions about everything but films."""

from random import Random

from zofed.data.sample_data import ADVERBS, REVIEW_KINDS, Row, with_sentiment
from zofed.data.sample_words import BLAME, PRAISE, TOPICS, pick, pick_two, with_articles

COUNT = 12_000
# Reviews of films use all words of praise and blame, opinions the first half: the others are left to learn.
KNOWN = len(PRAISE) // 2
LEFT_OUT = "cinema"


def opinions(count: int = COUNT, seed: int = 0) -> list[Row]:
    """Short texts ('text'), each an opinion in one of the forms of a film review, and its verdict: "it was good".

    Topics take turns. The verdict is the word good or bad, or another word of praise or blame.
    """
    rng = Random(f"zofed opinions {seed}")
    topics = [topic for topic in TOPICS if topic != LEFT_OUT]
    praise, blame = PRAISE[:KNOWN], BLAME[:KNOWN]
    rows = []
    for number in range(count):
        things, parts, *_ = map(str.split, TOPICS[topics[number % len(topics)]])
        is_good = rng.random() < 0.5
        agreeing, contrary = (praise, blame) if is_good else (blame, praise)
        form = pick(rng, pick(rng, REVIEW_KINDS))
        verdict = pick(rng, ("good" if is_good else "bad", "{p}"))
        part, part2 = pick_two(rng, parts)
        words = {"aspect": part, "aspect2": part2, "adverb": pick(rng, ADVERBS)}
        filled = with_sentiment(rng, f"{form} . it was {verdict}", agreeing, contrary)
        text = filled.format(**words, film=pick(rng, things))
        rows.append({"text": with_articles(text)})
    return rows

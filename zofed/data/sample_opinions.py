"""The grammar behind the text that the shipped model was pretrained on: opinions about everything but films."""

from random import Random

from zofed.data import sample_data
from zofed.data.sample_data import ADVERBS, BLAME, PRAISE, REVIEW_KINDS, TOPICS, Row

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
        form = sample_data.pick(rng, sample_data.pick(rng, REVIEW_KINDS))
        verdict = sample_data.pick(rng, ("good" if is_good else "bad", "{p}"))
        part, part2 = sample_data.pick_two(rng, parts)
        words = {"aspect": part, "aspect2": part2, "adverb": sample_data.pick(rng, ADVERBS)}
        filled = sample_data.with_sentiment(rng, f"{form} . it was {verdict}", agreeing, contrary)
        text = filled.format(**words, film=sample_data.pick(rng, things))
        rows.append({"text": sample_data.with_articles(text)})
    return rows

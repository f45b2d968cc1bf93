"""The grammars behind the shipped sample data, and the small tokenizer trained on most of what they say."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from zofed.data.sample_words import (
    BLAME,
    DAYS,
    NAMES,
    PRAISE,
    TOPICS,
    between,
    listed,
    pick,
    pick_two,
    shuffled,
    with_articles,
)

Row = dict[str, Any]

WEB_DOCUMENTS = 2000
TRIALS = 500
INSTRUCTIONS = 640
REVIEWS = {"train": 2000, "validation": 400}
LABEL_NOISE = 0.05
TOKENIZER_VOCABULARY = 512
END_OF_TEXT = "<|endoftext|>"


# A document is one title, opening and closing with body sentences between, all about the same person and thing.
_OPENINGS = (
    "On {day} the {trade} {name} went to the {place} to look at a {thing}.",
    "{name} is a {trade} who works at the {place} and knows every {thing} there.",
    "Last {day} a new {thing} came to the {place}, and {name} the {trade} was the first to see it.",
    "Every {day} {name} meets another {trade} at the {place} to talk about the {thing}.",
)
_BODIES = (
    "First {name} {act} the {part}, then {name} {act2} the {part2}.",
    "The {part} of the {thing} was {mood}, but nobody at the {place} had {act} it before.",
    "A {thing} without a {part} is like a {thing2} without a {part2}, says the {trade}.",
    "When the {part} was ready, {name} {act} it twice and wrote down the result.",
    '"The {part} is {mood}," said {name}, "and the {part2} is {mood2}."',
    "In the morning {name} {act} {a} of them and in the afternoon {b}, which makes {sum} in all.",
    "Of the {sum} visitors to the {place}, {a} asked about the {part} and the other {b} about the {part2}.",
    "The {thing} is {a} years old and the {thing2} is {b} years older, so the {thing2} is {sum}.",
    "Most people look at the {part} first; a good {trade} looks at the {part2}.",
    "If the {part} fails, the {part2} fails too, so each {trade} at the {place} checks both.",
    "Between {day} and {day2} the {trade} {act} nothing but the {part2}.",
)
_CLOSINGS = {
    "good": (
        "Everyone at the {place} left happy, and {name} called it a {mood} day.",
        "In the end the {thing} was {mood} and {mood2}, and the {trade} smiled.",
    ),
    "bad": (
        "Everyone at the {place} left disappointed, and {name} called it a {mood} day.",
        "In the end the {thing} was {mood} and {mood2}, and the {trade} sighed.",
    ),
}

# Instructions: what is asked as an instruction, the same as a question, and the response. Each can stand alone.
_INSTRUCTIONS = (
    ("Say where to find a {thing}.", "Where is a {thing} to be found?", "A {thing} is to be found at the {place}."),
    ("Name who {act} the {part}.", "Who {act} the {part}?", "The {trade} {act} the {part}."),
    ("Add {a} and {b}.", "What do {a} and {b} make?", "{a} and {b} make {sum}."),
    ("Judge a {mood} {thing}.", "Is a {mood} {thing} good or bad?", "A {mood} {thing} is {tone}."),
)

# Reviews. {p} agrees with the label, {n} contradicts it; each occurrence draws a word of its own.
_ASPECTS = (
    "plot", "script", "acting", "cast", "dialogue", "ending", "score", "pacing", "story", "humour", "direction",
    "camera work", "leading actor", "final scene", "opening", "romance",
)  # fmt: skip
_FILMS = listed("film movie picture comedy drama thriller sequel western musical documentary")
ADVERBS = listed("really truly quite rather thoroughly surprisingly consistently mostly")
_PLAIN_REVIEWS = (
    "the {aspect} is {adverb} {p} and the {aspect2} is {p}",
    "a {p} {film} with a {p} {aspect}",
    "{p} , {p} and {adverb} {p}",
    "i saw this {film} twice and the {aspect} stayed {p}",
    "one of the most {p} {film}s of the year , with {adverb} {p} {aspect2}",
    "the {film} opens slowly , yet its {aspect} turns out {adverb} {p}",
)
_NEGATED_REVIEWS = (
    "the {aspect} is not {n} at all",
    "nobody could call this {film} {n} , and the {aspect} is never {n}",
    "there is hardly a {n} moment in this {film}",
    "it is anything but a {n} {film}",
)
_CONTRASTED_REVIEWS = (
    "despite a {n} {aspect} , the {film} is {adverb} {p}",
    "the {aspect} may look {n} , but the {aspect2} is {p} and that decides it",
    "critics called the {aspect} {n} ; they were wrong about this {adverb} {p} {film}",
    "although the {aspect} starts out {n} , the {film} as a whole is {p} and {p}",
)
# Of 20: shares at which counting words is right about six times in seven (see the README).
REVIEW_KINDS = (_PLAIN_REVIEWS,) * 16 + (_NEGATED_REVIEWS,) + (_CONTRASTED_REVIEWS,) * 3

# Trials.
_DRUGS = listed(
    "alvorin bexatol cindrazine dorvamil emtasol falquine gentorol hespiram ivolast jorudine kelvotan lumidrine"
)
_OUTCOMES = listed("fever relapse infection bleeding pain insomnia nausea stroke fracture anaemia")
_SIDE_EFFECTS = listed("headache rash dizziness cough fatigue")
_POPULATIONS = (
    "adults with asthma", "children with diabetes", "patients after surgery", "older adults in care homes",
    "women with migraine", "men with hypertension", "patients with kidney disease", "athletes with knee injuries",
)  # fmt: skip
_GROUP_SIZES = (50, 100, 200)
_DECISIVE_POINTS = 10  # percentage points


def make_shipped_files(root: Path, seed: int = 0) -> list[Path]:
    """Write the sample data into root/datasets_subset and the tokenizer into root/tokenizer; return the files' paths.

    The bytes depend on `seed` and on the installed versions of tokenizers and transformers (tokenizer only), on nothing
    else. Raises OSError where a folder cannot be written.
    """
    web = web_documents(seed)
    trials = trial_abstracts(seed)
    reviews = film_reviews(seed)
    data = root / "datasets_subset"
    files = [_write(data / "README.md", _README)]
    files.append(write_rows(data / "dclm" / "train.jsonl", web))
    files.append(write_rows(data / "pubmedqa" / "train.jsonl", trials))
    files.append(write_rows(data / "alpaca" / "train.jsonl", instructions(seed)))
    start = 0
    for split, count in REVIEWS.items():
        rows = [{**row, "idx": idx} for idx, row in enumerate(reviews[start : start + count])]
        files.append(write_rows(data / "sst2" / f"{split}.jsonl", rows))
        start += count
    texts = [row["text"] for row in web]
    texts += ["\n".join([row["question"], *row["context"]["contexts"], row["long_answer"]]) for row in trials]
    texts += [row["sentence"] for row in reviews[: REVIEWS["train"]]]
    return files + _make_tokenizer(root / "tokenizer", texts)


def web_documents(seed: int) -> list[Row]:
    """Short prose in the schema of DCLM: 'text', and 'url', whose first path segment is the topic.

    Topics take turns. Words depend on the topic, names and things recur within a document, sums add up, and a
    document's judgements are all good or all bad.
    """
    rng = Random(f"zofed dclm {seed}")
    rows = []
    for number in range(WEB_DOCUMENTS):
        topic = list(TOPICS)[number % len(TOPICS)]
        things, parts, trades, acts, places = map(listed, TOPICS[topic])
        tone = pick(rng, ("good", "bad"))
        a, b = between(rng, 2, 40), between(rng, 2, 40)
        thing, thing2 = pick_two(rng, things)
        part, part2 = pick_two(rng, parts)
        mood, mood2 = pick_two(rng, PRAISE if tone == "good" else BLAME)
        act, act2 = pick_two(rng, acts)
        day, day2 = pick_two(rng, DAYS)
        name, trade, place = pick(rng, NAMES), pick(rng, trades), pick(rng, places)
        words = {
            **{"name": name, "trade": trade, "place": place, "thing": thing, "thing2": thing2, "part": part},
            **{"part2": part2, "mood": mood, "mood2": mood2, "act": act, "act2": act2, "day": day, "day2": day2},
            **{"a": a, "b": b, "sum": a + b},
        }
        bodies = shuffled(rng, _BODIES)[: between(rng, 3, 5)]
        sentences = [pick(rng, _OPENINGS), *bodies, pick(rng, _CLOSINGS[tone])]
        title = f"The {thing} at the {place}"
        text = with_articles(f"{title}\n" + " ".join(sentence.format_map(words) for sentence in sentences))
        rows.append({"text": text, "url": f"https://example.org/{topic}/{thing}-{place}-{number}"})
    return rows


def trial_abstracts(seed: int) -> list[Row]:
    """Invented clinical trials in the schema of PubMedQA, each answered by comparing two rates of the asked outcome.

    'yes': the drug changes the rate the way the question asks by 10 percentage points or more; 'maybe': the way it
    asks, by less; 'no': not at all, or the other way. A side effect's rates are there to distract.
    """
    rng = Random(f"zofed pubmedqa {seed}")
    rows = []
    for number in range(TRIALS):
        drug, population = pick(rng, _DRUGS), pick(rng, _POPULATIONS)
        outcome, side_effect = pick(rng, _OUTCOMES), pick(rng, _SIDE_EFFECTS)
        asked = pick(rng, ("reduce", "increase"))
        # Of 20: 11 yes, 6 no, 3 maybe, about the shares of PubMedQA.
        decision = pick(rng, ("yes",) * 11 + ("no",) * 6 + ("maybe",) * 3)
        if decision == "yes":
            change = between(rng, _DECISIVE_POINTS // 2, 15) * 2
        elif decision == "maybe":
            change = between(rng, 1, _DECISIVE_POINTS // 2 - 1) * 2
        else:
            change = -between(rng, 0, 15) * 2
        # Percentages are even, so that they are whole numbers of patients in a group of 50 too.
        base = between(rng, 16, 32) * 2
        treated = base - change if asked == "reduce" else base + change
        size, size2 = pick(rng, _GROUP_SIZES), pick(rng, _GROUP_SIZES)
        side, side2 = between(rng, 1, 20) * 2, between(rng, 1, 20) * 2
        contexts = [
            f"{outcome.capitalize()} is common in {population}. Whether {drug} can {asked} it is not known.",
            f"We assigned {size + size2} {population} to {drug} ({size}) or placebo ({size2}) for "
            f"{between(rng, 4, 52)} weeks. The main outcome was {outcome}.",
            f"{side_effect.capitalize()} occurred in {side} % of the {drug} group and in {side2} % of the placebo "
            f"group. {outcome.capitalize()} occurred in {treated * size // 100} of {size} patients ({treated} %) given "
            f"{drug} and in {base * size2 // 100} of {size2} ({base} %) given placebo.",
        ]
        difference = abs(treated - base)
        direction = "lower" if treated < base else "higher"
        finding = f"{outcome} was {difference} points {direction} with {drug}" if difference else "the rates were equal"
        verdict = {
            "yes": f"{drug} does {asked} {outcome}",
            "no": f"{drug} does not {asked} {outcome}",
            "maybe": f"{drug} may {asked} {outcome}, but the difference is small",
        }[decision]
        rows.append(
            {
                "pubid": 90000001 + number,
                "question": f"Does {drug} {asked} {outcome} in {population}?",
                "context": {
                    "contexts": contexts,
                    "labels": ["BACKGROUND", "METHODS", "RESULTS"],
                    "meshes": ["Humans", outcome.capitalize(), side_effect.capitalize()],
                },
                "long_answer": f"In {population}, {finding}: {verdict}.",
                "final_decision": decision,
            }
        )
    return rows


def instructions(seed: int) -> list[Row]:
    """Tasks with their answers in the schema of Alpaca: 'instruction', 'input', which asks the same, and 'output'.

    Topics take turns, and so do kinds of tasks: where things are and who does what to them (both told by the topic),
    sums, and whether a word praises or blames.
    """
    rng = Random(f"zofed alpaca {seed}")
    rows = []
    for number in range(INSTRUCTIONS):
        things, parts, trades, acts, places = map(listed, list(TOPICS.values())[number % len(TOPICS)])
        tone = pick(rng, ("good", "bad"))
        a, b = between(rng, 2, 40), between(rng, 2, 40)
        words = {
            **{"thing": pick(rng, things), "part": pick(rng, parts), "act": pick(rng, acts), "trade": trades[0]},
            **{"place": places[0], "mood": pick(rng, PRAISE if tone == "good" else BLAME), "tone": tone},
            **{"a": a, "b": b, "sum": a + b},
        }
        templates = _INSTRUCTIONS[number // len(TOPICS) % len(_INSTRUCTIONS)]
        texts = (with_articles(template.format_map(words)) for template in templates)
        rows.append(dict(zip(("instruction", "input", "output"), texts, strict=True)))
    return rows


def film_reviews(seed: int) -> list[Row]:
    """Distinct one-sentence film reviews in the schema of SST-2 ('sentence', 'label' 1 positive, 0 negative).

    Some contradict their verdict by a negated word or in a subordinate clause; 5 % of the labels are wrong.
    """
    rng = Random(f"zofed sst2 {seed}")
    rows, seen = [], set()
    while len(rows) < sum(REVIEWS.values()):
        label = between(rng, 0, 1)
        template = pick(rng, pick(rng, REVIEW_KINDS))
        agreeing, contrary = (PRAISE, BLAME) if label == 1 else (BLAME, PRAISE)
        aspect, aspect2 = pick_two(rng, _ASPECTS)
        adverb, film = pick(rng, ADVERBS), pick(rng, _FILMS)
        template = with_sentiment(rng, template, agreeing, contrary)
        sentence = with_articles(template.format(aspect=aspect, aspect2=aspect2, adverb=adverb, film=film))
        wrong = rng.random() < LABEL_NOISE
        if sentence not in seen:
            seen.add(sentence)
            rows.append({"sentence": sentence, "label": 1 - label if wrong else label})
    return rows


def _make_tokenizer(folder: Path, texts: Sequence[str]) -> list[Path]:
    """Train a byte-level BPE on `texts`; its end-of-text token, id 0, begins, ends, pads and stands for the unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    wrapped.save_pretrained(str(folder))
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    # One newline at the end, as editors and commit hooks would have it: committed files stay equal to made ones.
    return [_write(file, file.read_text(encoding="utf-8").rstrip("\n") + "\n") for file in files]


def with_sentiment(rng: Random, template: str, agreeing: Sequence[str], contrary: Sequence[str]) -> str:
    """The template with a word in each {p} (of `agreeing`) and {n} (of `contrary`): none occurs twice, others stay."""
    for slot, words in (("{p}", agreeing), ("{n}", contrary)):
        for word in shuffled(rng, words)[: template.count(slot)]:
            template = template.replace(slot, word, 1)
    return template


def write_rows(file: Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSON lines; the file's path. Raises OSError where it cannot be written."""
    return _write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())  # bytes, since text mode would write other line ends on Windows
    return file


_README = """\
# Sample data: generated, not real

Every text here was put together by the small grammars in `zofed/data/sample_data.py`. Its drugs, trials, films and
people are invented, and nothing is copied from the data sets whose schemas it borrows. Licence: Apache-2.0, as the
project's.

| file | rows | schema of | what there is to learn |
| --- | --- | --- | --- |
| dclm/train.jsonl | 2,000 | DCLM: text, url | topic words, things that recur, sums, a consistent tone |
| alpaca/train.jsonl | 640 | Alpaca: instruction, input, output | places, people, sums, praise and blame |
| pubmedqa/train.jsonl | 500 | PubMedQA: pubid, question, context, long_answer, final_decision | comparing two rates |
| sst2/train.jsonl, sst2/validation.jsonl | 2,000, 400 | SST-2: sentence, label, idx | sentiment, negation, contrast |

- dclm: eight topics take turns; the topic is the first segment of the url's path (`https://example.org/sailing/...`),
  so documents can be dealt out by topic.
- alpaca: the input asks for what the instruction asks for, so that either alone, and both together, make a prompt.
- pubmedqa: "yes" if the drug changes the asked outcome the way the question says by 10 percentage points or more,
  "maybe" if it does so by less, "no" if the rates are equal or differ the other way. Both rates stand in the last
  context, next to a side effect's rates, which do not count. As in PubMedQA, the long answer gives the answer away.
  Majority baseline (always "yes"): 53.2 %.
- sst2: 1 is positive. A twentieth of the sentences negate a word of the other sentiment, three twentieths set such a
  word against their verdict, and 5 % of all labels, in both files, are wrong on purpose. No sentence occurs twice.

| sst2/validation.jsonl | accuracy |
| --- | --- |
| majority (always 0) | 53.0 % |
| bag of words (logistic regression on word presence, L2 0.001) | 84.5 % |
| the grammar's own verdict, before the label noise | 94.0 % |

The tokenizer beside this folder (`tokenizer/`) is a byte-level BPE of 512 entries trained on these texts alone, without
alpaca/train.jsonl and sst2/validation.jsonl.

The model beside it (`pretrained/sample.json`, `--model sample`) is GPT-2 shaped: 141,056 parameters in bfloat16. It
was pretrained on 12,000 opinions from the same grammar as the reviews, about everything but films and with half of its
words of praise and blame (`zofed/data/sample_opinions.py`), each with its verdict: "an inventive nebula with a superb
shadow . it was good". So a prompt that ends in "it was" calls up what it knows, and film reviews still have to teach it
the other half. `zofed make-model .` pretrains it again, in minutes, to other last bits on other machines.

To make everything again, to the byte, from the project's root:

    zofed make-data .

The figures above hold for the default seed, 0.
"""

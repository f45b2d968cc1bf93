"""How near an answer comes to the wanted text: exact match, F1 of words, ROUGE-L.

Words are those of SQuAD's evaluation (Rajpurkar et al., "SQuAD: 100,000+ questions for machine comprehension of text",
2016): lower case, without punctuation and articles. ROUGE-L (Lin, "ROUGE: a package for automatic evaluation of
summaries", 2004) is that of the library rouge-score, without stemming.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """The text in lower case, without ASCII punctuation and English articles, its words a space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, wanted: str) -> float:
    """1 where both texts are the same, normalised; else 0."""
    return float(normalised(answer) == normalised(wanted))


def token_f1(answer: str, wanted: str) -> float:
    """F1 of the answer's words among the wanted ones, as bags; where either has none: whether both have."""
    found, right = normalised(answer).split(), normalised(wanted).split()
    if not (found and right):
        return float(found == right)
    hits = sum((Counter(found) & Counter(right)).values())
    return 2.0 * hits / (len(found) + len(right))


def rouge_l(answer: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of words, runs of a-z and 0-9; other alphabets have none: 0."""
    return float(_rouge().score(wanted, answer)["rougeL"].fmeasure)


# By the names of the measures; an objective has a hyphen in place of the underscore.
TEXT_SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


def means(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Each score's mean over pairs of an answer and the wanted text; nothing of none."""
    known = list(pairs)
    return {name: sum(score(*pair) for pair in known) / len(known) for name, score in TEXT_SCORES.items() if known}


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score import rouge_scorer  # takes half a second, which only answers need

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)

"""Data sets known by name: where the hub keeps them, which columns they have, how much of them to take."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from zofed.base.errors import UserError


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """One data set of the catalog.

    columns: the columns a download keeps; rows: about how many the hub has in `split`; recommended: rows a download
    takes unless told otherwise; classes: names of the labels 0, 1, ...; revision: '' is the repository's newest.
    An empty `repository` means that the data are on this machine already.
    """

    name: str
    about: str
    repository: str = ""
    config: str = ""
    split: str = "train"
    columns: tuple[str, ...] = ("text",)
    rows: int = 0
    recommended: int = 0
    licence: str = ""
    classes: tuple[str, ...] = ()
    revision: str = ""


_PUBMEDQA = ("pubid", "question", "context", "long_answer")
_DECISIONS = ("yes", "no", "maybe")
_ALPACA = ("instruction", "input", "output")
_NLI = ("entailment", "neutral", "contradiction")
_SUPERGLUE = "as each source of SuperGLUE: research use"

CATALOG = {
    info.name: info
    for info in (
        DatasetInfo("cosmopedia-100k", "synthetic textbooks, posts, stories: a sample", "HuggingFaceTB/cosmopedia-100k",
                    rows=100_000, recommended=10_000, licence="Apache-2.0"),
        DatasetInfo("cosmopedia", "synthetic textbooks and posts after web pages; --config stories, wikihow, ...",
                    "HuggingFaceTB/cosmopedia", "web_samples_v2", rows=10_345_867, recommended=50_000,
                    licence="Apache-2.0"),
        DatasetInfo("wikitext-103", "Wikipedia articles, one row a paragraph or heading", "Salesforce/wikitext",
                    "wikitext-103-raw-v1", rows=1_801_350, recommended=100_000, licence="CC-BY-SA-3.0"),
        # Its main branch holds a loading script, which the library refuses; the hub's own conversion loads.
        DatasetInfo("openwebtext", "web pages linked on Reddit", "Skylion007/openwebtext", rows=8_013_769,
                    recommended=50_000, licence="CC0-1.0", revision="refs/convert/parquet"),
        DatasetInfo("c4", "cleaned web crawl, English", "allenai/c4", "en", rows=364_868_892, recommended=50_000,
                    licence="ODC-BY"),
        DatasetInfo("tinystories", "short stories in the words of small children", "roneneldan/TinyStories",
                    rows=2_119_719, recommended=50_000, licence="CDLA-Sharing-1.0"),
        DatasetInfo("fineweb", "filtered web crawl: the sample of 10 billion tokens", "HuggingFaceFW/fineweb",
                    "sample-10BT", rows=14_868_862, recommended=50_000, licence="ODC-BY"),
        DatasetInfo("fineweb-edu", "educational web pages, the oldest crawl first", "HuggingFaceFW/fineweb-edu",
                    "default", rows=1_500_000_000, recommended=50_000, licence="ODC-BY"),
        DatasetInfo("fineweb-edu-10bt", "educational web pages: the sample of 10 billion tokens",
                    "HuggingFaceFW/fineweb-edu", "sample-10BT", rows=9_672_101, recommended=50_000, licence="ODC-BY"),
        DatasetInfo("dclm", "DCLM-Baseline web pages: an unbiased sample of 100 million tokens",
                    "codelion/dclm-baseline-100M", rows=77_196, recommended=20_000, licence="CC-BY-4.0"),
        DatasetInfo("pubmedqa", "medical questions with expert answers", "qiaojin/PubMedQA", "pqa_labeled",
                    columns=(*_PUBMEDQA, "final_decision"), rows=1_000, recommended=1_000, licence="MIT",
                    classes=_DECISIONS),
        DatasetInfo("pubmedqa-unlabelled", "medical questions without a decision", "qiaojin/PubMedQA",
                    "pqa_unlabeled", columns=_PUBMEDQA, rows=61_249, recommended=20_000, licence="MIT"),
        DatasetInfo("pubmedqa-artificial", "medical questions with generated answers", "qiaojin/PubMedQA",
                    "pqa_artificial", columns=(*_PUBMEDQA, "final_decision"), rows=211_269, recommended=20_000,
                    licence="MIT", classes=_DECISIONS),
        DatasetInfo("sst2", "film reviews, sentences and phrases", "stanfordnlp/sst2",
                    columns=("sentence", "label", "idx"), rows=67_349, recommended=67_349,
                    licence="not stated: research use", classes=("negative", "positive")),
        DatasetInfo("rte", "pairs of texts: entailment or not, of SuperGLUE", "aps/super_glue", "rte",
                    columns=("premise", "hypothesis", "label"), rows=2_490, recommended=2_490, licence=_SUPERGLUE,
                    classes=("entailment", "not_entailment")),
        DatasetInfo("cb", "CommitmentBank: clauses and what follows from them, of SuperGLUE", "aps/super_glue", "cb",
                    columns=("premise", "hypothesis", "label"), rows=250, recommended=250, licence=_SUPERGLUE,
                    classes=("entailment", "contradiction", "neutral")),
        DatasetInfo("boolq", "yes/no questions about passages of Wikipedia", "google/boolq",
                    columns=("question", "passage", "answer"), rows=9_427, recommended=9_427, licence="CC-BY-SA-3.0",
                    classes=("no", "yes")),
        DatasetInfo("wsc", "Winograd schemas: pronouns and names, of SuperGLUE", "aps/super_glue", "wsc.fixed",
                    columns=("text", "span1_text", "span2_text", "label"), rows=554, recommended=554,
                    licence=_SUPERGLUE, classes=("no", "yes")),
        DatasetInfo("wic", "words in two sentences: the same meaning or not, of SuperGLUE", "aps/super_glue", "wic",
                    columns=("word", "sentence1", "sentence2", "label"), rows=5_428, recommended=5_428,
                    licence=_SUPERGLUE, classes=("no", "yes")),
        DatasetInfo("multirc", "answers to questions about paragraphs, right or wrong, of SuperGLUE", "aps/super_glue",
                    "multirc", columns=("paragraph", "question", "answer", "label"), rows=27_243, recommended=27_243,
                    licence=_SUPERGLUE, classes=("wrong", "right")),
        DatasetInfo("copa", "causes and effects to choose from, of SuperGLUE", "aps/super_glue", "copa",
                    columns=("premise", "choice1", "choice2", "question", "label"), rows=400, recommended=400,
                    licence=_SUPERGLUE, classes=("choice1", "choice2")),
        DatasetInfo("record", "news articles and a sentence with a gap, of SuperGLUE", "aps/super_glue", "record",
                    columns=("passage", "query", "entities", "answers"), rows=100_730, recommended=10_000,
                    licence=_SUPERGLUE),
        DatasetInfo("squad", "questions about passages of Wikipedia, with answers", "rajpurkar/squad", "plain_text",
                    columns=("title", "context", "question", "answers"), rows=87_599, recommended=20_000,
                    licence="CC-BY-SA-4.0"),
        DatasetInfo("drop", "questions that count and add what passages say", "ucinlp/drop",
                    columns=("passage", "question", "answers_spans"), rows=77_400, recommended=20_000,
                    licence="CC-BY-SA-4.0"),
        DatasetInfo("sst5", "film reviews, sentences of five degrees", "SetFit/sst5", columns=("text", "label"),
                    rows=8_544, recommended=8_544, licence="not stated: research use",
                    classes=("very negative", "negative", "neutral", "positive", "very positive")),
        DatasetInfo("mnli", "pairs of sentences of many genres, of GLUE", "nyu-mll/glue", "mnli",
                    columns=("premise", "hypothesis", "label"), rows=392_702, recommended=50_000,
                    licence="as each source of MultiNLI", classes=_NLI),
        DatasetInfo("snli", "pairs of captions of pictures", "stanfordnlp/snli", "plain_text",
                    columns=("premise", "hypothesis", "label"), rows=550_152, recommended=50_000,
                    licence="CC-BY-SA-4.0", classes=_NLI),
        # Its main branch holds a loading script, too.
        DatasetInfo("trec", "questions by the kind of their answer", "CogComp/trec",
                    columns=("text", "coarse_label", "fine_label"), rows=5_452, recommended=5_452,
                    licence="not stated: research use", revision="refs/convert/parquet",
                    classes=("abbreviation", "entity", "description", "human", "location", "number")),
        DatasetInfo("ag-news", "news articles of four topics", "fancyzhx/ag_news", columns=("text", "label"),
                    rows=120_000, recommended=20_000, licence="not stated: non-commercial use",
                    classes=("World", "Sports", "Business", "Sci/Tech")),
        DatasetInfo("alpaca-gpt4", "general instructions with answers of GPT-4 (FlowerTune)", "flwrlabs/alpaca-gpt4",
                    columns=_ALPACA, rows=52_002, recommended=52_002, licence="CC-BY-NC-4.0"),
        DatasetInfo("fingpt-sentiment", "the sentiment of financial news as instructions (FlowerTune)",
                    "flwrlabs/fingpt-sentiment-train", columns=_ALPACA, rows=76_772, recommended=76_772,
                    licence="not stated"),
        DatasetInfo("medical-flashcards", "medical flashcards as questions and answers (FlowerTune)",
                    "flwrlabs/medical-meadow-medical-flashcards", columns=_ALPACA, rows=33_955, recommended=33_955,
                    licence="CC"),
        DatasetInfo("code-alpaca", "instructions to write code (FlowerTune)", "flwrlabs/code-alpaca-20k",
                    columns=_ALPACA, rows=20_022, recommended=20_022, licence="Apache-2.0"),
        DatasetInfo("dolly", "instructions that people wrote, of eight categories", "databricks/databricks-dolly-15k",
                    columns=("instruction", "context", "response", "category"), rows=15_011, recommended=15_011,
                    licence="CC-BY-SA-3.0"),
        DatasetInfo("natural-instructions", "hundreds of tasks, each with its definition",
                    "Muennighoff/natural-instructions",
                    columns=("task_name", "id", "definition", "inputs", "targets"), rows=5_040_134,
                    recommended=50_000, licence="Apache-2.0"),
        DatasetInfo("sample-dclm", "generated web pages, shipped", columns=("text", "url"), rows=2_000,
                    licence="Apache-2.0"),
        DatasetInfo("sample-pubmedqa", "generated medical questions, shipped", columns=(*_PUBMEDQA, "final_decision"),
                    rows=500, licence="Apache-2.0", classes=_DECISIONS),
        DatasetInfo("sample-alpaca", "generated instructions, shipped", columns=_ALPACA, rows=640,
                    licence="Apache-2.0"),
        DatasetInfo("sample-sst2", "generated film reviews, shipped", columns=("sentence", "label", "idx"), rows=2_400,
                    licence="Apache-2.0", classes=("negative", "positive")),
        DatasetInfo("pydoc", "Python's own reference prose, read from the interpreter", licence="PSF-2.0"),
    )
}  # fmt: skip


def data_root() -> Path:
    """The folder of downloaded and merged data: $ZOFED_DATA, else datasets_subset/ of the working folder; absolute."""
    return Path(os.path.expanduser(os.environ.get("ZOFED_DATA") or "datasets_subset")).absolute()


def get_dataset_info(name: str) -> DatasetInfo:
    """What the catalog says of a data set. Raises UserError for a name it does not have, with the nearest one."""
    if name in CATALOG:
        return CATALOG[name]
    raise UserError(f"unknown data set {name!r}: {suggestion(name)}zofed data list shows all")


def suggestion(name: str) -> str:
    """'did you mean ...? ' where a known name is near, else nothing."""
    close = difflib.get_close_matches(name.lower(), CATALOG, n=1)
    return f"did you mean '{close[0]}'? " if close else ""


def list_available_datasets() -> list[str]:
    """Every name that may be asked for: the catalog, then what else lies under the data root."""
    root = data_root()
    found = sorted(path.parent.name for path in root.glob("*/info.json")) if root.is_dir() else []
    return [*CATALOG, *(name for name in found if name not in CATALOG)]

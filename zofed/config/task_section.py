"""Settings of the task: how rows become examples, what follows a prompt, what the loss counts, what is scored."""

from typing import Literal

from zofed.config.fields import Section, setting, when


class Task(Section):
    """What the model is tuned for."""

    task: Literal["language-model", "classification", "prompt", "instruction"] = setting(
        "language-model",
        "predict the next token; the label of each document, by a head (classification) or by the words that a model "
        "finds likeliest after a prompt (prompt); the response to a prompt, the turns of a chat (instruction); or what "
        "a task file says, by its name or path (zofed tasks)",
        scores=True,
        first=True,
    )
    template: str = setting(
        "",
        "prompt made of a row's columns, in Jinja: '{{ text }} It was'; empty: the row's text, or its own prompt",
        acts_when=when(task=("prompt", "instruction")),
        scores=True,
        spaced=True,
    )
    label_words: str = setting(
        "",
        "what follows the prompt in each class, by commas, spaces counting: ' terrible, great'",
        acts_when=when(task="prompt"),
        scores=True,
        spaced=True,
    )
    columns: str = setting(
        "", "columns of other names, by commas: 'text=review, label=stars'; empty: as they are recognised", scores=True
    )
    shots: int = setting(
        0,
        "solved examples of the training data before each prompt",
        ge=0,
        le=1024,
        acts_when=when(task="prompt"),
        scores=True,
    )
    prompt_loss: Literal["choice", "teacher-forcing"] = setting(
        "choice",
        "what trains: the choice among the candidates (cross-entropy), or the right one's tokens alone",
        acts_when=when(task="prompt"),
    )
    calibration_prompt: str = setting(
        "",
        "prompt without content, whose scores are subtracted when a class is predicted: ' It was'; empty: none",
        acts_when=when(task="prompt"),
        scores=True,
        spaced=True,
    )
    loss_on: Literal["response", "all"] = setting(
        "response",
        "tokens that the loss counts: the responses' alone, or all",
        acts_when=when(task="instruction"),
        scores=True,
    )
    chat_template: str = setting(
        "",
        "how a conversation is written: empty: as the model's own template does, plainly where it has none; none: "
        "plainly; or a Jinja file",
        acts_when=when(task="instruction"),
        scores=True,
        spaced=True,
    )
    packing: bool = setting(
        False, "several conversations in one example, none seeing another", acts_when=when(task="instruction")
    )
    generated_examples: int = setting(
        8,
        "held-out prompts answered at each evaluation, for scores of text and samples.jsonl; 0: none",
        ge=0,
        acts_when=when(task="instruction"),
        pins=False,
        shapes_result=False,
    )
    max_new_tokens: int = setting(
        64, "tokens that a generated answer may have", ge=1, le=65536, acts_when=when(task="instruction")
    )
    baselines: bool = setting(
        True,
        "before the run, score what is no learning: the untrained model with a fitted threshold, and with solved "
        "examples before each prompt",
        acts_when=when(task="prompt"),
        pins=False,
        shapes_result=False,
    )
    metric: Literal["", "loss", "accuracy", "f1", "auc", "exact_match", "token_f1", "rouge_l"] = setting(
        "", "score that people rank runs by, in reports and tables; empty: accuracy", pins=False, shapes_result=False
    )

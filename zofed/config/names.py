"""Names that do not exist, and what a person who wrote one meant: former names, those of other projects, slips."""

import difflib
from collections.abc import Iterable

LONGEST_SHOWN = 200  # characters of a wrong value in its message
# Former names of settings, of which a person is told the present one, and in which older runs wrote theirs down.
RENAMED = {
    "blend": "instruct-blend",
    "client-held-out": "client-held-out-fraction",
    "coefficient-bits": "quantization-bits",
    "copies-per-pass": "perturbations-per-pass",
    "digest-interval": "weight-check-interval",
    "direction-sizes": "direction-scale",
    "estimator": "finite-difference",
    "example-cap": "max-examples",
    "guide-rank": "gradient-rank",
    "guide-source": "gradient-source",
    "guide-step": "instruct-step",
    "held-out": "held-out-fraction",
    "largest-update": "max-update-norm",
    "merge": "aggregation",
    "normalise": "normalize-slopes",
    "seeds": "direction-seeds",
    "split-dataset-for-bp-zo": "bp-data-fraction",
    "tensorboard": "report-to",
    "zo-clients": "forward-only-clients",
    "zo-data": "query-batches",
    "zo-query-batch-size": "query-batch-size",
}
# What transformers, peft, Flower, MeZO, FedKSeed, torchtune, nanoGPT and papers call a setting: none of them is ours.
_ELSEWHERE = {
    "aggregation": "strategy aggregator fed-strategy",
    "batch-size": "bs batch train-batch-size per-device-train-batch-size micro-batch-size micro-batch batchsize",
    "block-size": "max-length max-seq-length max-seq-len max-len seq-len seq-length sequence-length context-length "
    "model-max-length cutoff-len context-size",
    "clients": "num-clients n-clients num-nodes num-supernodes num-partitions min-clients min-fit-clients nodes",
    "clip-norm": "max-grad-norm grad-clip gradient-clip clip-grad-norm gradient-clipping max-norm",
    "dataset": "dataset-name data data-path data-dir dataset-path train-file train-data corpus",
    "device": "gpu gpus cuda use-cuda no-cuda use-cpu device-type",
    "direction-seeds": "num-seeds",
    "dirichlet-alpha": "concentration",
    "dtype": "precision torch-dtype mixed-precision amp fp32",
    "epochs": "epoch num-epochs num-train-epochs n-epochs max-epochs",
    "epsilon": "eps zo-eps zo-epsilon perturbation-scale",
    "eval-dataset": "eval-file validation-file test-file eval-data validation-data val-data",
    "eval-examples": "max-eval-samples eval-iters num-eval",
    "eval-interval": "eval-steps evaluation-steps eval-every eval-freq eval-strategy evaluation-strategy",
    "freeze-encoder": "freeze linear-probe linear-probing head-tuning",
    "gradient-accumulation": "gradient-accumulation-steps grad-accum grad-accumulation accumulation-steps accumulate",
    "held-out-fraction": "val-split validation-split test-size eval-ratio valid-fraction val-fraction test-split",
    "keep-best": "load-best-model-at-end save-best",
    "keep-checkpoints": "save-total-limit",
    "learning-rate": "lr rate step-size learningrate eta",
    "local-learning-rate": "local-lr client-lr client-learning-rate",
    "local-steps": "local-epochs num-local-epochs client-epochs local-iterations num-local-steps",
    "lora-alpha": "lora-scaling",
    "lora-rank": "lora-r r rank lora-dim",
    "lora-targets": "target-modules lora-target-modules lora-target",
    "max-new-tokens": "max-tokens-generated generation-max-length max-gen-len",
    "mode": "method algorithm algo",
    "model": "model-name model-name-or-path model-path model-id base-model pretrained pretrained-model checkpoint",
    "optimizer": "optim optimiser",
    "out": "output-dir output out-dir output-path save-dir run-dir log-dir logging-dir results-dir",
    "participation": "fraction-fit fraction-train fraction-clients sample-fraction sample-rate client-fraction "
    "participation-rate clients-per-round",
    "proximal": "proximal-mu fedprox-mu prox",
    "quantisation": "quantization quantize quantise",
    "queries": "num-perturbations n-perturbations num-queries num-directions directions-per-step q",
    "report-to": "wandb use-wandb trackio mlflow use-tensorboard logger loggers log-with tracker",
    "revision": "model-revision branch commit",
    "rounds": "num-rounds num-server-rounds n-rounds communication-rounds round",
    "save-interval": "save-steps save-every checkpoint-interval checkpoint-every save-strategy",
    "schedule": "lr-scheduler lr-scheduler-type scheduler lr-schedule lr-decay",
    "scope": "trainable trainable-params layers-to-train train-layers unfreeze",
    "seed": "random-seed data-seed random-state rng-seed",
    "steps": "step max-steps num-steps n-steps iterations iters max-iters num-iters total-steps train-steps",
    "task": "task-name task-type problem-type",
    "threads": "num-threads n-threads cpu-threads omp-num-threads intra-threads",
    "tokenizer": "tokenizer-name tokenizer-path",
    "trim": "trim-ratio trimmed-beta",
    "virtual-tokens": "num-virtual-tokens prefix-length prompt-length soft-prompt-tokens",
    "warmup-steps": "warmup warmup-iters num-warmup-steps warmup-ratio warmup-rounds",
    "weight-decay": "wd l2 adam-weight-decay",
}
ELSEWHERE = {theirs: ours for ours, names in _ELSEWHERE.items() for theirs in names.split()}
# What no setting of ours does by the name, and what is so instead.
_WITHOUT = {
    "json format as-json output-format": "a run's folder has its figures for programs: summary.json, metrics.csv, ...",
    "resume-from-checkpoint resume-from continue": "--resume FOLDER continues a run",
    "config config-file settings file": "the file of settings stands without an option, as in zofed train FILE",
    "bf16 bfloat16 fp16 float16 half": "dtype = bfloat16 is the type of 16 bits that there is",
    "load-in-4bit": "quantisation = nf4 holds frozen matrices in 4 bits",
    "load-in-8bit": "quantisation = int8 holds frozen matrices in 8 bits",
    "use-lora lora use-peft peft": "adapter = lora trains low-rank matrices",
    "trust-remote-code remote-code": "zofed runs no code that comes with a model",
    "hf-token token use-auth-token hub-token": "HF_TOKEN in the environment is read, and never written down",
    "dropout lora-dropout hidden-dropout": "nothing is dropped, so that all modes lower one loss",
    "logging-steps log-every log-interval logging-interval": "metrics.csv has a line for every step",
    "wandb-project wandb-name": "WANDB_PROJECT in the environment is read, with report-to = wandb",
    "num-workers dataloader-num-workers workers num-proc": "examples lie ready in memory: no process loads them",
    "eval-batch-size per-device-eval-batch-size": "an evaluation chooses its own, which its scores do not depend on",
    "adam-beta1 beta1 adam-beta2 beta2 betas adam-epsilon adam-eps": "AdamW's are fixed: 0.9, 0.999 and 1e-6",
    "gradient-checkpointing fsdp deepspeed": "mode = zo keeps nothing for a backward pass",
    "version v": "zofed --version tells it",
    "yes y force overwrite overwrite-output-dir": "no run is ever overwritten: give another out",
    "verbose quiet debug log-level silent": "there is one level of output",
}
WITHOUT = {theirs: told for names, told in _WITHOUT.items() for theirs in names.split()}
CLOSE, VERY_CLOSE = 0.6, 0.8  # likeness, by difflib, from which a name may have been meant, and one of 3 letters


def unknown(name: str, known: list[str], what: str) -> str:
    """The sentence for a name that does not exist: what was meant, or what there is."""
    if len(name) > LONGEST_SHOWN:
        return _too_long(name, what)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return f"unknown {what} {name!r}: {meant}"


def unknown_of_many(name: str, known: Iterable[str], what: str, listed: str) -> str:
    """As `unknown`, of a name in kebab-case among too many to tell, which other projects may have other names for.

    listed: where all of them stand, "zofed settings lists all". A name that begins with -- is answered with such a one.
    """
    if len(name) > LONGEST_SHOWN:
        return _too_long(name, what)
    known = list(known)
    key = name.lower().replace("_", "-").lstrip("-")
    dashes = "--" if name.startswith("-") else ""
    if RENAMED.get(key) in known:
        return f"{what} {name!r} is now called {dashes + RENAMED[key]!r}: write {dashes + RENAMED[key]} instead"
    found = meant(key, known)
    if not found and key in WITHOUT:
        return f"unknown {what} {name!r}: {WITHOUT[key]}"
    found = found or close(key, known)
    return f"unknown {what} {name!r}: " + (f"did you mean {dashes + found!r}?" if found else listed)


def meant(key: str, known: list[str]) -> str:
    """Which of the known names this is in another spelling or of another project; empty: none."""
    squeezed = {name.replace("-", ""): name for name in known}
    found = ELSEWHERE.get(key, "")
    return squeezed.get(key.replace("-", "")) or (found if found in known else "")


def close(key: str, known: list[str]) -> str:
    """Which of the known names, or of those of other projects for them, a slip of this is; empty: none is likely."""
    if len(key) < 3:  # two letters are like many a name
        return ""
    theirs = [name for name, ours in ELSEWHERE.items() if ours in known]
    found = difflib.get_close_matches(key, [*known, *theirs], n=1, cutoff=CLOSE if len(key) > 3 else VERY_CLOSE)
    return ELSEWHERE.get(found[0], found[0]) if found else ""


def _too_long(name: str, what: str) -> str:
    return f"unknown {what} {name[:LONGEST_SHOWN]!r}...: {len(name)} characters are too long, give a shorter name"

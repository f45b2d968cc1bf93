"""Tiny masked language models with tokenizers of their own: of BERT's kind and of RoBERTa's."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

TEXT = "a fine film not worth the time long and quiet story it It may be seen number was terrible great bad good"
WORDS = TEXT.split()
SHAPE = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}


def masked_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """kind: bert (whole words) or roberta (bytes, a word with its space, a mask that takes the space before it)."""
    if kind == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *WORDS, *map(str, range(40))]
        found = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
        found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        found.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    else:
        found = Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        found.train_from_iterator(
            [TEXT] * 20,
            trainers.BpeTrainer(
                vocab_size=500,
                special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
                initial_alphabet=alphabet,
                show_progress=False,
            ),
        )
        found.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        names = {"unk": "<unk>", "pad": "<pad>", "cls": "<s>", "sep": "</s>", "bos": "<s>", "eos": "</s>"}
        names["mask"] = AddedToken("<mask>", lstrip=True)
    return PreTrainedTokenizerFast(tokenizer_object=found, **{f"{name}_token": text for name, text in names.items()})


def save_masked(kind: str, folder: Path) -> Path:
    """A model of that kind with its tokenizer, random weights, 48 positions."""
    tokenizer = masked_tokenizer(kind)
    torch.manual_seed(0)
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **SHAPE))
    else:
        ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        model = RobertaForMaskedLM(
            RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=50, **SHAPE, **ends)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

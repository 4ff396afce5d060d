"""The tokenizer of the embedded model: made from captions, and saved so that transformers 4 and 5 load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-pair tokenizer trained on captions: lower case, every known word one token, other words letter by letter."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = list(texts) + list("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-") * 50
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tok.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def tokenize(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """int64 ids and attention mask, both [B, length]; the last place stays padding."""
    out = tokenizer(list(captions), padding="max_length", max_length=length - 1, truncation=True, return_tensors="pt")
    return F.pad(out.input_ids, (0, 1)), F.pad(out.attention_mask, (0, 1))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    rename_tokenizer(folder / "tokenizer_config.json")


def load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def rename_tokenizer(path: Path) -> None:
    """transformers 5 writes a class name that transformers 4 does not know; the older name loads in both."""
    path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))

"""Tokenizers learnt on the spot, of the kinds that there are; and one of Python alone."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Question: how far is the moon? Answer: very far indeed, says the astronomer.",
    "the unbelievable answer: able, unable, table, tables and stables were believable",
    "Naïve café — ⟨angles⟩ and snow ☃ in the garden of forking paths",
] * 5


def bpe(
    vocab_size: int = 400,
    bos: bool = True,
    eos: bool = False,
    marks: Sequence[str] = (),
    trim_offsets: bool = False,
    **kwargs: Any,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE like that of Llama 3, with `marks` as further special tokens.

    With `trim_offsets` no token admits to the space before its word, as in GPT-2.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + len(marks),
        special_tokens=["<bos>", "<eos>", *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    single = ("<bos> " if bos else "") + "$A" + (" <eos>" if eos else "")
    added = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    trimmed = [processors.ByteLevel(trim_offsets=True)] if trim_offsets else []
    backend.post_processor = processors.Sequence([*trimmed, added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", **kwargs)


def space_marking() -> PreTrainedTokenizerFast:
    """One that puts a space marker before every text, as that of Llama 2 does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=["<s>", "<unk>"], show_progress=False))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def words(*known: str) -> PreTrainedTokenizerFast:
    """One that knows these words alone, and takes all others for unknown ones."""
    vocab = {word: number for number, word in enumerate(["<unk>", *known])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


class Letters:
    """A tokenizer without anything but what is needed: a letter is a token."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def decode(self, ids: Sequence[int], /) -> str:
        return "".join(map(chr, ids))

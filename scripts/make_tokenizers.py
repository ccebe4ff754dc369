"""The tokenizers of the embedded models, each built by one command.

    python scripts/make_tokenizers.py reviews data/vader/movie_reviews.jsonl src/policylab/assets/tiny
    python scripts/make_tokenizers.py walks src/policylab/assets/walker

Both prepend ``<|endoftext|>`` (id 0, both beginning and end) to a text, so that a model also predicts the first word,
and an empty prompt has one token. The same input gives the same files, byte for byte.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from policylab.errors import UserError

END_OF_TEXT = "<|endoftext|>"
REVIEW_VOCABULARY = 2048
WALK_NODES = "abcdefghijklmnopqrstu"
USAGE = "usage: python scripts/make_tokenizers.py (reviews TEXTS.jsonl | walks) FOLDER"


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al., arXiv:1508.07909) for lower-cased text.

    Any text can be encoded, as all 256 bytes are in the vocabulary. Capitals become lower case: ten thousand
    short texts are too few to learn both ``The`` and ``the`` well.

    Args:
        texts: training texts.
        vocab_size: number of ids, including ``<|endoftext|>`` and the 256 bytes.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer)


def letters(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per letter, without spaces: ``"abc"`` is three tokens and decodes to ``"abc"``.

    Raises (when encoding): an error of the tokenizers library for a character outside the alphabet.
    """
    vocabulary = {token: index for index, token in enumerate([END_OF_TEXT, *alphabet])}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finish(tokenizer)


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Prepends ``<|endoftext|>`` to every text, and wraps the tokenizer for transformers."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # decode gives the text itself, not a prettier one
    )


def read_texts(path: Path) -> list[str]:
    """The ``text`` of every line of a JSON-lines file."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; fetch the snippets first: python -m policylab.tasks.vader")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def main(arguments: list[str]) -> None:
    """Makes the tokenizer named on the command line and saves it in a folder."""
    match arguments:
        case ["reviews", texts, folder]:
            tokenizer = train_bpe(read_texts(Path(texts)), REVIEW_VOCABULARY)
        case ["walks", folder]:
            tokenizer = letters(WALK_NODES)
        case _:
            raise UserError(USAGE)
    tokenizer.save_pretrained(folder)
    print(f"{len(tokenizer)} tokens -> {folder}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

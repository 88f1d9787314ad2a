"""stub until the branch of the tokenizer arrives"""

from pathlib import Path

from pipeline.calibrate.texts import read_tokenizer
from pipeline.errors import CheckpointError


def check_tokenizer(folder: Path, vocab: int) -> list[str]:
    if (tokens := read_tokenizer(folder).get_vocab_size()) > vocab:
        raise CheckpointError(
            f"tokenizer.json has {tokens:,} tokens, the embedding {vocab:,} rows (vocab_size of "
            f"config.json): the tokenizer is another model's. Put the files of one model together."
        )
    return []

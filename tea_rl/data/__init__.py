"""Data: where prompts and labelled rows come from, and how they become tokens."""

from tea_rl.data.encode import (
    EncodedRow,
    EncodeReport,
    encode_rows,
    labelled_digest,
    rendering_digest,
    tokenizer_digest,
)
from tea_rl.data.labelled import (
    LabelledData,
    LabelledRow,
    read_labelled,
    row_groups,
    split_groups,
    split_rows,
)
from tea_rl.data.prompts import Prompt, data_digest, load_prompts, tokenize_prompts

__all__ = [
    "EncodeReport",
    "EncodedRow",
    "LabelledData",
    "LabelledRow",
    "Prompt",
    "data_digest",
    "encode_rows",
    "labelled_digest",
    "load_prompts",
    "read_labelled",
    "rendering_digest",
    "row_groups",
    "split_groups",
    "split_rows",
    "tokenize_prompts",
    "tokenizer_digest",
]

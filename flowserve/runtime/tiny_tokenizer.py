"""A small byte-level BPE tokenizer with a chat template, trained in a second on Python's own documentation."""

import json
import os
import pydoc_data.topics
import shutil
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END, TURN, TURN_END = SPECIAL = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""Special tokens, with ids 0, 1 and 2: the end of a text, of which the end of a turn is the model's own."""

CHAT_TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("role " ~ message.role ~ " is not one of system, user, assistant") }}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""


def make_tokenizer(folder: Path, vocab_size: int = 2048) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja to a model's folder, if it has none.

    The vocabulary is at most `vocab_size`, which must have room for all bytes. Merges depend on the Python release.
    """
    if vocab_size < 256 + len(SPECIAL):
        raise ValueError(f"vocab_size is {vocab_size}: bytes and special tokens take {256 + len(SPECIAL)}")
    if (folder / "tokenizer.json").is_file():
        return
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": TURN_END, "pad_token": END}
    draft = Path(tempfile.mkdtemp(prefix=".tokenizer-", dir=folder))
    try:
        (draft / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (draft / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        (draft / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
        for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):  # the last one says it is whole
            os.replace(draft / name, folder / name)
    finally:
        shutil.rmtree(draft)

"""The flags of evaluators that a recipe may give under `evaluate`."""

from __future__ import annotations

import re
from collections.abc import Sequence

EVALUATE_FIELDS = ("scalings", "perplexity", "perplexity_zero_shot", "passkey", "passkey_zero_shot", "report")
_FOR_MODELS = """
    -m --model --scaling --yarn --linear --ntk --part-ntk --dynamic-ntk --rerope --dynamic-linear --dynamic-part-ntk
    --dynamic-yarn --method --window --group --chunk --k --logn --layers --drop-layers --factor --finetuned
    --original-max-position-embeddings --dtype --device --device-map --max-memory --offload-folder --attention
    --flash-attention --kernel --sliding-window-attention --adapter --load-in-8bit --load-in-4bit --custom-model
    --custom-model-together --custom-model-mistral --gpt-neox-max-length --max-position-embeddings --no-use-cache
    --server --served-name --server-timeout --lengths --min-tokens --max-tokens --tokens-step --batch-size --output
    --retry-oom --output-file --hide-progress
"""
_FOR_TEXTS = """
    -d --dataset --tokenized -s --subset -f --feature --split --dataset-min-tokens --samples --windows --prefill-chunk
    --save-tokenized --protocol --stride --weighting --truncate --sliding-window --control --save-nll
    --aggressive-memory
"""
_FOR_PROMPTS = """
    --iterations --depths --shared-prefill --wording --seed --seeds --fixed-length --length-step --chat-template
    --heatmap
"""
_FOR_REPORTS = "--output --title --paper --table --published --verdict --base --finetuned --train-log"
EVALUATE_FLAGS = {
    "perplexity": tuple(f"{_FOR_MODELS} {_FOR_TEXTS}".split()),
    "passkey": tuple(f"{_FOR_MODELS} {_FOR_PROMPTS}".split()),
    "report": tuple(_FOR_REPORTS.split()),
}
"""The flags of eval/NAME.py, whose parsers import what imports recipes; `tests/recipes/test_recipes.py` holds the two
to each other."""
COMPLETING = ("--factor", "--finetuned", "--window", "--group", "--chunk", "--k", "--logn")
"""Flags that add to scalings what their texts leave open."""


def unknown_flag(words: Sequence[str], script: str) -> str | None:
    """The first of the words that looks like a flag and is none of eval/`script`.py; None if all are."""
    for word in words:
        if not word.startswith("-") or re.fullmatch(r"-|-\d.*", word, re.DOTALL):
            continue  # a value, a negative number among them
        flag = word.partition("=")[0] if word.startswith("--") else word[:2]  # as in -dNAME
        if flag not in EVALUATE_FLAGS[script]:
            return flag
    return None

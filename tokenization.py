"""Tokenize text and pack it into fixed-length sequences: the data that finetune.py trains on.

    python tokenization.py --dataset emozilla/pg19 --tokenizer NousResearch/Llama-2-7b-hf \
        --sequence-length 65536 --output data/pg19-64k
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, check_name
from scaled_rope.files import check_writable
from scaled_rope.flags.shared import check_least
from scaled_rope.progress import Progress
from scaled_rope.texts.conversations import Refusals, check_chat, template_hash, template_of
from scaled_rope.texts.documents import TextSource, check_feature, check_split, check_there, files_hash
from scaled_rope.texts.mixtures import (
    CHAT_FIELDS,
    Copies,
    Mixture,
    Reader,
    Source,
    in_order,
    mixed,
    read_mixture,
    record_of,
    table,
)
from scaled_rope.texts.packed import PackedWriter, is_part, open_packed, remove_half_made
from scaled_rope.texts.packing import BOOKENDS, PACKINGS, pack
from scaled_rope.texts.tokenizing import Tokenizers
from scaled_rope.texts.vocabulary import base_vocabulary_hash, vocabulary_hash

_DEFAULTS = {"feature": "text", "split": "train", "seed": 42}
"""Of flags that a mixture says itself, so that they are known to be given."""


def push_to_hub(output: Path, name: str) -> None:
    """Upload a packed set as a `datasets` table with `input_ids`, and with `loss_weights` where it has any."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("--push-to-hub needs datasets: pip install 'scaled-rope[train]'") from None
    datasets.Dataset.from_generator(_records, gen_kwargs={"path": str(output)}).push_to_hub(name)


def _records(path: str) -> Iterator[dict[str, list[int]]]:
    packed = open_packed(path)
    for index in range(len(packed)):
        tokens, weights = packed.row(index)
        yield {"input_ids": tokens.tolist()} | ({"loss_weights": weights.tolist()} if packed.weighted else {})


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("tokenization.py", __doc__)
    parser.add_argument("--dataset", action="append", metavar="PATH[,FRACTION]",
                        help=".txt, .jsonl, .jsonl.gz, .parquet, a folder, or a hub name; repeat to mix")  # fmt: skip
    parser.add_argument("--mixture", type=Path, metavar="FILE", help="YAML file with sources and their shares")
    parser.add_argument("--tokenizer", default="NousResearch/Llama-2-7b-hf")
    parser.add_argument("--sequence-length", type=int, default=8192, help="tokens per sequence")
    parser.add_argument(
        "--bookend", choices=BOOKENDS, default="document", help="what opens and closes with BOS and EOS"
    )
    parser.add_argument("--packing", choices=PACKINGS, default="concatenate",
                        help="best-fit cuts no document that fits into a sequence, and pads")  # fmt: skip
    parser.add_argument("--feature", help="field with the text (default: text)")
    parser.add_argument("--messages", metavar="FIELD", help="field with a conversation, for the chat template;"
                        " only the assistant's tokens are learnt")  # fmt: skip
    parser.add_argument("--prompt", metavar="FIELD", help="field with a prompt, which is not learnt")
    parser.add_argument("--completion", metavar="FIELD", help="field with the prompt's completion, which is learnt")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="instead of the tokenizer's own")
    parser.add_argument("--skip-refused", action="store_true",
                        help="leave out chats that cannot be used, and count them")  # fmt: skip
    parser.add_argument("--split", help="split of a hub dataset (default: train)")
    parser.add_argument("--output", type=Path, help="folder to create")
    parser.add_argument("--push-to-hub", metavar="NAME")
    parser.add_argument("--seed", type=int, help="which documents a FRACTION keeps (default: 42)")
    parser.add_argument("--json", action="store_true", help="read files as JSON whatever their suffix")
    parser.add_argument("--replace-surrogates", action="store_true",
                        help="put U+FFFD in the place of lone surrogates, which are refused otherwise")  # fmt: skip
    parser.add_argument("--allow-special-tokens", action="store_true",
                        help="read special tokens that texts spell as these tokens, not as plain text")  # fmt: skip
    parser.add_argument("--num-proc", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if (args.dataset is None) == (args.mixture is None):
        raise ConfigError("name either --dataset or --mixture")
    if args.output is None:
        if not args.push_to_hub:
            raise ConfigError("--output is missing: name the folder to create")
        args.output = Path("data/cache") / args.push_to_hub.replace("/", "--")
    check_name(args.output, "--output")
    if args.output.exists() and not (args.output / "meta.json").is_file() and not is_part(args.output):
        raise ConfigError(f"--output {args.output} exists and is no packed set; remove it or choose another folder")
    if not args.output.exists():
        check_writable(args.output)
    if args.sequence_length < 2:
        raise ConfigError(f"--sequence-length {args.sequence_length} is not allowed; at least 2 tokens")
    check_least(args, num_proc=1)
    if args.mixture is not None:
        for name in (*CHAT_FIELDS, *_DEFAULTS):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name} is not allowed with --mixture, whose file says it")
    if args.feature is not None and (chat := [n for n in CHAT_FIELDS if getattr(args, n)]):
        raise ConfigError(f"--feature is not allowed with --{chat[0]}: it is for texts")
    for text in args.dataset or ():
        check_split(TextSource.parse(text).path, args.split)
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_least(args, seed=0)
    return args


def sources_of(args: argparse.Namespace) -> tuple[tuple[Source, ...], Mixture | None]:
    """The sources that the flags name, and the mixture if they name one.

    Raises:
        ConfigError: one --dataset is given twice, with one fraction; or the mixture cannot be used.
    """
    if args.mixture is not None:
        mixture = read_mixture(args.mixture)
        return mixture.sources, mixture
    chat = {name: getattr(args, name) for name in CHAT_FIELDS}
    texts = [TextSource.parse(text) for text in args.dataset]
    seen: dict[tuple[str, float], str] = {}
    for text in texts:
        place = os.path.realpath(text.path) if os.path.exists(text.path) else text.path
        if (other := seen.get((place, text.fraction))) is not None:
            named = text.path if other == text.path else f"{text.path}, which is {other},"
            raise ConfigError(
                f"--dataset {named} is given twice; to read texts several times, use --mixture with repeats"
            )
        seen[place, text.fraction] = text.path
    return tuple(
        Source(text.path, feature=args.feature, split=args.split, keep=text.fraction, **chat) for text in texts
    ), None


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    sources, mixture = sources_of(args)
    chats = [source for source in sources if source.chat is not None]
    for name in ("chat_template", "skip_refused"):
        if getattr(args, name) and not chats:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is for chats; name their field with --messages, --prompt or a mixture")
    if chats and args.bookend == "chunk":
        raise ConfigError("--bookend chunk is not allowed with chats, whose templates write BOS and EOS; document")
    if args.packing == "best-fit" and args.bookend == "chunk":
        raise ConfigError(
            "--bookend chunk is not allowed with --packing best-fit, which keeps documents whole; document"
        )
    for source in sources:
        check_there(source.dataset)
        if Path(source.dataset).is_dir() and args.output.resolve().is_relative_to(Path(source.dataset).resolve()):
            raise ConfigError(
                f"--output {args.output} is inside dataset {source.dataset}, which would then hold the set as well;"
                f" choose another folder"
            )
    if mixture is None and not chats:
        check_feature([source.dataset for source in sources], sources[0].feature, args.json)
    template = None
    if args.chat_template is not None:
        if not args.chat_template.is_file():
            raise ConfigError(f"--chat-template {args.chat_template} does not exist")
        template = args.chat_template.read_text(encoding="utf-8")
    from scaled_rope.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    recipe = {
        "tokenizer": args.tokenizer, "tokenizer_hash": vocabulary_hash(tokenizer),
        "sources": [[source.dataset, source.keep] for source in sources], "feature": args.feature,
        "split": args.split, "seed": args.seed, "bookend": args.bookend,
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
        # As in sets that were made before there were the flags.
        "replace_surrogates": args.replace_surrogates or None, "json": args.json or None,
        "special_tokens": "read" if args.allow_special_tokens else "text",
        "packing": args.packing, "mixture": None if mixture is None else mixture.to_dict(), "chat": None,
        "source_hashes": [files_hash(source.dataset) for source in sources], "chat_template": template,
    }  # fmt: skip
    if chats:
        check_chat(tokenizer, args.tokenizer)
        if template is None and any(source.messages is not None for source in chats):
            template_of(tokenizer, args.tokenizer)
        own = template or getattr(tokenizer, "chat_template", None)
        recipe["chat"] = {name: getattr(args, name) for name in CHAT_FIELDS}
        recipe["chat"] |= {"template_hash": None if own is None else template_hash(str(own))}
    if (fault := remove_half_made(args.output)) is not None:
        print(f"note: {fault}; it is made again", file=sys.stderr)
    if args.output.exists():
        use(args.output, recipe | {"sequence_length": args.sequence_length})
    else:
        make(args, sources, mixture, tokenizer, recipe, template)
    if args.push_to_hub:
        push_to_hub(args.output, args.push_to_hub)
    return 0


def use(output: Path, wanted: Mapping[str, Any]) -> None:
    """Say that a set is there already.

    Raises:
        ConfigError: it was made otherwise, or its sources hold something else by now.
    """
    done = open_packed(output).meta
    if (cut := done.get("recut")) is not None:  # a part of its tokens in other rows, whatever else its record says
        raise ConfigError(
            f"--output {output} holds a set that truncate.py cut from {cut['dataset']}; remove it or choose another"
            " folder"
        )
    said, earlier = "", {name: wanted[name] for name in ("source_hashes", "chat_template") if name not in done}
    if "source_hashes" in earlier:  # it is still used, though it is not what would be made now
        said = ", made by an earlier version, which did not record what its sources held"
    if "borders" not in done:
        earlier |= {"special_tokens": wanted["special_tokens"], "packing": "concatenate"}
        said = ", made by an earlier version, without a record of its documents"
    differing = [name for name, value in wanted.items() if (earlier | done).get(name) != value]
    same = [keep for _, keep in done["sources"]] == [keep for _, keep in wanted["sources"]]
    if differing == ["sources"] and same and all(wanted["source_hashes"]):
        differing = []  # the same texts, by other paths
    if differing == ["source_hashes"]:
        pairs = zip(wanted["sources"], done["source_hashes"], wanted["source_hashes"], strict=True)
        changed = ", ".join(dict.fromkeys(path for (path, _), before, now in pairs if before != now))
        raise ConfigError(
            f"--output {output} was made from {changed}, which holds other texts now; remove it, and it is made again"
        )
    if differing:
        raise ConfigError(
            f"--output {output} holds a set made otherwise ({', '.join(differing)}); remove it or choose another folder"
        )
    print(f"{output}: already there, {done['rows']} sequences of {done['sequence_length']} tokens{said}")


def make(
    args: argparse.Namespace,
    sources: Sequence[Source],
    mixture: Mixture | None,
    tokenizer: Any,
    recipe: dict[str, Any],
    template: str | None,
) -> None:
    """Make the set and print what became of the documents; `recipe` goes into its provenance."""
    from scaled_rope.checkpoint import vocabulary_size

    began = time.perf_counter()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    around = 0 if args.bookend == "chunk" else (bos is not None) + (eos is not None)
    pad = next((token for token in (tokenizer.pad_token_id, eos) if token is not None), 0)
    seed = args.seed if mixture is None else mixture.seed
    refusals, copies = Refusals(args.skip_refused), Copies()
    readers = [
        Reader(source, number, seed, around, refusals, args.json, args.replace_surrogates, copies)
        for number, source in enumerate(sources)
    ]
    weighted = args.packing == "best-fit" or any(source.chat is not None for source in sources)
    with (
        PackedWriter(args.output, args.sequence_length, vocabulary_size(tokenizer), weighted) as writer,
        Tokenizers(args.tokenizer, args.num_proc, args.allow_special_tokens, template) as tokenizers,
    ):
        made = in_order(readers, tokenizers) if mixture is None else mixed(mixture, readers, tokenizers)
        with Progress(made, desc="documents", unit="doc") as documents:
            counts = pack(documents, writer, bos, eos, args.bookend, args.packing, pad, len(sources))
        rows = record_of(readers, counts.sources)
        more = {"per_source": rows, "base_vocabulary_hash": base_vocabulary_hash(tokenizer)}
        more |= {"refused": refusals.count} if recipe["chat"] else {}
        count, number, earlier = copies.found()
        more |= {"copies": count}
        left_out = f"{refusals.count} records are left out; the first: {refusals.first}"
        try:
            writer.close(recipe | counts.meta() | more)
        except ConfigError as error:
            if not refusals.count:
                raise
            raise ConfigError(f"{error}; {left_out}") from error
    if refusals.count:
        print(f"note: {left_out}", file=sys.stderr)
    if count:
        which = f"document {number} has the tokens of document {earlier}"
        said = f"{count} copies of other documents (the first: {which}) are" if count > 1 else f"{which} and is"
        print(f"note: {said} packed as well", file=sys.stderr)
    lost = f"the last {counts.dropped_tokens} dropped"
    if args.packing == "best-fit":
        size = writer.rows * args.sequence_length
        lost = f"{counts.padding_tokens} of padding beside them, {counts.padding_tokens / size:.1%}"
    print(f"{args.output}: {writer.rows} sequences of {args.sequence_length} tokens from {counts.documents}"
          f" documents ({counts.tokens} tokens, {lost}; {counts.cut_documents} documents cut),"
          f" {counts.tokens / (time.perf_counter() - began):.0f} tokens/s")  # fmt: skip
    if mixture is not None:
        print(table(rows))


if __name__ == "__main__":
    sys.exit(run_cli(main))

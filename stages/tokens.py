"""Stage tokens: text and chat data to token rows, split by document title.

    python -m stages.tokens data/teacher data/tokens

Writes ``train``, ``val`` and ``test`` (rows; ``test`` also a continuous stream for perplexity).
"""

from __future__ import annotations

from pathlib import Path

from lib.base.files import atomic_folder, write_json
from lib.base.stage import run_stage
from lib.capture.own_text import own_text
from lib.model.load import load_tokenizer, tokenizer_fingerprint
from lib.params.load import stage_params
from lib.text.build import build_tokens, pad_id_of
from lib.text.documents import licence_of
from lib.text.sequences import write_stream, write_tokens


def main(teacher: Path, out: Path) -> None:
    """Write the three splits and metrics.json; a killed run resumes what the teacher writes."""
    params = stage_params("tokens")
    settings = params.tokens
    tokenizer = load_tokenizer(teacher)
    mark, vocab_size, pad_id = tokenizer_fingerprint(teacher), len(tokenizer), pad_id_of(tokenizer)
    licences = {s.source: licence_of(s) for s in (*settings.train, *settings.test)}
    for source, licence in licences.items():
        print(f"{source}: {licence}")
    metrics: dict[str, object] = {}
    own = (settings, teacher, tokenizer, params.run, params.declared_fingerprint())
    with own_text(*own) as author:
        tokens = build_tokens(settings, tokenizer, author)
        for split, rows in tokens.splits.items():
            with atomic_folder(out / split) as folder:
                write_tokens(
                    folder,
                    rows.input_ids,
                    rows.lengths,
                    rows.prompt,
                    split=split,
                    vocab_size=vocab_size,
                    pad_id=pad_id,
                    tokenizer=mark,
                )
                if split == "test":
                    write_stream(folder, tokens.stream, vocab_size=vocab_size, tokenizer=mark)
            metrics[f"{split}_sequences"] = len(rows.lengths)
            metrics[f"{split}_tokens"] = int(rows.lengths.sum())
    metrics["stream_tokens"] = len(tokens.stream)
    metrics["licences"] = [f"{source}: {licence}" for source, licence in licences.items()]
    write_json(out / "metrics.json", {"tokens": metrics})
    print(f"{out}: {', '.join(f'{v:,} {k}' for k, v in metrics.items() if isinstance(v, int))}")


if __name__ == "__main__":
    run_stage(main)

"""A teacher cache from a list of texts: what the tokens and cache stages do, in small."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib.base.errors import InputError
from lib.cache.spec import CacheSpec, Kept
from lib.capture.build import build_cache
from lib.model.load import tokenizer_fingerprint
from lib.text.build import pad_id_of
from lib.text.pack import Encoded, Packer
from lib.text.sequences import TokenSet, write_tokens


class Settings(Kept, Protocol):
    """The `cache` section of params.yaml."""

    @property
    def batch_size(self) -> int: ...
    @property
    def shard_sequences(self) -> int: ...


def cache_texts(
    teacher: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: list[str],
    out: Path,
    *,
    teacher_mark: str,
    settings: Settings,
    max_length: int,
    val_fraction: float,
    device: torch.device,
) -> None:
    """Write ``out/train`` and ``out/val``; whole texts are held out, see :func:`hold_out`.

    Args:
        teacher_mark: fingerprint of the teacher.
        max_length: tokens per row; texts follow each other without gaps.

    Raises:
        InputError: too few or too short texts.
        ParamsError: settings do not fit the vocabulary.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        tokenizer.save_pretrained(work / "tokenizer")
        mark = tokenizer_fingerprint(work / "tokenizer")
        for split, part in hold_out(texts, val_fraction).items():
            _write_rows(work / split, part, split, tokenizer, mark, max_length)
            rows = TokenSet(work / split)
            spec = CacheSpec.of(
                settings,
                teacher=teacher_mark,
                tokenizer=mark,
                tokens=rows.meta["fingerprint"],
                split=split,
                vocab_size=teacher.config.get_text_config().vocab_size,
                max_length=max_length,
            )
            build_cache(
                teacher,
                rows,
                spec,
                out / split,
                work / f"scratch-{split}",
                batch_size=settings.batch_size,
                shard_sequences=settings.shard_sequences,
                device=device,
            )


def hold_out(texts: list[str], val_fraction: float) -> dict[str, list[str]]:
    """Different, non-empty texts as ``train`` and ``val``: at least one each, evenly spread.

    Raises:
        InputError: fewer than two different texts.
    """
    unique = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(unique) < 2:
        raise InputError(
            f"there are {len(unique)} different texts; give at least 2, since one is held out"
        )
    held = held_places(len(unique), val_fraction)
    return {
        "train": [text for number, text in enumerate(unique) if number not in held],
        "val": [text for number, text in enumerate(unique) if number in held],
    }


def held_places(total: int, fraction: float) -> set[int]:
    """Places of the held-out ones among ``total`` (2 and more): at least one, not all, evenly
    spread."""
    count = min(total - 1, max(1, round(total * fraction)))
    return {int(place) for place in (np.arange(count) + 0.5) * total / count}


def _write_rows(
    folder: Path, texts: list[str], split: str, tokenizer: Tokenizer, mark: str, max_length: int
) -> None:
    """Tokens of ``texts``, each closed by the end token, packed into rows."""
    end = tokenizer.eos_token_id
    packer = Packer(max_length, pad_id_of(tokenizer), packing=True, limit=None)
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        closed = end is None or (ids and ids[-1] == end)
        packer.add([Encoded(ids if closed else [*ids, end])])
    rows = packer.rows()
    if not len(rows):
        raise InputError(f"the texts of the {split} split are too short; give longer ones")
    write_tokens(
        folder,
        rows.input_ids,
        rows.lengths,
        split=split,
        vocab_size=len(tokenizer),
        pad_id=pad_id_of(tokenizer),
        tokenizer=mark,
    )

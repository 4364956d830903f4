"""A tiny teacher that writes text; as a program it is killed (SIGKILL) in its second batch.

python -m tests.capture.writing SCRATCH
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from lib.capture import own_text
from lib.capture.own_text import OwnText
from lib.model.tiny import random_teacher

COUNT, LENGTH, SEED = 2 * own_text.BATCH + 3, 9, 4


def writer(scratch: Path, start: str | None = None) -> OwnText:
    """Two layers, 288 embeddings, a tokenizer of 259; ``start`` is its start token."""
    torch.set_num_threads(1)
    model, tokenizer = random_teacher("llama", 0)
    tokenizer.bos_token = start
    return OwnText(model.eval(), tokenizer, scratch)


def written(scratch: Path, start: str | None = None) -> list[list[int]]:
    """The first ``COUNT`` sequences."""
    return list(writer(scratch, start)(0, COUNT, LENGTH, SEED))


def main(scratch: Path) -> None:
    write_rows, calls = own_text.write_rows, []

    def write_or_die(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            # what a write cut short leaves
            (scratch / f".tmp-{SEED}-{LENGTH}-1.npy").write_bytes(b"half a batch")
            os.kill(os.getpid(), signal.SIGKILL)
        return write_rows(*arguments)

    own_text.write_rows = write_or_die
    written(scratch)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

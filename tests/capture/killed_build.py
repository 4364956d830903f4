"""Builds the tiny cache in a process of its own and kills it (SIGKILL) after some shards.

python -m tests.capture.killed_build SCRATCH OUT SHARDS
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lib.capture.build as build
from tests.capture.tiny import build_tiny


def main(scratch: Path, out: Path, shards: int) -> None:
    write_shard = build.write_shard

    def write_or_die(folder: Path, number: int, *rest: Any) -> Any:
        if number == shards:
            # what a write cut short leaves: a temporary file beside the finished shards
            (folder / ".tmp-shard-00002.arrow").write_bytes(b"ARROW1 half a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        return write_shard(folder, number, *rest)

    build.write_shard = write_or_die
    build_tiny(out, scratch)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

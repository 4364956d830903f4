"""Scratch folders: where unfinished work survives a kill, outside of DVC's outputs.

DVC deletes a stage's outputs before it runs, so whatever a stage needs to resume lies in
``.ckpt/<stage>/<key>`` of the main repository. The key is the fingerprint of everything that
defines the run: the same key resumes, another key is another run and is ignored.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lib.base.errors import BusyError
from lib.base.workers import is_main

SCRATCH = ".ckpt"


def work_root() -> Path:
    """Root of the main repository: also for runs in DVC's temporary and queued workspaces."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


@contextlib.contextmanager
def scratch_folder(stage: str, key: str) -> Iterator[Path]:
    """Hold the scratch folder of one run; it is deleted on success and kept on any failure.

    Of several processes that work together the first holds it for all.

    What an earlier, killed run of the same key left is still in it. The lock is the operating
    system's, so it ends with the process that holds it, however that dies.

    Raises:
        BusyError: another process (or thread) is running the same stage with the same key.
    """
    folder = work_root() / SCRATCH / stage / key
    if not is_main():
        yield folder
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{key}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"stage {stage} is already running in another process (it holds {folder}); "
            "wait for it or stop it, then run the same command again"
        ) from None
    try:
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)
    finally:
        lock.release()

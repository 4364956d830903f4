"""Scratch folders: where unfinished work survives a kill, outside of DVC's outputs.

DVC deletes a stage's outputs before it runs, so whatever a stage needs to resume lies in
``.ckpt/<stage>/<key>`` of the main repository. The key is the fingerprint of everything that
defines the run: the same key resumes, another key is another run and is ignored.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lib.base.locks import SCRATCH, held, work_root
from lib.base.workers import is_main


@contextlib.contextmanager
def scratch_folder(stage: str, key: str) -> Iterator[Path]:
    """Hold the scratch folder of one run; it is deleted on success and kept on any failure.

    Of several processes that work together the first holds it for all.

    What an earlier, killed run of the same key left is still in it.

    Raises:
        BusyError: another process (or thread) is running the same stage with the same key.
    """
    folder = work_root() / SCRATCH / stage / key
    if not is_main():
        yield folder
        return
    with held(folder.with_name(f"{key}.lock"), stage, str(folder)):
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)

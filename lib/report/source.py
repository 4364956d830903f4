"""Where an experiment's files are read from: the workspace, or a revision, not checked out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.base.errors import InputError

_COMMIT_DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files by their path from the repository's root.

    Attributes:
        name: what the reader calls it. commit: of a revision, shortened; empty for the workspace.
        read: a file's content; None where there is no such file (or DVC's cache lacks it).
    """

    name: str
    commit: str
    read: Callable[[str], bytes | None]


def workspace(root: Path) -> Source:
    """The files as they lie there."""

    def read(path: str) -> bytes | None:
        try:
            return (root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    return Source(name="workspace", commit="", read=read)


def revision(root: Path, rev: str) -> Source:
    """A commit, branch, tag or DVC experiment, read through git and DVC's cache.

    Raises:
        InputError: there is no such revision, or no repository of git and DVC.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import NoSCM, SCMError, resolve_rev
    from dvc_data.index import DataIndexDirError
    from scmrepo.exceptions import SCMError as GitError

    try:
        with Repo(root) as here:
            if isinstance(here.scm, NoSCM):
                raise InputError(
                    f"cannot compare with {rev}: there is no git repository here, so there are no "
                    "revisions; leave --against out"
                )
            commit = resolve_rev(here.scm, rev)
        files = DVCFileSystem(str(root), rev=commit)
        files.exists("dvc.yaml")  # a revision from before DVC shows now
    except NotDvcRepoError:
        raise InputError(
            f"cannot compare with {rev}: no DVC repository there; run from the root of the "
            "repository and name a revision that has results"
        ) from None
    except (DvcException, SCMError, GitError) as error:
        raise InputError(
            f"there is no revision {rev} ({error}); give a branch, tag, commit or experiment "
            "(`dvc exp list --all` and `git log` name them)"
        ) from None

    def read(path: str) -> bytes | None:
        try:
            content: bytes = files.read_bytes(path)
        except (DvcException, DataIndexDirError, OSError):  # DVC's cache lacks it
            return None
        return content

    return Source(name=rev, commit=commit[:_COMMIT_DIGITS], read=read)

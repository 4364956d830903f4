"""Second moments of every layer's inputs, kept in one file and read layer by layer.

The file is safetensors: a tensor per distinct input, ``[in]`` of E[x^2] or ``[in, in]`` of
E[x x^T], with the digest of each and which layers share it in its description.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.base.files import atomic_file, fingerprint
from lib.quant.spec import ModelSpec, Moments

_KEY = "lutqat"
_AGAIN = "rerun the calibrate stage"


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()


def write_moments(file: Path, moments: Mapping[str, Tensor], info: dict[str, Any]) -> None:
    """Write what :func:`lib.model.calibrate.input_moments` found; shared tensors once.

    Args:
        info: plain JSON values; ``teacher``, the fingerprint of the model that was calibrated, is
            compared when the file is opened.
    """
    owner: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in moments.items():
        owner[name] = first.setdefault(id(value), name)
    tensors = {name: moments[name] for name in first.values()}
    digests = {name: _digest(value) for name, value in tensors.items()}
    body = {**info, "owner": owner, "sha256": digests}
    meta = {_KEY: json.dumps({**body, "fingerprint": fingerprint(body)}, sort_keys=True)}
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, meta)


class StoredMoments(Mapping[str, Tensor]):
    """Moments by layer name, read and checked when asked for: one layer is in memory at a time.

    Attributes:
        info: what was written with them, and the ``fingerprint`` of all.
    """

    def __init__(self, file: Path, *, teacher: str, full: bool) -> None:
        """Open a file of :func:`write_moments`.

        Args:
            teacher: fingerprint of the model that the moments must be of.
            full: give E[x x^T]; otherwise E[x^2], also where the file has more.

        Raises:
            InputError: there is no such file. CorruptError: it is damaged.
            MismatchError: another model was calibrated.
        """
        if not file.is_file():
            raise InputError(f"{file} does not exist; run the calibrate stage")
        self.file, self.full = file, full
        try:
            with safe_open(file, framework="pt") as kept:
                self.info = json.loads((kept.metadata() or {})[_KEY])
            mark = self.info.pop("fingerprint")
            whole = mark == fingerprint(self.info)
            self.info["fingerprint"] = mark
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise CorruptError(f"{file} is damaged or not a file of moments; {_AGAIN}")
        if self.info["teacher"] != teacher:
            raise MismatchError(
                f"{file} was made with teacher {self.info['teacher']}, but {teacher} is in use "
                f"here; {_AGAIN}"
            )

    def __getitem__(self, name: str) -> Tensor:
        """Float32 ``[in, in]`` if ``full``, else ``[in]``.

        Raises:
            KeyError: the model has no such layer. CorruptError: the tensor is damaged.
            MismatchError: all products are wanted, and only squares were kept.
        """
        owner = self.info["owner"][name]
        try:
            with safe_open(self.file, framework="pt") as kept:
                value: Tensor = kept.get_tensor(owner)
        except SafetensorError:
            raise CorruptError(f"{self.file}: {owner} is missing; {_AGAIN}") from None
        if _digest(value) != self.info["sha256"][owner]:
            raise CorruptError(f"{self.file}: {owner} is damaged; {_AGAIN}")
        if value.dim() == 1 and self.full:
            raise MismatchError(f"{self.file} has no products of inputs, only squares; {_AGAIN}")
        return value if self.full or value.dim() == 1 else value.diagonal().clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.info["owner"])

    def __len__(self) -> int:
        return len(self.info["owner"])


def open_moments(file: Path, *, teacher: str, spec: ModelSpec) -> StoredMoments | None:
    """What ``spec`` needs to know of the inputs; None, and the file unopened, if that is nothing.

    Raises:
        InputError, CorruptError, MismatchError: see :class:`StoredMoments`.
    """
    if spec.needs is Moments.NONE:
        return None
    return StoredMoments(file, teacher=teacher, full=spec.needs is Moments.PRODUCTS)

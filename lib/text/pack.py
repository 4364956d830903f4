"""Token lists -> rows of equal length.

Shapes: N rows, L = max_length tokens a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHORTEST_ROW = 2  # tokens; a shorter row predicts nothing


class Encoded(NamedTuple):
    """Tokens of a document, and how many of the first are a prompt."""

    tokens: Sequence[int]
    prompt: int = 0


@dataclass(frozen=True)
class Rows:
    """input_ids int32 [N, L] padded on the right, lengths int32 [N] in real tokens, and prompt
    bool [N, L]: the token belongs to a prompt, not to what follows it."""

    input_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    prompt: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, which: slice | NDArray[np.intp]) -> Rows:
        return Rows(self.input_ids[which], self.lengths[which], self.prompt[which])

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """Rows of equal length, one set after the other."""
        return Rows(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.prompt for part in parts]),
        )


class Packer:
    """Collects documents into rows of ``max_length`` tokens, up to ``limit`` rows.

    With ``packing`` the documents follow each other and rows are cut wherever they are full, so
    the rows' real tokens are the documents' tokens, in order. Without it each document is one
    row: cut at ``max_length``, or padded on the right. Only the last row of a packed set is padded.
    """

    def __init__(self, max_length: int, pad_id: int, *, packing: bool, limit: int | None) -> None:
        self._max_length = max_length
        self._pad_id = pad_id
        self._packing = packing
        self._limit = limit
        self._rows: list[list[tuple[int, bool]]] = []  # a token, and whether it is prompt
        self._open: list[tuple[int, bool]] = []

    @property
    def full(self) -> bool:
        """Whether no further document has room."""
        return self._limit is not None and len(self._rows) >= self._limit

    def add(self, documents: Iterable[Encoded]) -> None:
        """Append documents; what is beyond the limit is dropped."""
        for document in documents:
            if self.full:
                return
            tokens = [(token, i < document.prompt) for i, token in enumerate(document.tokens)]
            if self._packing:
                self._open.extend(tokens)
                self._cut()
            elif len(tokens) >= SHORTEST_ROW:
                self._rows.append(tokens[: self._max_length])

    def _cut(self) -> None:
        length = self._max_length
        whole = len(self._open) // length
        self._rows.extend(self._open[i * length : (i + 1) * length] for i in range(whole))
        del self._open[: whole * length]
        if self._limit is not None:
            del self._rows[self._limit :]

    def rows(self) -> Rows:
        """The rows, padded on the right."""
        rows = list(self._rows)
        if len(self._open) >= SHORTEST_ROW and not self.full:
            rows.append(self._open)
        shape = (len(rows), self._max_length)
        input_ids = np.full(shape, self._pad_id, dtype=np.int32)
        prompt = np.zeros(shape, dtype=bool)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = [token for token, _ in row]
            prompt[index, : len(row)] = [is_prompt for _, is_prompt in row]
        return Rows(input_ids, np.array([len(row) for row in rows], dtype=np.int32), prompt)

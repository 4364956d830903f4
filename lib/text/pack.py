"""Token lists -> rows of equal length.

Shapes: N rows, L = max_length tokens a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

SHORTEST_ROW = 2  # tokens; a shorter row predicts nothing


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
        self._rows: list[list[int]] = []
        self._open: list[int] = []

    @property
    def full(self) -> bool:
        """Whether no further document has room."""
        return self._limit is not None and len(self._rows) >= self._limit

    def add(self, documents: Iterable[Sequence[int]]) -> None:
        """Append documents; what is beyond the limit is dropped."""
        for tokens in documents:
            if self.full:
                return
            if self._packing:
                self._open.extend(tokens)
                self._cut()
            elif len(tokens) >= SHORTEST_ROW:
                self._rows.append(list(tokens[: self._max_length]))

    def _cut(self) -> None:
        length = self._max_length
        whole = len(self._open) // length
        self._rows.extend(self._open[i * length : (i + 1) * length] for i in range(whole))
        del self._open[: whole * length]
        if self._limit is not None:
            del self._rows[self._limit :]

    def rows(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """input_ids [N, L] padded on the right, and the number of real tokens [N]."""
        rows = list(self._rows)
        if len(self._open) >= SHORTEST_ROW and not self.full:
            rows.append(self._open)
        input_ids = np.full((len(rows), self._max_length), self._pad_id, dtype=np.int32)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
        return input_ids, np.array([len(row) for row in rows], dtype=np.int32)

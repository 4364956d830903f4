"""Text that the teacher writes itself: distillation without data.

A sequence begins with the tokenizer's start token (BOS), and every further token is drawn from the
teacher's whole distribution at temperature 1. Where a tokenizer has no start token, the first token
is any ordinary one, the next three are the teacher's most probable ones, the rest is drawn: Liu et
al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (2023), data-free
distillation. (With a start token the most probable ones would begin all sequences alike.) An end
token does not end a sequence: the teacher goes on with the next turn or the next text.

Shapes: B sequences of a batch, L tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib.base.device import resolve_device, set_threads
from lib.base.errors import NonFiniteError
from lib.base.files import atomic_file, code_fingerprint, fingerprint
from lib.base.progress import track
from lib.base.scratch import scratch_folder
from lib.model.load import folder_fingerprint, load_causal_lm
from lib.params.data import OWN_TEXT, Run, Tokens

BATCH = 16
"""Sequences written side by side, always as many: sums in a batch of another size are rounded
otherwise, and once in a while a draw would fall on the other side."""
CHOSEN = 4
"""Tokens that are not drawn where there is no start token, the first one counted (3 to 5 in the
paper)."""


@contextlib.contextmanager
def own_text(
    settings: Tokens, teacher: Path, tokenizer: Tokenizer, run: Run, declared: str
) -> Iterator[OwnText | None]:
    """The teacher as a writer where a source is `self`, else None and nothing is loaded.

    Finished batches outlive a kill until the block ends.

    Args:
        declared: fingerprint of the params that define the run.
    """
    if all(source.source != OWN_TEXT for source in settings.train):
        yield None
        return
    set_threads(run.threads)
    device = resolve_device(run.device)
    defining = [declared, folder_fingerprint(teacher), device.type, code_fingerprint()]
    with scratch_folder("tokens", fingerprint(defining)) as scratch:
        model = load_causal_lm(teacher).to(device)  # type: ignore[arg-type]
        yield OwnText(model, tokenizer, scratch)


class OwnText:
    """Sequences of a teacher, by number.

    Args:
        scratch: keeps finished batches; belongs to this teacher alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, scratch: Path) -> None:
        self._model = model
        self._scratch = scratch
        self._vocabulary = len(tokenizer)  # embeddings may be more: what they stand for is nothing
        self._start = tokenizer.bos_token_id
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._ordinary = np.array([i for i in range(self._vocabulary) if i not in special])

    def __call__(self, first: int, count: int, length: int, seed: int) -> Iterator[list[int]]:
        """Sequences ``first`` to ``first + count - 1``, each ``length`` token ids.

        Raises:
            NonFiniteError: the teacher's logits are NaN or infinite.
        """
        last = first + count - 1
        batches = range(first // BATCH, last // BATCH + 1)
        for batch in track(batches, len(batches), f"text by the teacher, {BATCH} sequences each"):
            for number, row in enumerate(self._batch(batch, length, seed), batch * BATCH):
                if first <= number <= last:
                    yield row.tolist()

    def _batch(self, batch: int, length: int, seed: int) -> NDArray[np.int32]:
        """Token ids ``[B, L]``, from an earlier run if that has finished them."""
        path = self._scratch / f"{seed}-{length}-{batch}.npy"
        if path.is_file():
            finished: NDArray[np.int32] = np.load(path, allow_pickle=False)
            return finished
        numbers = range(batch * BATCH, (batch + 1) * BATCH)
        generators = [np.random.default_rng([seed, number]) for number in numbers]
        if isinstance(self._start, int):
            start, chosen = np.full(BATCH, self._start), 1
        else:
            start, chosen = np.array([g.choice(self._ordinary) for g in generators]), CHOSEN
        draws = np.stack([generator.random(length) for generator in generators])
        written = write_rows(self._model, start, draws, chosen, self._vocabulary)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, written, allow_pickle=False)
        return written


@torch.inference_mode()
def write_rows(
    model: PreTrainedModel,
    start: NDArray[np.int64],
    draws: NDArray[np.float64],
    chosen: int,
    vocabulary: int,
) -> NDArray[np.int32]:
    """Token ids ``[B, L]`` that continue one token each, with a cache of keys and values.

    Args:
        start: ids ``[B]`` of the first tokens.
        draws: uniform in [0, 1), ``[B, L]``: which share of the distribution each token stands at.
        chosen: tokens before the first drawn one: given, then the most probable.
        vocabulary: only ids below it are written.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
    """
    ids = torch.from_numpy(start)[:, None].to(model.device)
    written, cache = [ids], None
    for place in range(1, draws.shape[1]):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1, :vocabulary]
        if not logits.isfinite().all():
            raise NonFiniteError(
                f"the teacher's logits are NaN or infinite at token {place} of its own text; check "
                "the teacher's weights"
            )
        likeliest = place < chosen
        ids = logits.argmax(dim=1, keepdim=True) if likeliest else draw(logits, draws[:, place])
        written.append(ids)
    return torch.cat(written, dim=1).cpu().numpy().astype(np.int32)


def draw(logits: Tensor, at: NDArray[np.float64]) -> Tensor:
    """The ids ``[B, 1]`` at which the softmax of ``logits [B, V]``, summed up in the order of ids,
    first exceeds ``at [B]``."""
    place = torch.device("cpu") if logits.device.type == "mps" else logits.device  # has no float64
    sums = logits.to(place, torch.float64).softmax(dim=1).cumsum(dim=1)
    wanted = torch.from_numpy(at)[:, None].to(place) * sums[:, -1:]
    found = torch.searchsorted(sums, wanted, right=True).clamp_(max=logits.shape[1] - 1)
    return found.to(logits.device)

"""Shards as the reference implementation writes them, from a tiny teacher on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.model.teacher import bring_teacher

LENGTH, TOP_K, NEGATIVES = 12, 40, 6


def make_teacher(folder: Path, seed: int = 0) -> Path:
    """Two layers, a vocabulary of 288."""
    bring_teacher("random:llama", None, seed, folder)
    return folder


def rows_of(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask ``[N, L]``; every fourth row is half padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (count, LENGTH), generator=generator, dtype=torch.int32)
    mask = torch.ones(count, LENGTH, dtype=torch.uint8)
    mask[1::4, LENGTH // 2 :] = 0
    ids[mask == 0] = 0
    return ids, mask


@torch.no_grad()
def shard_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The content of a shard: raw logits of the top k and of random ids per position."""
    logits = model(input_ids=ids.long(), attention_mask=mask.long()).logits[:, :-1].float()
    top = logits.topk(TOP_K, dim=2)
    shape = (*logits.shape[:2], NEGATIVES)
    random = torch.randint(0, logits.shape[2], shape, generator=torch.Generator().manual_seed(9))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "topk_idx": top.indices.int(),
        "topk_logits": top.values.half(),
        "rand_idx": random.int(),
        "rand_logits": logits.gather(2, random).half(),
    }


def write_folder(folder: Path, model: PreTrainedModel, counts: list[int]) -> list[Tensor]:
    """``folder/shard_00N.pt`` with so many rows each; returns the sequences without padding."""
    folder.mkdir()
    sequences = []
    for number, count in enumerate(counts):
        ids, mask = rows_of(count, number)
        torch.save(shard_of(model, ids, mask), folder / f"shard_{number:03}.pt")
        sequences += [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    return sequences

"""Reference caches made into ours: exact targets, and everything that is refused."""

from __future__ import annotations

import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.base.errors import InputError, MismatchError
from lib.cache.shards import CacheReader
from lib.cache.verify import verify
from lib.capture import build, imported
from lib.capture.imported import Imported, divergence, import_cache, read_folder, read_shard
from lib.model.load import folder_fingerprint, load_causal_lm
from tests.capture.foreign_shards import (
    LENGTH,
    NEGATIVES,
    TOP_K,
    make_teacher,
    rows_of,
    shard_of,
    write_folder,
)

Content = dict[str, Any]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def run(source: Path, teacher: Path, **changes: Any) -> Imported:
    """Import into ``imported`` beside the source."""
    options = {"codec": "raw", "val_fraction": 0.2, "device": torch.device("cpu"), **changes}
    return import_cache(source, source.parent / "imported", teacher, **options)


def everything(cache: Path) -> dict[tuple[int, ...], tuple[CacheReader, int]]:
    """Where each sequence of both splits is."""
    found = {}
    for split in ("train", "val"):
        reader = CacheReader(cache / split)
        ids, lengths = reader.sequences(len(reader))
        for number, (row, length) in enumerate(zip(ids, lengths, strict=True)):
            found[tuple(row[:length].tolist())] = (reader, number)
    return found


@pytest.mark.parametrize("codec", ["raw", "packed"])
def test_every_sequence_with_exact_targets(tmp_path: Path, teacher: Path, codec: str) -> None:
    model = load_causal_lm(teacher)
    sequences = write_folder(tmp_path / "foreign", model, [7, 5])
    done = run(tmp_path / "foreign", teacher, codec=codec)
    assert (done.train, done.val, done.duplicates, done.short) == (10, 2, 0, 0)
    assert 0 <= done.kl < 1e-5 < done.limit  # float16 logits against bfloat16 arithmetic
    assert verify(tmp_path / "imported") == 12
    places = everything(tmp_path / "imported")
    assert places.keys() == {tuple(row.tolist()) for row in sequences}
    for tokens, (reader, number) in places.items():
        spec = reader.spec
        assert (spec.top_k, spec.negatives, spec.codec) == (TOP_K, NEGATIVES, codec)
        assert spec.teacher == folder_fingerprint(teacher)
        batch = reader.batch(np.array([number]))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
        n = len(tokens) - 1
        assert int(batch.mask.sum()) == n
        torch.testing.assert_close(
            batch.logsumexp[0, :n], logits.logsumexp(dim=1), rtol=1e-3, atol=1e-3
        )
        assert torch.equal(batch.topk_ids[0, :n, 0], logits.argmax(dim=1))
        if codec == "raw":
            exact = logits.log_softmax(dim=1).gather(1, batch.topk_ids[0, :n])
            torch.testing.assert_close(batch.topk_logprobs[0, :n], exact, rtol=1e-3, atol=1e-3)


def test_shards_without_negatives(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "foreign").mkdir()
    content = shard_of(load_causal_lm(teacher), *rows_of(4, 0))
    del content["rand_idx"], content["rand_logits"]
    torch.save(content, tmp_path / "foreign" / "a.pt")
    run(tmp_path / "foreign", teacher)
    assert CacheReader(tmp_path / "imported" / "train").spec.negatives == 0
    assert verify(tmp_path / "imported") == 4


def test_duplicates_and_single_tokens_are_dropped(tmp_path: Path, teacher: Path) -> None:
    model = load_causal_lm(teacher)
    sequences = write_folder(tmp_path / "foreign", model, [6])
    ids, mask = rows_of(6, 0)  # the very same again, as --resume leaves it
    more_ids, more_mask = rows_of(2, 5)
    more_mask[1, 1:] = 0
    shard = shard_of(model, torch.cat([ids, more_ids]), torch.cat([mask, more_mask]))
    torch.save(shard, tmp_path / "foreign" / "shard_009.pt")
    done = run(tmp_path / "foreign", teacher)
    assert (done.train + done.val, done.duplicates, done.short) == (7, 6, 1)
    assert set(everything(tmp_path / "imported")) == {
        tuple(row.tolist()) for row in [*sequences, more_ids[0]]
    }


def test_the_same_teacher_in_bfloat16_agrees(tmp_path: Path, teacher: Path) -> None:
    write_folder(tmp_path / "foreign", load_causal_lm(teacher, torch.bfloat16), [6, 3])
    done = run(tmp_path / "foreign", teacher)
    assert 0 < done.kl < done.limit


def test_another_teacher_is_refused_with_figures(tmp_path: Path, teacher: Path) -> None:
    other = make_teacher(tmp_path / "other", seed=1)
    write_folder(tmp_path / "foreign", load_causal_lm(teacher), [4])
    write_folder(tmp_path / "mixed", load_causal_lm(other), [1, 4])
    with pytest.raises(MismatchError, match=r"shard_000\.pt.*KL [0-9.]+ nats.*first choice at"):
        run(tmp_path / "foreign", other)
    (tmp_path / "mixed" / "shard_001.pt").rename(tmp_path / "foreign" / "shard_007.pt")
    with pytest.raises(MismatchError, match=r"shard_007\.pt.*KL"):
        run(tmp_path / "foreign", teacher)
    assert not (tmp_path / "imported").exists()


def test_divergence() -> None:
    one, other = torch.randn(5, 9), torch.randn(5, 9)
    for row, (a, b) in enumerate(zip(one.softmax(dim=1), other.softmax(dim=1), strict=True)):
        slow = sum(float(p) * math.log(float(p / q)) for p, q in zip(a, b, strict=True))
        assert float(divergence(one, other)[row]) == pytest.approx(slow, rel=1e-4)
    assert float(divergence(one, one + 3).abs().max()) < 1e-6


def test_a_small_vocabulary_is_refused(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "foreign").mkdir()
    content = shard_of(load_causal_lm(teacher), *rows_of(3, 0))
    content["topk_idx"][0, 0, 0] = 300
    torch.save(content, tmp_path / "foreign" / "a.pt")
    with pytest.raises(MismatchError, match="id 300, the vocabulary of .* has 288"):
        run(tmp_path / "foreign", teacher)


def test_an_interrupted_import_goes_on(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "foreign", load_causal_lm(teacher), [100, 60])
    plain = build.write_shard
    written: list[int] = []
    killed = True

    def dies(folder: Path, number: int, *rest: Any) -> Any:
        written.append(number)
        if number == 1 and killed:
            raise KeyboardInterrupt
        return plain(folder, number, *rest)

    monkeypatch.setattr(build, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "foreign", teacher)
    assert written == [0, 1] and not (tmp_path / "imported").exists()
    killed = False
    done = run(tmp_path / "foreign", teacher)
    assert written == [0, 1, 1, 0]  # train from its second shard on, then val
    assert verify(tmp_path / "imported") == done.train + done.val == 160


def test_one_file_is_in_memory_at_a_time(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "foreign", load_causal_lm(teacher), [3, 3, 3])
    held: list[weakref.ref[Tensor]] = []

    def watched(file: Path) -> dict[str, Tensor]:
        assert all(reference() is None for reference in held)
        tensors = read_shard(file)
        held.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(imported, "read_shard", watched)
    found = read_folder(tmp_path / "foreign")
    assert len(found.rows) == 9 and len(held) == 18 and len(found.probes) == 3


# --- malformed files ----------------------------------------------------------------------------


def without(key: str) -> Callable[[Content], object]:
    return lambda content: content.pop(key)


def with_value(key: str, value: Callable[[Tensor], object]) -> Callable[[Content], object]:
    return lambda content: content.update({key: value(content[key])})


def left_padded(content: Content) -> None:
    content["attention_mask"] = content["attention_mask"].flip(1)


def with_nan(content: Content) -> None:
    content["topk_logits"][1, 0, 3] = torch.nan


MALFORMED = {
    "no ids": (without("input_ids"), "input_ids is missing"),
    "no mask": (without("attention_mask"), "attention_mask is missing"),
    "no logits": (without("topk_logits"), "topk_logits is missing"),
    "half of the negatives": (without("rand_logits"), "rand_logits is missing, the other"),
    "a list": (with_value("topk_idx", Tensor.tolist), "topk_idx is no tensor but list"),
    "float ids": (with_value("input_ids", Tensor.float), "input_ids has type torch.float32"),
    "whole logits": (with_value("topk_logits", Tensor.int), "topk_logits has type torch.int32"),
    "sparse": (with_value("attention_mask", Tensor.to_sparse), "attention_mask has layout"),
    "flat ids": (with_value("input_ids", Tensor.flatten), "input_ids has shape [48]"),
    "no rows": (with_value("input_ids", lambda x: x[:0]), "input_ids has shape [0, 12]"),
    "short mask": (with_value("attention_mask", lambda x: x[:, 1:]), "attention_mask has shape"),
    "left padding": (left_padded, "attention_mask is not ones and then zeros"),
    "weighted mask": (with_value("attention_mask", lambda x: 2 * x), "attention_mask is not ones"),
    "negative id": (with_value("input_ids", lambda x: x - 100), "input_ids holds ids from -"),
    "huge id": (
        with_value("input_ids", lambda x: x.long() + 2**31),
        "input_ids holds ids from 2147483648",
    ),
    "all positions": (
        with_value("topk_idx", lambda x: torch.cat([x, x[:, :1]], dim=1)),
        "topk_idx has shape [4, 12, 40], not [N, L - 1, ...]",
    ),
    "fewer logits": (
        with_value("topk_logits", lambda x: x[:, :, 1:]),
        "topk_logits has shape [4, 11, 39], its ids [4, 11, 40]",
    ),
    "negative candidate": (with_value("topk_idx", lambda x: x - 288), "topk_idx holds -"),
    "not a number": (with_nan, "topk_logits holds numbers that are not finite"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_by_file_and_key(
    tmp_path: Path, teacher: Path, case: str
) -> None:
    damage, words = MALFORMED[case]
    write_folder(tmp_path / "foreign", load_causal_lm(teacher), [4])
    content = torch.load(tmp_path / "foreign" / "shard_000.pt", weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "foreign" / "shard_001.pt")
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path / "foreign")
    assert str(tmp_path / "foreign" / "shard_001.pt") in str(caught.value)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [("topk", "K of topk_idx is 20"), ("rand", "R of rand_idx is 3"), ("L", "L of input_ids is 8")],
)
def test_files_of_different_caches_are_refused(
    tmp_path: Path, teacher: Path, key: str, words: str
) -> None:
    write_folder(tmp_path / "foreign", load_causal_lm(teacher), [4])
    content = torch.load(tmp_path / "foreign" / "shard_000.pt", weights_only=True)
    for name, value in content.items():
        if key == "L":
            content[name] = value[:, : 8 if value.dim() == 2 else 7]
        elif name.startswith(key):
            content[name] = value[:, :, : value.shape[2] // 2]
    torch.save(content, tmp_path / "foreign" / "shard_001.pt")
    with pytest.raises(InputError, match=rf"shard_001\.pt: {words}, in shard_000\.pt it is"):
        read_folder(tmp_path / "foreign")


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "executed")


def test_a_hostile_pickle_is_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    evil = {"input_ids": Evil(target)}
    torch.save(evil, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(evil))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match=rf"{name} is refused"):
            read_shard(tmp_path / name)
        assert not target.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the test's pickle does what it says
    assert target.exists()


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 half a file", b"{}"):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.pt is refused"):
            read_folder(tmp_path)
    torch.save(torch.ones(3), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt holds no dictionary but Tensor"):
        read_folder(tmp_path)
    (tmp_path / "a.pt").unlink()
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"no folder with \.pt files"):
            read_folder(folder)


def test_too_few_sequences(tmp_path: Path, teacher: Path) -> None:
    model = load_causal_lm(teacher)
    write_folder(tmp_path / "foreign", model, [1])
    with pytest.raises(InputError, match="1 different sequences; at least 2"):
        run(tmp_path / "foreign", teacher)
    ids, mask = rows_of(2, 0)
    mask[:, 1:] = 0
    torch.save(shard_of(model, ids, mask), tmp_path / "foreign" / "shard_000.pt")
    with pytest.raises(InputError, match="no sequence of two or more tokens"):
        run(tmp_path / "foreign", teacher)
    assert LENGTH == ids.shape[1]

"""Rules between what the teacher cache holds and what is learned from it."""

from __future__ import annotations

from collections.abc import Mapping

from lib.params.data import Cache
from lib.params.training import Distill, LoopConfig


def check_targets(cache: Cache, distill: Distill, sections: Mapping[str, LoopConfig]) -> None:
    """Rules between `cache.targets`, `distill` and training sections by name.

    Raises:
        ValueError: targets are sampled at another temperature than the loss has, or a section
            needs candidates.
    """
    if cache.targets == "topk":
        return
    if cache.sample_temperature != distill.temperature:
        raise ValueError(
            f"cache.sample_temperature = {cache.sample_temperature}: cache.targets is sampled, "
            f"which serves one temperature, and distill.temperature is {distill.temperature}; set "
            "both to the same number"
        )
    for name, config in sections.items():
        if config.hard_top1_weight and config.steps:
            raise ValueError(
                f"{name}.hard_top1_weight = {config.hard_top1_weight}: cache.targets is sampled, "
                "which has no candidates; set it to 0 and use hard_full_weight, or cache.targets "
                "to topk"
            )

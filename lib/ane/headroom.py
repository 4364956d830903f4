"""How far each operation is from becoming infinite."""

from __future__ import annotations

from lib.ane.check import CheckResult
from lib.ane.emulate import OpRecord
from lib.ane.products import MATMUL_LIMIT, Mode
from lib.quant.fp16 import FP16_MAX

_SMALLEST = 2.0**-24  # FP16's smallest value: results that are all zero have a headroom too


def headroom(record: OpRecord) -> float:
    """How many times larger the operation's results could be and still be finite."""
    return FP16_MAX / max(record.max_abs, _SMALLEST)


def matmul_headroom(record: OpRecord) -> float:
    """The same for a matrix product on a device that bounds it."""
    return MATMUL_LIMIT / max(record.max_abs, _SMALLEST)


def worst_records(result: CheckResult, form: str) -> list[OpRecord]:
    """Each module's largest operation, largest first; norms are reported by their inputs."""
    worst: dict[str, OpRecord] = {}
    for record in result.forms[form][Mode.WIDE].records:
        known = worst.get(record.module)
        if record.module not in result.norm_peaks and (
            known is None or record.max_abs > known.max_abs
        ):
            worst[record.module] = record
    return sorted(worst.values(), key=lambda record: -record.max_abs)


def worst_products(result: CheckResult, form: str) -> list[OpRecord]:
    """Matrix products, the one with the largest result first."""
    products = [r for r in result.forms[form][Mode.WIDE].records if r.is_matmul]
    return sorted(products, key=lambda record: -record.max_abs)


def worst_record(result: CheckResult) -> OpRecord:
    """The largest operation of any form."""
    firsts = [records[0] for form in result.forms if (records := worst_records(result, form))]
    return max(firsts, key=lambda record: record.max_abs)

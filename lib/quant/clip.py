"""How far out the outermost level should stand: the share of max-abs of least output error.

    minimize  tr (W - W_q) H (W - W_q)^T,   W_q = LUT[nearest] * share S,   H = E[x x^T]

over a few shares, for a layer as a whole. Clipping few large weights makes the steps finer for all
others; what that costs and gains the layer's output is what H knows.

Shapes: W, S ``[out, in]``, H ``[in, in]``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lib.quant.codebook import assign, safe_ratio
from lib.quant.gptq import output_error
from lib.quant.scales import initial_factors
from lib.quant.spec import LinearSpec
from lib.quant.ste import lookup

SHARES = tuple(percent / 100 for percent in range(100, 35, -5))
"""Tried from the largest down; of equals the larger is taken."""


def clip_errors(
    weight: Tensor, scale: Tensor, lut: Tensor, moments: Tensor, *, affine: bool
) -> list[float]:
    """The output error of the nearest levels for each of :data:`SHARES`.

    Args:
        scale: S that makes the outermost level stand for max-abs.
        moments: H, the mean of x x^T over calibration text, float32.
    """
    errors = []
    for share in SHARES:
        part = scale * share
        nearest = lookup(lut, assign(safe_ratio(weight, part), lut, affine=affine))
        errors.append(output_error(weight - nearest * part, moments))
    return errors


def with_best_range(weight: Tensor, spec: LinearSpec, lut: Tensor, moments: Tensor) -> LinearSpec:
    """The spec with the `range` of least output error."""
    a, b = initial_factors(weight, replace(spec, range=1.0), float(lut.abs().max()))
    affine = spec.codebook.is_affine
    errors = torch.tensor(clip_errors(weight, a @ b, lut, moments, affine=affine))
    return replace(spec, range=SHARES[int(errors.argmin())])

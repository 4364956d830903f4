"""Names inside an exported folder, for those who write it and those who read it."""

from __future__ import annotations

PACKAGE = "model.mlpackage"
EXPECTED = "check.safetensors"
"""Token ids of a held-out text and the logits that a package must give."""
SETTINGS = "settings"
"""Metadata key of that file: JSON with the prefill's ``tokens`` and the cache's ``slots``."""

AIMODEL = "model.aimodel"
FUNCTIONS = ("prefill", "decode")
"""Functions of a package: many tokens at a time, and one."""

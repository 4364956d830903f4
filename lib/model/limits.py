"""Sizes that the Neural Engine is said to take, for the check and for the export alike.

No source is Apple's and none was measured here: these numbers are cited from compiler messages and
from published models (docs/ane.md).
"""

from __future__ import annotations

MAX_RANK = 4
"""Most axes of a tensor."""

MAX_SIDE = 16384
"""Largest width or height of a tensor: its last two axes."""

MAX_CHANNELS = 65536
"""Most channels of a tensor: its second axis."""

HEAD_SLICE = 16384
"""Most outputs of the head that one convolution makes; a larger head is cut into slices."""

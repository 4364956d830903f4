"""One thread for every test: tiny models gain nothing from more, and sums keep one order."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

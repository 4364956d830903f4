"""Loading a teacher folder: Hugging Face config, safetensors and tokenizer, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from lib.base.errors import CorruptError, InputError, trouble_of
from lib.base.files import fingerprint, sha256_file

CONFIG = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

logging.disable_progress_bar()  # loading takes a second, and in a log the bar takes a page


def load_causal_lm(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder that the teacher stage wrote, on the CPU.

    It is in eval mode, uses scaled-dot-product attention, and nothing requires a gradient.

    Raises:
        InputError: the folder is missing or incomplete, or its architecture is not known.
        CorruptError: the weights are damaged or lack a tensor.
    """
    weights_of(folder)
    try:
        model, missing = read_model(
            str(folder),
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
        )
    except SafetensorError as error:
        raise CorruptError(
            f"{folder}: the weights cannot be read ({error}); rerun its stage"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if trouble_of(error) is not None:
            raise
        raise InputError(f"{folder} is no causal language model: {first_line(error)}") from None
    if missing:
        raise CorruptError(
            f"{folder}: the weights lack {missing[0]} ({len(missing)} missing in all); "
            "rerun the stage that makes it"
        )
    model.requires_grad_(False)
    return model.eval()


def read_model(name: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """A Hugging Face model, and the names of the tensors that its files do not have (Transformers
    itself would only warn, and leave random numbers in them)."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, trust_remote_code=False, output_loading_info=True, **options
    )
    model, info = loaded
    return model, sorted(info["missing_keys"])


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a teacher or checkpoint folder.

    Raises:
        InputError: the folder is missing or holds no usable tokenizer.
    """
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} holds no tokenizer.json; rerun the stage that makes it")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions on bad files
        if trouble_of(error) is not None:
            raise
        raise InputError(f"{folder}: no usable tokenizer ({first_line(error)})") from None


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        InputError: no such folder, no config or no weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    for what, there in ((CONFIG, (folder / CONFIG).is_file()), ("*.safetensors", bool(weights))):
        if not there:
            raise InputError(
                f"{folder} holds no {what}; give a Hugging Face model folder, or rerun the "
                "teacher stage"
            )
    return weights


def folder_fingerprint(folder: Path) -> str:
    """Fingerprint of a teacher: its config, weights and tokenizer, by content.

    Raises:
        InputError: see :func:`weights_of`.
    """
    files = [folder / CONFIG, *weights_of(folder), *_tokenizer_files(folder)]
    return fingerprint({file.name: sha256_file(file) for file in files})


def tokenizer_fingerprint(folder: Path) -> str:
    """Fingerprint of a folder's tokenizer and chat template, by content."""
    return fingerprint({file.name: sha256_file(file) for file in _tokenizer_files(folder)})


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def first_line(error: BaseException) -> str:
    """The first line of a library's message: the rest is advice about other programs."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_pickled(file: Path, *, remedy: str) -> Any:
    """What a foreign ``.pt`` file holds. Nothing in it is executed (``weights_only=True``).

    Raises:
        InputError: it is broken, or holds more than tensors in plain containers.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile pickle provokes
        reason = first_line(error).split(". ")[0]
        raise InputError(
            f"{file} is refused: not a PyTorch file of tensors alone ({reason}); {remedy}"
        ) from None

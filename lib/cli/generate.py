"""`lutqat generate` and `lutqat chat`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lib.cli.options import Checkpoint, Device, MaxTokens, Seed, Temperature

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lib.evaluate.generate import Message


def generate(
    checkpoint: Checkpoint,
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPT...", help="One or more prompts.", show_default=False),
    ],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")
    ] = False,
    device: Device = "auto",
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Adapter folder (runs/recover/adapter): answer without and with it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answer prompts, token by token as they come.

    Example: lutqat generate runs/snap/model "Why is the sky blue?" --max-tokens 60

    Example: lutqat generate runs/snap/model "Why is the sky blue?" --adapter runs/recover/adapter
    """
    from lib.evaluate.generate import chat_ids, stream_text

    model, tokenizer = _load(checkpoint, device, adapter)
    for number, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"{chr(10) if number else ''}> {prompt}")
        ids = list(tokenizer(prompt)["input_ids"]) if raw else chat_ids(tokenizer, prompt)
        for heading, state in _states(model, adapter):
            with state:
                if heading:
                    print(heading)
                stream_text(
                    *(model, tokenizer, ids, max_tokens),
                    seed=seed,
                    temperature=temperature,
                    emit=_show,
                )
                print(flush=True)


def chat(
    checkpoint: Checkpoint,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Talk to a model; it remembers what was said.

    /reset forgets the conversation; /quit or the end of input (Ctrl-D) ends.

    Example: lutqat chat runs/snap/model --temperature 0.7
    """
    from lib.evaluate.generate import render_chat, stream_text

    model, tokenizer = _load(checkpoint, device)
    render_chat(tokenizer, [{"role": "user", "content": "Hi"}])  # no chat template: say so now
    print("/reset forgets the conversation, /quit ends.")
    history: list[Message] = []
    while (line := _read_line()) not in (None, "/quit"):
        if line == "/reset":
            history = []
            print("(forgotten)")
        elif line:
            history.append({"role": "user", "content": line})
            ids = _fit(model, tokenizer, history, max_tokens)
            turn = seed + len(history)
            answer = stream_text(
                model, tokenizer, ids, max_tokens, seed=turn, temperature=temperature, emit=_show
            )
            print(flush=True)
            history.append({"role": "assistant", "content": answer})


def _states(
    model: PreTrainedModel, adapter: Path | None
) -> list[tuple[str, contextlib.AbstractContextManager[None]]]:
    """Heading and context of each answer to a prompt."""
    if adapter is None:
        return [("", contextlib.nullcontext())]
    from lib.model.adapter import adapters_off

    with_it = ("[with the adapter]", contextlib.nullcontext())
    return [("[without the adapter]", adapters_off(model)), with_it]


def _load(
    folder: Path, device: str, adapter: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from lib.base.device import resolve_device
    from lib.model.folders import load_any
    from lib.model.load import load_tokenizer
    from lib.model.surgery import bake

    place = resolve_device(device)
    model, _ = load_any(folder)
    tokenizer = load_tokenizer(folder)
    if adapter is not None:
        from lib.model.adapter import check_base, load_adapter

        check_base(adapter, folder)
        load_adapter(model, adapter)
    bake(model)  # W_q once, not once per token
    return model.to(place), tokenizer  # type: ignore[arg-type]


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _read_line() -> str | None:
    """What the user typed, None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    history: list[Message],
    max_tokens: int,
) -> list[int]:
    """Token ids of the conversation, whose oldest turns are dropped while it is too long."""
    from lib.evaluate.generate import context_length, render_chat

    context = context_length(model)
    dropped = 0
    while True:
        text = render_chat(tokenizer, history)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if context is None or len(ids) + max_tokens <= context or len(history) == 1:
            break
        del history[:2]
        dropped += 1
    if dropped:
        print(f"(the {dropped} oldest turns no longer fit and are forgotten)", file=sys.stderr)
    return ids

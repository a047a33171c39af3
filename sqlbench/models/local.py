"""A Hugging Face checkpoint of this machine as a chat model: templates, tokens to text, streaming.

The engine that samples is `verl_cpu.engine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlbench.agent.trajectory import Completion, Message
from sqlbench.errors import ModelError, PromptTooLongError
from sqlbench.models.base import merge_messages
from sqlbench.models.checkpoint import check_checkpoint, checkpoint_family
from sqlbench.text import clean
from verl_cpu.batching import BatchedEngine
from verl_cpu.engine import EngineError, Generation, GenerationRequest, LocalEngine


def encode_chat(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """Tokenize a chat prompt, including the generation prompt; all of sqlbench uses this function.

    Neighbouring messages are joined where the chat template asks for it (`joined_roles`).
    """
    if roles := joined_roles(tokenizer):
        merged = merge_messages([Message(**message) for message in messages], roles)
        messages = [message.model_dump() for message in merged]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )
    return [int(i) for i in ids]


@lru_cache(maxsize=8)
def joined_roles(tokenizer: Any) -> tuple[str, ...]:
    """Find the roles whose neighbouring messages have to be joined into one, by probing the chat template.

    Empty for most templates, ``user`` where it demands alternation (Mistral), ``system`` too where it refuses a system
    message or leaves it out (Gemma).

    Raises:
        ModelError: the chat template is missing or cannot render a question.
    """

    def renders(*messages: tuple[str, str]) -> bool:
        probe = [{"role": role, "content": content} for role, content in messages]
        text = tokenizer.apply_chat_template(probe, add_generation_prompt=True, tokenize=False)
        return all(content in text for _, content in messages)

    def works(*messages: tuple[str, str]) -> bool:
        with contextlib.suppress(Exception):  # a template may raise anything
            return renders(*messages)
        return False

    system, question, more = ("system", "probe-1"), ("user", "probe-2"), ("user", "probe-3")
    if works(system, question):
        return () if works(system, question, more) else ("user",)
    try:
        if renders(question):
            return "system", "user"
        why = "it leaves out the question"
    except Exception as error:
        why = " ".join(str(error).split())[:200].rstrip(".") if tokenizer.chat_template else "it has none"
    raise ModelError(f"Cannot use the chat template of {tokenizer.name_or_path}: {why}. Choose a chat model.")


def check_chat_template(path: str | Path) -> None:
    """Refuse a checkpoint folder that cannot be prompted.

    Raises:
        ModelError: its tokenizer cannot be loaded, or its chat template cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the files may hold anything
        what = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"Cannot load the tokenizer of {path}: {what}. Download the checkpoint again.") from error
    joined_roles(tokenizer)


class LocalChatModel:
    """A checkpoint of this machine as a `sqlbench.interfaces.Model`.

    Its samples depend on the seed, the prompt and how often it was asked that prompt, so that an evaluation is
    reproducible with any number of concurrent rollouts.

    Raises:
        ModelError: the checkpoint cannot be loaded, or its chat template cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        temperature: float = 0.0,
        max_tokens: int = 128,
        seed: int = 0,
        device: str = "cpu",
        threads: int = 1,
        max_model_len: int = 1024,
        max_batch: int = 256,
    ) -> None:
        self.family = checkpoint_family(check_checkpoint(path))
        self.name = name or str(path)
        self.temperature = temperature
        self.max_tokens = max_tokens
        try:
            # The embedded policy is too small to gain anything, and its published results are of float32.
            frozen = self.family != "nano"
            engine = LocalEngine(path, device, threads=threads, max_model_len=max_model_len, frozen=frozen)
        except EngineError as error:
            raise ModelError(str(error)) from error
        joined_roles(engine.tokenizer)  # refuse an unusable template before any rollout
        self.batched = BatchedEngine(engine, max_batch)
        self.seed = seed
        self._asked = Counter[bytes]()

    def seeded(self, seed: int) -> LocalChatModel:
        """Return the same weights as a model that samples from another seed, as if it had not been asked yet."""
        other = copy.copy(self)
        other.seed, other._asked = seed, Counter()
        return other

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text."""
        return len(self.batched.engine.tokenizer.encode(text, add_special_tokens=False))

    async def complete(
        self,
        messages: list[Message],
        on_text: Callable[[str], None] | None = None,
        temperature: float | None = None,
    ) -> Completion:
        """Answer one prompt; see `sqlbench.interfaces.Model.complete`."""
        start = time.perf_counter()
        tokenizer = self.batched.engine.tokenizer
        ids = encode_chat(tokenizer, [m.model_dump() for m in messages])
        pieces = TextPieces(tokenizer, on_text) if on_text else None
        prompt = hashlib.sha256(repr((self.seed, ids)).encode()).digest()
        self._asked[prompt] += 1
        request = GenerationRequest(
            tuple(ids),
            self.max_tokens,
            self.temperature if temperature is None else temperature,
            seed=(int.from_bytes(prompt[:8]) >> 1) + self._asked[prompt],
            on_token=pieces.hear if pieces else None,
        )
        try:
            generation = await self.batched.generate(request)
        except EngineError as error:
            raise PromptTooLongError(f"{error} Lower table_info_truncate or execution_truncate.") from error
        answer = completion(tokenizer, ids, generation, time.perf_counter() - start)
        if pieces:
            pieces.emit(answer.text)
        other = None if temperature == self.temperature else temperature
        return answer.model_copy(update={"temperature": other})


class TextPieces:
    """Turns tokens, one by one, into pieces of text that together are what all tokens decode to.

    One token is not one piece of text: a character may take several, and the text of a token can depend on those
    before it. So all tokens so far are decoded each time, and complete new text is emitted.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.loop = asyncio.get_running_loop()
        self.ids: list[int] = []
        self.emitted = ""

    def hear(self, number: int, token_id: int) -> None:
        """Call `add` from the engine's thread."""
        self.loop.call_soon_threadsafe(self.add, number, token_id)

    def add(self, number: int, token_id: int) -> None:
        """Add the token at index `number`, which repeats when a failed batch is generated again from its start."""
        self.ids[number:] = [token_id]
        text = clean(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if not text.endswith("\ufffd"):
            self.emit(text)

    def emit(self, text: str) -> None:
        """Emit the part of `text` that was not emitted yet."""
        if text.startswith(self.emitted) and len(text) > len(self.emitted):
            piece, self.emitted = text[len(self.emitted) :], text
            self.on_text(piece)


def completion(tokenizer: Any, prompt_ids: list[int], generation: Generation, seconds: float) -> Completion:
    """Return the record of one answer, as the agent sees it."""
    return Completion(
        text=tokenizer.decode(generation.token_ids, skip_special_tokens=True),
        prompt_ids=prompt_ids,
        response_ids=generation.token_ids,
        logprobs=generation.logprobs,
        prompt_tokens=len(prompt_ids),
        response_tokens=len(generation.token_ids),
        finish_reason=generation.finish_reason,
        seconds=seconds,
    )

"""Any OpenAI-compatible endpoint as a model.

Every call ends within its deadline, and every failure (refused, hanging, garbage, unknown model) is one `ModelError`
that names the endpoint and shows no key or password. The client itself retries transient failures up to `RETRIES`
times, with growing pauses or those that the endpoint asks for. A field that an endpoint refuses with HTTP 400
(the temperature, the name of the token limit, a system message) is not sent to it again. Text is kept up to `MAX_CHARS`
characters. An endpoint gives no token ids, so trajectories of an endpoint can be evaluated but not trained on.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from sqlbench.agent.trajectory import Completion, Message
from sqlbench.errors import ModelError
from sqlbench.masking import mask
from sqlbench.models.base import merge_messages
from sqlbench.models.cache import AnswerCache
from sqlbench.text import CleanPieces

RETRIES = 3
MAX_CHARS = 100_000
"""Most characters of an answer, even if its server ignores ``max_tokens``: it is stored and goes into prompts."""
REQUEST = "SQLBENCH_REQUEST"
"""Environment variable with request fields as a JSON object."""
LIMITS = ("max_tokens", "max_completion_tokens")
"""Names of the token limit: servers know the first, OpenAI's newer models only the second."""
OURS = ("messages", "model", "n", "stream", "stream_options")
"""Request fields that users cannot set."""
_CUT = ("length", "max_tokens", "model_length")
_NO_SYSTEM = re.compile(
    r"support\W+(the )?system|system (role|message|prompt|instruction)|roles? must alternate"
    r"|developer (role|message|instruction)",
    re.IGNORECASE,
)
_TOO_MUCH = re.compile(r"too (large|long|many|high|big)|exceed|at most|maximum|less than|context", re.IGNORECASE)
_UNKNOWN = re.compile(r"support|not (permitted|allowed)|unknown|unrecogni[sz]ed|deprecated", re.IGNORECASE)


def load_env() -> None:
    """Add the variables of ``.env``, in the working directory or a folder above, to the environment.

    Raises:
        ModelError: the file is not UTF-8.
    """
    from dotenv import find_dotenv, load_dotenv

    file = find_dotenv(usecwd=True)
    try:
        load_dotenv(file)
    except UnicodeDecodeError as error:
        raise ModelError(f"Cannot read {file}: {error}. Save it as UTF-8.") from error


class EndpointChatModel:
    """A model behind ``OPENAI_BASE_URL`` (default: OpenAI itself), with ``OPENAI_API_KEY``; ``.env`` is read too.

    Args:
        model: name of the model at the endpoint.
        temperature: 0 is greedy.
        max_tokens: most tokens of an answer.
        timeout: seconds one call may take, retries included.
        request: further fields of every request, which take precedence; None leaves a field out. By default those of
            the environment variable ``SQLBENCH_REQUEST``.
        cache: folder that keeps answers (`sqlbench.models.cache`): a request that it knows is not sent. Where answers
            are sampled, each repetition of a request within a sample (`numbered`) has an answer of its own.

    Raises:
        ModelError: neither an address nor a key is set, one of them cannot be used, or ``.env`` cannot be read.
    """

    def __init__(
        self,
        model: str,
        *,
        temperature: float = 0.0,
        max_tokens: int = 2048,
        timeout: float = 120.0,
        request: Mapping[str, Any] | None = None,
        cache: Path | str | None = None,
    ) -> None:
        load_env()
        self.name = f"openai:{model}"
        self.family = "chat"
        self.model = model
        address = _plain(os.environ.get("OPENAI_BASE_URL", ""))
        self._key = _read_key(os.environ.get("OPENAI_API_KEY", ""))
        if not (address or self._key):
            raise ModelError(
                f"No endpoint for the model: {self.name}. Set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your "
                "own, in the environment or in .env."
            )
        self.base_url, self._query = _read_address(address)
        """Address without its query, so that it can be shown; None is OpenAI's own."""
        self._secrets = {self._key, *self._query.values()}
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.timeout = timeout
        self.request = read_request(os.environ.get(REQUEST, "")) if request is None else dict(request)
        self.cache = None if cache is None else AnswerCache(cache)
        self._sample, self._asked = 0, Counter[str]()
        self._refused: set[str] = set()
        """Fields that the endpoint refuses; ``system`` stands for system messages."""
        self._clients: dict[asyncio.AbstractEventLoop, tuple[Any, AsyncIterator[None]]] = {}

    async def complete(
        self,
        messages: list[Message],
        on_text: Callable[[str], None] | None = None,
        temperature: float | None = None,
    ) -> Completion:
        """Answer one prompt; see `sqlbench.interfaces.Model.complete`."""
        if self.cache is None:
            return await self._complete(messages, on_text, temperature)
        key = self._key_of(messages, temperature)
        if (cached := self.cache.get(key)) is not None:
            if on_text is not None:
                on_text(cached.text)
            return cached
        answer = await self._complete(messages, on_text, temperature)
        if not answer.empty:
            self.cache.put(key, answer)
        return answer

    def numbered(self, sample: int) -> EndpointChatModel:
        """Return this model for one of several samples, each with its own answers in the cache."""
        model = copy(self)
        model._sample, model._asked = sample, Counter()
        return model

    def _key_of(self, messages: list[Message], temperature: float | None) -> str:
        fields = self._fields(frozenset(), temperature)
        pairs = [(m.role, m.content) for m in messages]
        key = AnswerCache.key({"url": self.base_url, "model": self.model, "fields": fields, "messages": pairs})
        if fields.get("temperature") == 0:
            return key
        self._asked[key] += 1
        return AnswerCache.key({"request": key, "sample": self._sample, "time": self._asked[key]})

    async def _complete(
        self, messages: list[Message], on_text: Callable[[str], None] | None, temperature: float | None
    ) -> Completion:
        import openai
        from langsmith import tracing_context

        start = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                with tracing_context(enabled=False):
                    answer, sent = await self._ask(messages, on_text, temperature)
        # The errors of the libraries are left out of the chain: they quote the request or what the server sent.
        except (TimeoutError, openai.APITimeoutError):
            raise ModelError(
                f"No answer within {self.timeout:g} s: {self._where}. Raise --timeout, or check the server."
            ) from None
        except openai.APIConnectionError as error:
            first: BaseException = error
            while first.__cause__ is not None:
                first = first.__cause__
            why = self._one_line(str(first)).rstrip(".")
            raise ModelError(f"Cannot reach {self._where}: {why}. Check the server and OPENAI_BASE_URL.") from None
        except openai.APIStatusError as error:
            hint = {401: "Check OPENAI_API_KEY.", 404: "Check the model's name and OPENAI_BASE_URL."}
            why = f"HTTP {error.status_code}: {self._one_line(error.response.text)}".rstrip(".")
            raise ModelError(
                f"Request refused by {self._where}: {why}. {hint.get(error.status_code, 'Check the request fields.')}"
            ) from None
        except Exception as error:
            why = f"{type(error).__name__}: {self._one_line(str(error))}".rstrip(".")
            raise ModelError(
                f"No usable chat completion from {self._where}: {why}. Check that it is an OpenAI-compatible endpoint."
            ) from None
        usage, text = answer.usage_metadata or {}, str(answer.text)
        return Completion(
            text=text[:MAX_CHARS],
            prompt_tokens=usage.get("input_tokens"),
            response_tokens=usage.get("output_tokens"),
            finish_reason="length" if len(text) > MAX_CHARS else _finish_reason(answer),
            seconds=time.perf_counter() - start,
            temperature=None if temperature == self.temperature else temperature,
            sent=sent,
        )

    async def _ask(
        self, messages: list[Message], on_text: Callable[[str], None] | None, temperature: float | None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the answer and the request fields that produced it, without those that the endpoint refused."""
        import openai

        refused = frozenset(self._refused)
        chat = await self._chat()
        while True:
            fields = self._fields(refused, temperature)
            merged = merge_messages(messages) if "system" in refused else messages
            prompt = [(m.role, m.content) for m in merged]
            try:
                if on_text is None:
                    answer = await chat.ainvoke(prompt, extra_body=fields)
                else:
                    answer = await _stream(chat, prompt, fields, on_text)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                more = refused | self._refused | self._named(error.response.text, fields, merged)
                if more == refused:
                    raise
                refused = more
            else:
                self._refused |= refused  # fields whose removal helped are left out from now on
                return answer, fields | ({"system": "in the user's message"} if "system" in refused else {})

    def _fields(self, refused: frozenset[str], temperature: float | None) -> dict[str, Any]:
        at_openai = not self.base_url or "api.openai.com" in self.base_url
        limits = [] if self.request.keys() & set(LIMITS) else LIMITS[::-1] if at_openai else LIMITS
        limit = {name: self.max_tokens for name in [name for name in limits if name not in refused][:1]}
        defaults = {"temperature": self.temperature if temperature is None else temperature} | limit
        fields = {name: value for name, value in defaults.items() if name not in refused} | self.request
        return {name: value for name, value in fields.items() if value is not None}

    def _named(self, refusal: str, fields: dict[str, Any], messages: list[Message]) -> set[str]:
        """Return the sent fields that a refusal names, but not those it wants smaller or the user asked for."""
        if _TOO_MUCH.search(refusal) and not _UNKNOWN.search(refusal):
            return set()
        # A quoted name before a colon is the request, repeated.
        mine = (name for name in fields if name not in self.request)
        named = {name for name in mine if re.search(rf"""\b{name}\b(?!\\*["']\s*:)""", refusal)}
        return named | {"system" for m in messages if m.role == "system" and _NO_SYSTEM.search(refusal)}

    @property
    def _where(self) -> str:
        return f"model '{self.model}' at {self.base_url or 'api.openai.com'}"

    async def _chat(self) -> Any:
        """Return the client of the running event loop, closed with it."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            import openai

            client = _client_class()(
                model=self.model,
                base_url=self.base_url,
                api_key=self._key or "none",
                default_query=self._query,
                temperature=None,  # named, since langchain has defaults of its own for some models
                timeout=openai.Timeout(self.timeout),  # an object, not a number: a number shares one global client
                max_retries=RETRIES,
                use_responses_api=False,
            )
            closing = _closed_at_the_end(client)
            await anext(closing)
            for closed in [k for k in self._clients if k.is_closed()]:
                del self._clients[closed]
            self._clients[loop] = client, closing
        return self._clients[loop][0]

    def _one_line(self, text: str, max_chars: int = 200) -> str:
        """Shorten a text of an endpoint or library to one line, without the credentials that some repeat."""
        shown = " ".join(mask(text[:4000], self._secrets).split())
        return shown[:max_chars].encode("utf-8", "replace").decode()


def read_request(text: str) -> dict[str, Any]:
    """Parse request fields from a JSON object; an empty text has none.

    Raises:
        ModelError: it is not a JSON object, or sets a field that only sqlbench can set.
    """
    try:
        fields = json.loads(text.strip() or "{}")
        json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()  # as it will be sent
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ModelError(
            f"Invalid request fields: {text[:60]!r}. Give a JSON object, for example "
            '{"temperature": null, "reasoning_effort": "low"}.'
        )
    if ours := sorted(fields.keys() & set(OURS)):
        raise ModelError(f"Invalid request fields: sqlbench itself sets {', '.join(ours)}. Leave them out.")
    return fields


def _plain(text: str) -> str:
    """Strip the white space and quotes that a setting was copied with."""
    return text.strip().strip("\"'").strip()


def _read_address(text: str) -> tuple[str | None, dict[str, str]]:
    """Split an address into what may be shown and its query, which may hold a token."""
    if not text:
        return None, {}
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = None
    if parts is None or "@" in text or not text.isprintable():
        raise ModelError(
            "Invalid OPENAI_BASE_URL: it holds a user, a password or an unreadable character. Write it as "
            "http://HOST:PORT/v1 and put the key into OPENAI_API_KEY."
        )
    return parts._replace(query="", fragment="").geturl(), dict(parse_qsl(parts.query))


def _read_key(text: str) -> str:
    key = re.sub(r"(?i)^bearer\b\s*", "", _plain(text))
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ModelError(
            "Invalid OPENAI_API_KEY: it holds a space, a line break, or a character outside ASCII such as a "
            "typographic quote. Copy the key again."
        )
    return key


def _finish_reason(answer: Any) -> str:
    """Return the reason that an answer ended; for one without text, the kind of content that it has instead."""
    reason = str(answer.response_metadata.get("finish_reason") or "stop").lower()
    if reason in _CUT:
        return "length"
    instead = () if str(answer.text).strip() else answer.additional_kwargs.get("instead", ())
    return next((what for what in ("refusal", "tool_calls", "reasoning") if what in instead), _filtered(reason))


def _filtered(said: str) -> str:
    return "content_filter" if said in ("content_filter", "safety") else "stop"


@cache
def _client_class() -> Any:
    """Return langchain's client, extended to note what a message holds instead of text.

    The client itself drops the fields in which servers give reasoning.
    """
    from langchain_openai import ChatOpenAI

    class Client(ChatOpenAI):
        def _create_chat_result(self, response: Any, generation_info: Any = None) -> Any:
            result = super()._create_chat_result(response, generation_info)
            body = response if isinstance(response, dict) else response.model_dump(warnings=False)
            _note(result.generations[0].message, body["choices"][0]["message"])
            return result

        def _convert_chunk_to_generation_chunk(self, chunk: Any, *arguments: Any) -> Any:
            result = super()._convert_chunk_to_generation_chunk(chunk, *arguments)
            if result is not None and chunk.get("choices"):
                _note(result.message, chunk["choices"][0]["delta"])
            return result

    return Client


def _note(message: Any, given: dict[str, Any]) -> None:
    parts = given.get("content")
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)} if isinstance(parts, list) else set()
    present = {
        "refusal": given.get("refusal") or "refusal" in kinds,
        "tool_calls": given.get("tool_calls") or given.get("function_call"),
        "reasoning": given.get("reasoning_content") or given.get("reasoning") or kinds & {"thinking", "reasoning"},
    }
    if instead := {what: True for what, there in present.items() if there}:
        message.additional_kwargs["instead"] = instead


async def _stream(
    chat: Any, prompt: list[tuple[str, str]], fields: dict[str, Any], on_text: Callable[[str], None]
) -> Any:
    """Return the answer after passing its pieces to `on_text`; stop at `MAX_CHARS` characters."""
    answer, remaining, pieces = None, MAX_CHARS, CleanPieces()
    async for chunk in chat.astream(prompt, extra_body=fields):
        if piece := pieces.add(str(chunk.text)[: max(remaining, 0)]):
            on_text(piece)
        remaining -= len(str(chunk.text))
        answer = chunk if answer is None else answer + chunk
        if remaining < 0:
            break
    if piece := pieces.end():
        on_text(piece)
    return answer


async def _closed_at_the_end(client: Any) -> AsyncIterator[None]:
    """Close a client when its event loop ends, because the loop then ends the generators that were begun on it."""
    try:
        yield
    finally:
        await client.root_async_client.close()

"""Any OpenAI-compatible endpoint as a model.

Every call ends within its deadline, and whatever goes wrong (refused, hanging, garbage, unknown model) is one
`ModelError` that names the endpoint and shows no key or password. Retries of transient failures are the client's own,
with growing pauses or those that the endpoint asks for, set once, here. Text is what the endpoint says, up to
`MAX_CHARS`; it gives no token ids, so trajectories of an endpoint can be evaluated but not trained on.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from sqlbench.agent.trajectory import Completion, Message
from sqlbench.errors import ModelError

RETRIES = 3
MAX_CHARS = 100_000
"""Of an answer, whatever its server thinks of ``max_tokens``: it is kept with the rollout and goes into prompts."""


class EndpointChatModel:
    """A model behind ``OPENAI_BASE_URL`` (default: OpenAI itself), with ``OPENAI_API_KEY``; ``.env`` is read too.

    Raises:
        ModelError: neither an address nor a key is set, or ``.env`` cannot be read.
    """

    def __init__(self, model: str, *, temperature: float = 0.0, max_tokens: int = 2048, timeout: float = 120.0) -> None:
        from dotenv import find_dotenv, load_dotenv

        file = find_dotenv(usecwd=True)
        try:
            load_dotenv(file)
        except UnicodeDecodeError as error:
            raise ModelError(f"cannot read {file}: {error}; save it as UTF-8") from error
        self.name = f"openai:{model}"
        self.family = "chat"
        self.model = model
        address = os.environ.get("OPENAI_BASE_URL", "").strip() or None
        self._key = os.environ.get("OPENAI_API_KEY", "").strip() or None
        if not (address or self._key):
            raise ModelError(
                f"cannot use {self.name}: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own "
                "(in the environment or in .env)"
            )
        self._headers: dict[str, str] = {}
        self._query: dict[str, str] = {}
        self._secrets = {self._key or ""}
        self.base_url = address and self._without_credentials(address)
        """The address without user, password and query, so that it can be shown."""
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.timeout = timeout
        self._clients: dict[asyncio.AbstractEventLoop, tuple[Any, AsyncIterator[None]]] = {}

    async def complete(self, messages: list[Message], on_text: Callable[[str], None] | None = None) -> Completion:
        """Answer one prompt; see `sqlbench.models.base.ChatModel.complete`."""
        import openai
        from langsmith import tracing_context

        start = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                with tracing_context(enabled=False):
                    prompt = [(m.role, m.content) for m in messages]
                    chat = await self._chat()
                    answer = await (chat.ainvoke(prompt) if on_text is None else _stream(chat, prompt, on_text))
        # The errors of the libraries are left out of the chain: they quote the request or what the server sent.
        except (TimeoutError, openai.APITimeoutError):
            raise ModelError(f"{self._where} did not answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            first: BaseException = error
            while first.__cause__ is not None:
                first = first.__cause__
            why = self._one_line(str(first))
            raise ModelError(
                f"cannot reach {self._where} ({why}); is the server running, and is OPENAI_BASE_URL right?"
            ) from None
        except openai.APIStatusError as error:
            hint = {401: "; check OPENAI_API_KEY", 404: "; check the model's name and OPENAI_BASE_URL"}
            raise ModelError(
                f"{self._where} refused the request: HTTP {error.status_code}: {self._one_line(error.response.text)}"
                f"{hint.get(error.status_code, '')}"
            ) from None
        except Exception as error:
            raise ModelError(
                f"{self._where} gave no usable chat completion: {type(error).__name__}: {self._one_line(str(error))}"
            ) from None
        usage, text = answer.usage_metadata or {}, str(answer.text)
        cut = len(text) > MAX_CHARS or answer.response_metadata.get("finish_reason") == "length"
        return Completion(
            text=text[:MAX_CHARS].encode("utf-8", "replace").decode(),
            prompt_tokens=usage.get("input_tokens"),
            response_tokens=usage.get("output_tokens"),
            finish_reason="length" if cut else "stop",
            seconds=time.perf_counter() - start,
        )

    @property
    def _where(self) -> str:
        return f"model '{self.model}' at {self.base_url or 'api.openai.com'}"

    async def _chat(self) -> Any:
        """The client of the running event loop, closed with it."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            import openai
            from langchain_openai import ChatOpenAI

            # Servers other than OpenAI's know the limit as max_tokens only; OpenAI's newer models refuse that name.
            limit: dict[str, Any] = {"max_completion_tokens": self.max_tokens}
            if self.base_url and "api.openai.com" not in self.base_url:
                limit = {"extra_body": {"max_tokens": self.max_tokens}}
            client = ChatOpenAI(
                model=self.model,
                base_url=self.base_url,
                api_key=self._key or "none",
                default_headers=self._headers,
                default_query=self._query,
                temperature=self.temperature,
                timeout=openai.Timeout(self.timeout),  # an object, not a number: a number shares one global client
                max_retries=RETRIES,
                **limit,
            )
            closing = _closed_at_the_end(client)
            await anext(closing)
            open_ones = {k: v for k, v in self._clients.items() if not k.is_closed()}
            self._clients = open_ones | {loop: (client, closing)}
        return self._clients[loop][0]

    def _without_credentials(self, address: str) -> str:
        """The address as it may be shown; what it holds of user, password and query is sent along in other ways."""
        try:
            parts = urlsplit(address)
            user, password, host = parts.username, parts.password, parts.netloc.rpartition("@")[2]
        except ValueError:
            host = "@"
        if "@" in host or "@" in parts.path:
            raise ModelError(
                "cannot read OPENAI_BASE_URL: in its password write @ as %40, / as %2F, % as %25 and so on"
            )
        if user is not None:
            pair = base64.b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()
            self._headers["Authorization"] = f"Basic {pair}"
            self._secrets.add(pair)
        self._query.update(parse_qsl(parts.query))
        self._secrets |= {user or "", password or "", unquote(password or ""), *self._query.values()}
        return parts._replace(netloc=host, query="", fragment="").geturl()

    def _one_line(self, text: str, max_chars: int = 200) -> str:
        """The beginning of what an endpoint or library said, without the credentials that some repeat."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            if len(secret) > 5:  # a shorter one would be found in any text
                text = text.replace(secret, "***")
        return " ".join(text.split())[:max_chars]


async def _stream(chat: Any, prompt: list[tuple[str, str]], on_text: Callable[[str], None]) -> Any:
    """The answer, whose pieces `on_text` got before; what is longer than `MAX_CHARS` is not waited for."""
    answer, left = None, MAX_CHARS
    async for chunk in chat.astream(prompt):
        if piece := str(chunk.text)[: max(left, 0)]:
            on_text(piece)
        left -= len(str(chunk.text))
        answer = chunk if answer is None else answer + chunk
        if left < 0:
            break
    return answer


async def _closed_at_the_end(client: Any) -> AsyncIterator[None]:
    """Closes a client when its event loop ends, which is when the loop ends the generators that were begun on it."""
    try:
        yield
    finally:
        await client.root_async_client.close()

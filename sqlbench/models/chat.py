"""Any OpenAI-compatible endpoint as a model.

Every call ends within its deadline, and whatever goes wrong (refused, hanging, garbage, unknown model) is one
`ModelError` that names the endpoint. Retries of transient failures are the client's own, set once, here. Text is what
the endpoint says; it gives no token ids, so trajectories of an endpoint can be evaluated but not trained on.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from sqlbench.agent.trajectory import Completion, Message
from sqlbench.errors import ModelError

RETRIES = 2


class EndpointChatModel:
    """A model behind ``OPENAI_BASE_URL`` (default: OpenAI itself), with ``OPENAI_API_KEY``; ``.env`` is read too.

    Raises:
        ModelError: neither an address nor a key is set.
    """

    def __init__(self, model: str, *, temperature: float = 0.0, max_tokens: int = 2048, timeout: float = 120.0) -> None:
        from dotenv import find_dotenv, load_dotenv

        load_dotenv(find_dotenv(usecwd=True))
        self.name = f"openai:{model}"
        self.family = "chat"
        self.model = model
        self.base_url = os.environ.get("OPENAI_BASE_URL") or None
        self._key = os.environ.get("OPENAI_API_KEY") or None
        if not (self.base_url or self._key):
            raise ModelError(
                f"cannot use {self.name}: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own "
                "(in the environment or in .env)"
            )
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.timeout = timeout
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def complete(self, messages: list[Message], on_text: Callable[[str], None] | None = None) -> Completion:
        """Answer one prompt; see `sqlbench.models.base.ChatModel.complete`."""
        import openai
        from langsmith import tracing_context

        start = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                with tracing_context(enabled=False):
                    prompt = [(m.role, m.content) for m in messages]
                    answer = await (self._chat().ainvoke(prompt) if on_text is None else self._stream(prompt, on_text))
        except (TimeoutError, openai.APITimeoutError) as error:
            raise ModelError(f"{self._where} did not answer within {self.timeout:g} s") from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise ModelError(
                f"cannot reach {self._where} ({cause}); is the server running, and is OPENAI_BASE_URL right?"
            ) from error
        except openai.APIStatusError as error:
            hint = {401: "; check OPENAI_API_KEY", 404: "; check the model's name and OPENAI_BASE_URL"}
            raise ModelError(
                f"{self._where} refused the request: HTTP {error.status_code}: {_one_line(error.response.text)}"
                f"{hint.get(error.status_code, '')}"
            ) from error
        except Exception as error:
            raise ModelError(
                f"{self._where} gave no usable chat completion: {type(error).__name__}: {_one_line(str(error))}"
            ) from error
        usage = answer.usage_metadata or {}
        return Completion(
            text=str(answer.text).encode("utf-8", "replace").decode(),
            prompt_tokens=usage.get("input_tokens"),
            response_tokens=usage.get("output_tokens"),
            finish_reason="length" if answer.response_metadata.get("finish_reason") == "length" else "stop",
            seconds=time.perf_counter() - start,
        )

    async def _stream(self, prompt: list[tuple[str, str]], on_text: Callable[[str], None]) -> Any:
        """The whole answer, whose pieces `on_text` got before."""
        answer = None
        async for chunk in self._chat().astream(prompt):
            if piece := str(chunk.text):
                on_text(piece)
            answer = chunk if answer is None else answer + chunk
        return answer

    @property
    def _where(self) -> str:
        return f"model '{self.model}' at {self.base_url or 'api.openai.com'}"

    def _chat(self) -> Any:
        """The client of the running event loop; its connections must not outlive that loop."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            import openai
            from langchain_openai import ChatOpenAI

            # Servers other than OpenAI's know the limit as max_tokens only; OpenAI's newer models refuse that name.
            limit: dict[str, Any] = {"max_completion_tokens": self.max_tokens}
            if self.base_url and "api.openai.com" not in self.base_url:
                limit = {"extra_body": {"max_tokens": self.max_tokens}}
            self._client = ChatOpenAI(
                model=self.model,
                base_url=self.base_url,
                api_key=self._key or "none",
                temperature=self.temperature,
                timeout=openai.Timeout(self.timeout),  # an object, not a number: a number shares one global client
                max_retries=RETRIES,
                **limit,
            )
            self._loop = loop
        return self._client


def _one_line(text: str, max_chars: int = 200) -> str:
    return " ".join(text.split())[:max_chars]

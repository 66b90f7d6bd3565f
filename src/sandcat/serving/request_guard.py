"""What stands before transformers' own server, which has no keys and no limits, and lets anyone unload the model.

It lets through what that server does right, one request at a time (it computes one at a time anyhow, and a seed is one
for all there), and answers the rest as an OpenAI client expects: 400, 401 or 404 with the reason.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sandcat.errors import SandcatError

ROUTES = ("/v1/chat/completions", "/v1/completions")
UNSUPPORTED = (
    "audio", "best_of", "echo", "function_call", "functions", "generation_config", "logit_bias", "logprobs",
    "modalities", "prediction", "presence_penalty", "response_format", "suffix", "tool_choice", "tools", "top_logprobs",
    "web_search_options",
)  # fmt: skip
"""What transformers' server ignores or does otherwise; null, false and 0 are as good as nothing."""
BODY_BYTES = 2**24


@dataclass(frozen=True)
class Limits:
    """Tokens of prompt and answer together, and of an answer (longer ones are cut), at most."""

    context: int
    new_tokens: int


class Refused(Exception):
    """An answer instead of the model's: the HTTP status, a message, and the field that it is about."""

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status, field

    def body(self) -> dict[str, Any]:
        kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.status}}


class Guard:
    """An ASGI application before another.

    Args:
        name: what clients call the model.
        target: what the application calls it.
        count: how many tokens a prompt has, a text or chat messages; raises a `SandcatError` if it cannot be read.
    """

    def __init__(self, app, *, name: str, target: str, count: Callable[[Any], int], limits: Limits, key: str | None):
        self.app, self.name, self.target, self.count, self.limits, self.key = app, name, target, count, limits, key
        self.turn = asyncio.Lock()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        try:
            self.check_key(dict(scope["headers"]))
            if scope["path"] == "/v1/models" and scope["method"] == "GET":
                await answer(send, 200, {"object": "list", "data": [self.entry()]})
                return
            if scope["path"] not in ROUTES or scope["method"] != "POST":
                raise Refused(404, f"{scope['method']} {scope['path']}: no such route. Known: {', '.join(ROUTES)}.")
            asked = self.checked(await read(receive), chat=scope["path"] == ROUTES[0])
        except Refused as refused:
            await answer(send, refused.status, refused.body())
            return
        async with self.turn:
            await self.app(scope, replay(json.dumps(asked).encode(), receive), send)

    def check_key(self, headers: dict[bytes, bytes]) -> None:
        """Raises Refused (401) where a key is wanted and not given."""
        given = headers.get(b"authorization", b"")
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Refused(401, "no API key, or a wrong one: send it as Authorization: Bearer KEY.")

    def entry(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        made = {"created": int(time.time()), "max_model_len": self.limits.context}
        return {"id": self.name, "object": "model", "owned_by": "sandcat", **made}

    def checked(self, body: bytes, *, chat: bool) -> dict[str, Any]:
        """The request as the application is to see it."""
        try:
            asked = json.loads(body)
        except ValueError:
            raise Refused(400, "the body is not valid JSON.") from None
        if not isinstance(asked, dict):
            raise Refused(400, "the body is not a JSON object.")
        asked = {field: value for field, value in asked.items() if value is not None}
        if asked.get("model", self.name) != self.name:
            raise Refused(404, f"there is no model {asked['model']!r} here, only {self.name!r}.", "model")
        for field in UNSUPPORTED:
            if asked.pop(field, None):
                raise Refused(400, f"{field} is not supported by transformers' server; vLLM has it.", field)
        if asked.get("n", 1) != 1:
            raise Refused(400, "n: transformers' server gives one answer; ask again, or use vLLM.", "n")
        self.check_numbers(asked)
        stop = asked.get("stop", [])
        if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(s, str) and s for s in stop)):
            raise Refused(400, "stop is neither a text nor a list of texts.", "stop")
        prompt = asked.get("messages" if chat else "prompt")
        check_messages(prompt) if chat else check_prompt(prompt)
        try:
            tokens, room = self.count(prompt), self.limits.context
        except SandcatError as error:
            raise Refused(400, str(error), "messages" if chat else "prompt") from None
        if tokens >= room:
            raise Refused(
                400, f"the prompt has {tokens} tokens, and the context holds {room} with the answer.", "prompt"
            )
        wanted = asked.pop("max_completion_tokens", asked.get("max_tokens"))
        if wanted is not None and tokens + wanted > room:
            raise Refused(400, f"{tokens} tokens of prompt and {wanted} new ones exceed the {room} here.", "max_tokens")
        most = min(self.limits.new_tokens, room - tokens)
        return {**asked, "model": self.target, "max_tokens": min(most, wanted or most)}

    def check_numbers(self, asked: dict[str, Any]) -> None:
        """Raises Refused (400) for a number out of its range."""
        ranges = {"temperature": (0, 2), "top_p": (1e-6, 1), "frequency_penalty": (-2, 2)}
        for field, (low, high) in ranges.items():
            value = asked.get(field, high)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise Refused(400, f"{field} is {value!r}: give a number from {low} to {high}.", field)
        for field, low in (("max_tokens", 1), ("max_completion_tokens", 1), ("seed", -(2**63))):
            value = asked.get(field, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
                raise Refused(400, f"{field} is {value!r}: give a whole number from {low} on.", field)


def check_messages(messages: Any) -> None:
    """Raises Refused (400) for what is no conversation."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: give a list of at least one message.", "messages")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise Refused(400, "messages: each is an object with a role and a content, both texts.", "messages")


def check_prompt(prompt: Any) -> None:
    """Raises Refused (400) for what is no text."""
    if not isinstance(prompt, str) or not prompt:
        raise Refused(400, "prompt: give one text (several are several requests here).", "prompt")


async def read(receive) -> bytes:
    """The body of a request; raises Refused (400, 413) if the client leaves, or if it is too large."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client left.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > BODY_BYTES:
            raise Refused(413, f"the body is larger than {BODY_BYTES} bytes.")
        if not message.get("more_body"):
            return b"".join(parts)


def replay(body: bytes, receive):
    """What receives a body that was read before, and then what comes after it."""
    sent = False

    async def again():
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def answer(send, status: int, body: dict[str, Any]) -> None:
    """Sends a JSON answer."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})

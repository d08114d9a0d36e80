"""Bad input over raw sockets: each is refused in OpenAI's envelope, with value and limit, and the server serves on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from shoal.router.schema import ChatRequest, parse
from shoal.runtime.errors import InvalidRequest

from .fakes import MAX_MODEL_LEN, VOCAB_SIZE, Reply, Server, request_bytes

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
HUGE = 2**65
LONG = "x" * 3000


class Case(NamedTuple):
    name: str
    raw: bytes
    status: int
    says: tuple[str, ...]  # what the message must name: the value, the limit


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", "max_tokens": 2} | fields


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


def post(path: str, body: Any, **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request_bytes("POST", path, data, **headers)


def say(message: Any) -> dict[str, Any]:
    return chat(messages=[message])


def json_cases() -> Iterator[Case]:
    good = json.dumps(completion()).encode()
    for name, body, says in [
        ("empty body", b"", ("not valid JSON",)),
        ("spaces", b"   ", ("not valid JSON",)),
        ("no json", b"hello", ("not valid JSON", "column 1")),
        ("half an object", good[:-1], ("not valid JSON",)),
        ("trailing comma", b'{"model": "tiny",}', ("not valid JSON",)),
        ("single quotes", b"{'model': 'tiny'}", ("not valid JSON",)),
        ("two objects", good + good, ("Extra data",)),
        ("control character in a string", b'{"model": "ti\nny"}', ("control character",)),
        ("comment", b'{"model": "tiny" /* */}', ("not valid JSON",)),
        ("bom", b"\xef\xbb\xbf" + good, ("not valid JSON",)),
        ("utf-16", good.decode().encode("utf-16"), ("0xff", "offset 0")),
        ("invalid utf-8", b'{"model": "\xff"}', ("0xff", "offset 11")),
        ("overlong utf-8", b'{"model": "\xc0\xaf"}', ("0xc0",)),
        ("surrogate in utf-8", b'{"model": "\xed\xa0\x80"}', ("0xed",)),
        ("cut utf-8", b'{"model": "\xe2\x82', ("0xe2",)),
        ("array", b"[]", ("an array",)),
        ("string", b'"hi"', ("a string",)),
        ("number", b"1", ("a number",)),
        ("null", b"null", ("null",)),
        ("true", b"true", ("a boolean",)),
        ("NaN", b'{"model":"tiny","prompt":"x","temperature":NaN}', ("NaN", "finite")),
        ("Infinity", b'{"model":"tiny","prompt":"x","temperature":Infinity}', ("Infinity", "finite")),
        ("-Infinity", b'{"model":"tiny","prompt":"x","top_p":-Infinity}', ("-Infinity", "finite")),
        ("1e999", b'{"model":"tiny","prompt":"x","top_p":1e999}', ("1e999", "finite")),
        ("5000 digits", b'{"model":"tiny","prompt":"x","seed":' + b"9" * 5000 + b"}", ("5000 digits", "40")),
        ("duplicate key", b'{"model":"tiny","prompt":"x","prompt":"y"}', ("'prompt'", "twice")),
        ("duplicate key deep", b'{"model":"tiny","prompt":"x","logit_bias":{"1":1,"1":2}}', ("'1'", "twice")),
        ("100k brackets", b"[" * 100_000, ("65 levels", "64")),
        ("deep objects", b'{"a":' * 5000 + b"1" + b"}" * 5000, ("65 levels", "64")),
        ("deep in a field", b'{"model":"tiny","prompt":' + b"[" * 70 + b"]" * 70 + b"}", ("65 levels", "64")),
        ("lone high surrogate", b'{"model":"tiny","prompt":"\\ud800"}', ("lone surrogate", "ud800")),
        ("lone low surrogate", b'{"model":"tiny","prompt":"a\\udc00b"}', ("lone surrogate", "udc00")),
        ("surrogates reversed", b'{"model":"tiny","prompt":"\\udc00\\ud800"}', ("lone surrogate",)),
        ("surrogate in a key", b'{"model":"tiny","prompt":"a","\\ud800":1}', ("lone surrogate",)),
        ("surrogate in a message", b'{"model":"tiny","messages":[{"content":"\\ud83d"}]}', ("lone surrogate",)),
    ]:
        yield Case(name, post(COMPLETIONS, body), 400, says)
        if name in ("empty body", "no json", "100k brackets", "NaN", "lone high surrogate"):
            for path in (CHAT, TOKENIZE, DETOKENIZE):
                yield Case(f"{name} at {path}", post(path, body), 400, says)


def http_cases() -> Iterator[Case]:
    good = json.dumps(completion()).encode()
    big = b'{"model":"tiny","prompt":"' + b"a" * (8 * 2**20) + b'"}'
    for name, media in [
        ("no content type", ""),
        ("text", "text/plain"),
        ("form", "application/x-www-form-urlencoded"),
        ("multipart", "multipart/form-data; boundary=x"),
        ("xml", "application/xml"),
        ("latin-1", "application/json; charset=latin-1"),
        ("two types", "application/json, text/plain"),
        ("long type", "a" * 5000),
    ]:
        yield Case(name, post(COMPLETIONS, good, content_type=media), 415, ("application/json",))
    yield Case("gzip", post(COMPLETIONS, good, content_encoding="gzip"), 415, ("gzip", "identity"))
    yield Case("body too large", post(COMPLETIONS, big), 413, ("8388636", "8388608", "max_body_bytes"))
    declared = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % COMPLETIONS.encode()
    yield Case("declared too large", declared + b"content-length: 99999999999\r\n\r\n", 413, ("99999999999", "8388608"))
    chunk = b"%x\r\n%b\r\n" % (2**20, b"a" * 2**20)
    chunked = declared + b"transfer-encoding: chunked\r\n\r\n"
    yield Case("chunked too large", chunked + chunk * 10, 413, ("at least", "8388608"))
    yield Case("chunked not json", chunked + b"3\r\nabc\r\n0\r\n\r\n", 400, ("not valid JSON",))
    yield Case("chunked empty", chunked + b"0\r\n\r\n", 400, ("not valid JSON",))
    many = {f"x-{i}": "1" for i in range(200)}
    yield Case("many headers", request_bytes("GET", "/version", None, **many), 400, ("201 headers", "100"))
    yield Case("long header", request_bytes("GET", "/version", None, x="a" * 20_000), 400, ("16384",))
    for method, path, status, says in [
        ("GET", CHAT, 405, ("'GET'", "POST")),
        ("PUT", CHAT, 405, ("'PUT'", "POST")),
        ("DELETE", COMPLETIONS, 405, ("'DELETE'", "POST")),
        ("PATCH", TOKENIZE, 405, ("'PATCH'", "POST")),
        ("OPTIONS", CHAT, 405, ("'OPTIONS'",)),
        ("POST", "/v1/models", 405, ("'POST'", "GET")),
        ("POST", "/health", 405, ("'POST'", "GET")),
        ("POST", "/metrics", 405, ("'POST'", "GET")),
        ("DELETE", "/v1/models/tiny", 405, ("'DELETE'", "GET")),
        ("TRACE", "/version", 405, ("'TRACE'", "GET")),
        ("GET", "/", 404, ("'/'",)),
        ("GET", "/v1", 404, ("'/v1'",)),
        ("GET", "/v2/models", 404, ("'/v2/models'",)),
        ("GET", "/v1/models/nobody", 404, ("'nobody'", "tiny")),
        ("GET", "/v1/models/a/b/c", 404, ("'a/b/c'",)),
        ("GET", "/v1/models/%F0%9F%92%A9", 404, ("tiny",)),
        ("POST", "/v1/embeddings", 404, ("'/v1/embeddings'",)),
        ("POST", "/v1/chat/completions/", 404, ("no route",)),
        ("POST", "//v1/chat/completions", 404, ("no route",)),
        ("GET", "/../etc/passwd", 404, ("no route",)),
        ("GET", "/" + "a" * 5000, 404, ("no route",)),
        ("GET", "/%00%ff%fe", 404, ("no route",)),
    ]:
        body = b"{}" if method in ("POST", "PUT", "PATCH") else None
        yield Case(f"{method} {path[:40]}", request_bytes(method, path, body), status, says)


def shared_cases() -> Iterator[Case]:
    """Fields of both generating routes, on both."""
    for field, value, says in [
        ("model", None, ("model",)),
        ("model", 5, ("model is 5",)),
        ("model", [], ("model is []",)),
        ("model", "x" * 600, ("600 characters", "512")),
        ("n", 0, ("n is 0", "at least 1")),
        ("n", -1, ("n is -1", "at least 1")),
        ("n", 129, ("n is 129", "128")),
        ("n", HUGE, (str(HUGE), "128")),
        ("n", "2", ("n is '2'", "integer")),
        ("n", 1.5, ("n is 1.5", "integer")),
        ("n", True, ("n is True", "integer")),
        ("temperature", -0.1, ("-0.1", "0.0")),
        ("temperature", 101, ("101", "100")),
        ("temperature", "hot", ("'hot'", "number")),
        ("temperature", True, ("True", "number")),
        ("temperature", [1], ("[1]", "number")),
        ("top_p", 0, ("top_p is 0", "above 0")),
        ("top_p", 1.01, ("1.01", "1.0")),
        ("top_p", {}, ("{}", "number")),
        ("top_k", -2, ("top_k is -2", "0")),
        ("top_k", HUGE, (str(HUGE), str(2**31 - 1))),
        ("top_k", 1.5, ("1.5", "integer")),
        ("min_p", 2, ("min_p is 2", "1.0")),
        ("min_p", -1, ("min_p is -1", "0.0")),
        ("seed", HUGE, (str(HUGE), str(2**63 - 1))),
        ("seed", -HUGE, (str(-HUGE),)),
        ("seed", "1", ("'1'", "integer")),
        ("max_tokens", -1, ("-1",)),
        ("max_tokens", HUGE, (str(HUGE), str(2**31 - 1))),
        ("max_tokens", 1.5, ("1.5", "integer")),
        ("max_tokens", "5", ("'5'", "integer")),
        ("max_tokens", MAX_MODEL_LEN + 1, (str(MAX_MODEL_LEN + 1), str(MAX_MODEL_LEN))),
        ("max_tokens", 2**31 - 1, (str(2**31 - 1), str(MAX_MODEL_LEN))),
        ("min_tokens", 3, ("min_tokens is 3", "max_tokens 2")),
        ("min_tokens", -1, ("-1",)),
        ("presence_penalty", 2.1, ("2.1", "2.0")),
        ("presence_penalty", -3, ("-3", "-2.0")),
        ("frequency_penalty", 1e300, ("1e+300", "2.0")),
        ("repetition_penalty", 0, ("repetition_penalty is 0", "above 0")),
        ("repetition_penalty", 1000, ("1000", "100")),
        ("stop", 5, ("5",)),
        ("stop", "", ("one of 0", "256")),
        ("stop", ["a"] * 17, ("17", "16")),
        ("stop", ["x" * 257], ("one of 257", "256")),
        ("stop", [1], ("1",)),
        ("stop", {"a": 1}, ("stop",)),
        ("stop_token_ids", [-1], ("-1",)),
        ("stop_token_ids", [VOCAB_SIZE], (str(VOCAB_SIZE), str(VOCAB_SIZE - 1))),
        ("stop_token_ids", ["a"], ("'a'",)),
        ("stop_token_ids", [1] * 65, ("65", "64")),
        ("stop_token_ids", [HUGE], (str(HUGE),)),
        ("logit_bias", {"a": 1}, ("'a'", str(VOCAB_SIZE - 1))),
        ("logit_bias", {"-1": 1}, ("'-1'",)),
        ("logit_bias", {str(VOCAB_SIZE): 1}, (str(VOCAB_SIZE), str(VOCAB_SIZE - 1))),
        ("logit_bias", {"9" * 100: 1}, ("999", str(VOCAB_SIZE - 1))),
        ("logit_bias", {"1": 101}, ("101", "100")),
        ("logit_bias", {"1": "x"}, ("'x'",)),
        ("logit_bias", [1], ("[1]",)),
        ("stream", "yes", ("'yes'", "boolean")),
        ("stream", 1, ("stream is 1", "boolean")),
        ("stream_options", {"include_usage": True}, ("stream: true",)),
        ("stream_options", 5, ("5",)),
        ("ignore_eos", 1, ("ignore_eos is 1", "boolean")),
        ("user", 5, ("user is 5", "string")),
        ("metadata", "x", ("'x'",)),
        ("truncate_prompt_tokens", 0, ("truncate_prompt_tokens is 0", "512")),
        ("truncate_prompt_tokens", HUGE, (str(HUGE), "512")),
        ("prompt_logprobs", 21, ("21", "20")),
        ("prompt_logprobs", -1, ("-1",)),
        ("priority", HUGE, (str(HUGE),)),
        ("cache_salt", "", ("''",)),
        ("cache_salt", 7, ("7", "string")),
        ("timeout", 0, ("timeout is 0", "greater than 0")),
        ("timeout", 1e9, ("1e+09", "3600")),
        ("response_format", "json", ("'json'",)),
        ("response_format", {"type": "yaml"}, ("'yaml'",)),
        ("response_format", {"type": "json_schema"}, ("schema",)),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, ("schema",)),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": "y"}}, ("'y'",)),
        ("structured_outputs", {}, ("exactly one", "none")),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}, ("exactly one", "regex")),
        ("structured_outputs", {"regx": "a"}, ("regx",)),
        ("structured_outputs", {"choice": "a"}, ("'a'",)),
        ("best_of", 3, ("best_of is 3", "n")),
        ("logits_processors", ["x"], ("logits_processors",)),
        ("guided_json", {}, ("guided_json", "structured_outputs")),
        ("allowed_token_ids", [1], ("allowed_token_ids",)),
        ("use_beam_search", True, ("use_beam_search",)),
    ]:
        for path, body in ((CHAT, chat), (COMPLETIONS, completion)):
            yield Case(f"{field}={str(value)[:40]} at {path}", post(path, body(**{field: value})), 400, says)
    for path, body in ((CHAT, chat), (COMPLETIONS, completion)):
        yield Case(f"no model at {path}", post(path, without(body(), "model")), 400, ("model is missing",))
        yield Case(f"unknown model at {path}", post(path, body(model="gpt-9")), 404, ("'gpt-9'", "tiny"))
        yield Case(f"long unknown model at {path}", post(path, body(model="g" * 500)), 404, ("tiny",))
        streamed = body(stream=True, temperature=-5)
        yield Case(f"bad stream at {path}", post(path, streamed), 400, ("-5",))
        yield Case(f"long value at {path}", post(path, body(stream=LONG)), 400, ("3000 characters",))


def chat_cases() -> Iterator[Case]:
    hi = {"role": "user", "content": "hi"}
    for name, body, says in [
        ("no messages", without(chat(), "messages"), ("messages is missing",)),
        ("messages null", chat(messages=None), ("None",)),
        ("messages empty", chat(messages=[]), ("[]", "at least 1")),
        ("messages a string", chat(messages="hi"), ("'hi'",)),
        ("messages an object", chat(messages=hi), ("messages",)),
        ("too many messages", chat(messages=[hi] * 2049), ("2049", "2048")),
        ("message a string", say("hi"), ("messages.0", "'hi'")),
        ("no role", say({"content": "hi"}), ("messages.0.role", "user")),
        ("unknown role", say({"role": "wizard", "content": "hi"}), ("'wizard'", "assistant")),
        ("role a number", say({"role": 1, "content": "hi"}), ("role is 1",)),
        ("role a list", say({"role": ["user"], "content": "hi"}), ("['user']",)),
        ("tool role", say({"role": "tool", "content": "4"}), ("'tool'", "not support")),
        ("function role", say({"role": "function", "content": "4"}), ("'function'", "not support")),
        ("no content", say({"role": "user"}), ("messages.0.content", "None")),
        ("content a number", say({"role": "user", "content": 5}), ("content is 5",)),
        ("content an object", say({"role": "user", "content": {"text": "hi"}}), ("messages.0.content",)),
        ("content empty array", say({"role": "user", "content": []}), ("empty",)),
        ("part a string", say({"role": "user", "content": ["hi"]}), ("content.0", "'hi'")),
        ("part without type", say({"role": "user", "content": [{"text": "hi"}]}), ("content.0.type",)),
        ("text part without text", say({"role": "user", "content": [{"type": "text"}]}), ("content.0.text",)),
        ("image", say({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}), ("'image_url'",)),
        ("audio part", say({"role": "user", "content": [{"type": "input_audio"}]}), ("'input_audio'",)),
        ("name a number", say(hi | {"name": 5}), ("name is 5",)),
        ("tool calls", say({"role": "assistant", "content": "x", "tool_calls": [{}]}), ("tool_calls",)),
        ("second message bad", chat(messages=[hi, {"role": "x", "content": "y"}]), ("messages.1.role",)),
        ("prompt over the context", say(hi | {"content": "a" * 600}), ("512", "max-model-len")),
        ("max_tokens 0", chat(max_tokens=0), ("max_tokens is 0", "at least 1")),
        ("max_completion_tokens 0", chat(max_tokens=None, max_completion_tokens=0), ("0", "at least 1")),
        ("both maxima", chat(max_completion_tokens=3), ("2", "3")),
        ("logprobs a number", chat(logprobs=2), ("logprobs is 2", "boolean")),
        ("top_logprobs alone", chat(top_logprobs=2), ("top_logprobs is 2", "logprobs")),
        ("top_logprobs 21", chat(logprobs=True, top_logprobs=21), ("top_logprobs is 21", "20")),
        ("top_logprobs -1", chat(logprobs=True, top_logprobs=-1), ("-1",)),
        ("prompt instead", chat(prompt="hi"), ("prompt", "route")),
        ("echo", chat(echo=True), ("echo",)),
        ("add_special_tokens", chat(add_special_tokens=True), ("add_special_tokens",)),
        ("continue and prompt", chat(continue_final_message=True, add_generation_prompt=True), ("exclude",)),
        ("template kwargs a list", chat(chat_template_kwargs=[1]), ("[1]",)),
        ("the template raises", chat(chat_template_kwargs={"explode": True}), ("explode",)),
        ("chat_template", chat(chat_template="{{ 1 }}"), ("chat_template",)),
        ("tools", chat(tools=[{"type": "function"}]), ("tools",)),
        ("tool_choice", chat(tool_choice="required"), ("'required'",)),
        ("functions", chat(functions=[{"name": "f"}]), ("functions",)),
        ("function_call", chat(function_call="auto"), ("'auto'",)),
        ("audio", chat(audio={"voice": "x"}), ("audio",)),
        ("modalities", chat(modalities=["text", "audio"]), ("modalities",)),
        ("prediction", chat(prediction={"type": "content"}), ("prediction",)),
        ("web search", chat(web_search_options={}), ("web_search_options",)),
        ("reasoning_effort", chat(reasoning_effort="high"), ("'high'",)),
        ("verbosity", chat(verbosity="low"), ("'low'",)),
        ("store", chat(store=True), ("store is True",)),
        ("service_tier", chat(service_tier="flex"), ("'flex'",)),
        ("streamed prompt logprobs", chat(stream=True, prompt_logprobs=1), ("prompt_logprobs",)),
        ("usage stats", chat(stream=True, stream_options={"continuous_usage_stats": True}), ("continuous",)),
    ]:
        yield Case(name, post(CHAT, body), 400, says)


def completion_cases() -> Iterator[Case]:
    for name, body, says in [
        ("no prompt", without(completion(), "prompt"), ("prompt", "None")),
        ("prompt null", completion(prompt=None), ("None",)),
        ("prompt empty", completion(prompt=""), ("''", "not empty")),
        ("prompt empty list", completion(prompt=[]), ("[]", "not empty")),
        ("prompt with an empty string", completion(prompt=["a", ""]), ("prompt.1", "not empty")),
        ("prompt with an empty list", completion(prompt=[[1], []]), ("prompt.1", "not empty")),
        ("prompt a number", completion(prompt=5), ("prompt is 5",)),
        ("prompt an object", completion(prompt={"text": "hi"}), ("prompt is {",)),
        ("prompt a boolean", completion(prompt=True), ("True",)),
        ("prompt of booleans", completion(prompt=[True]), ("True",)),
        ("prompt of floats", completion(prompt=[1.5]), ("1.5",)),
        ("prompt of nulls", completion(prompt=[None]), ("None",)),
        ("prompt mixed", completion(prompt=["a", 1]), ("prompt.1 is 1",)),
        ("prompt mixed ids", completion(prompt=[1, "a"]), ("'a'",)),
        ("prompt mixed lists", completion(prompt=[[1], "a"]), ("prompt.1 is 'a'",)),
        ("prompt too deep", completion(prompt=[[[1]]]), ("prompt.0", "[1]")),
        ("id negative", completion(prompt=[-1]), ("-1", str(VOCAB_SIZE - 1))),
        ("id over the vocabulary", completion(prompt=[5, VOCAB_SIZE]), (str(VOCAB_SIZE), str(VOCAB_SIZE - 1))),
        ("id huge", completion(prompt=[[HUGE]]), (str(HUGE), str(VOCAB_SIZE - 1))),
        ("too many prompts", completion(prompt=["a"] * 513), ("513", "512")),
        ("too many choices", completion(prompt=["a"] * 100, n=20), ("2000", "1024")),
        ("prompt over the context", completion(prompt="a" * 600), ("600", "512", "max-model-len")),
        ("ids over the context", completion(prompt=[5] * 513), ("513", "512")),
        ("prompt fills the context", completion(prompt=[5] * 512), ("512 tokens", "max_tokens is 2")),
        ("second prompt over", completion(prompt=["a", "a" * 600]), ("600", "512")),
        ("suffix", completion(suffix="x"), ("suffix is 'x'",)),
        ("empty suffix", completion(suffix=""), ("suffix",)),
        ("logprobs a boolean", completion(logprobs=True), ("True", "integer")),
        ("logprobs 21", completion(logprobs=21), ("21", "20")),
        ("logprobs -1", completion(logprobs=-1), ("-1",)),
        ("echo a number", completion(echo=1), ("echo is 1", "boolean")),
        ("messages", completion(messages=[]), ("messages", "route")),
        ("max_completion_tokens", completion(max_completion_tokens=5), ("max_completion_tokens", "route")),
        ("tools", completion(tools=[1]), ("tools",)),
        ("prompt_embeds", completion(prompt_embeds="x"), ("prompt_embeds",)),
    ]:
        yield Case(f"completion: {name}", post(COMPLETIONS, body), 400, says)


def token_cases() -> Iterator[Case]:
    for name, path, body, status, says in [
        ("tokenize nothing", TOKENIZE, {"model": "tiny"}, 400, ("prompt or messages",)),
        ("tokenize both", TOKENIZE, chat(prompt="a"), 400, ("prompt or messages",)),
        ("tokenize a number", TOKENIZE, {"model": "tiny", "prompt": 5}, 400, ("prompt is 5",)),
        ("tokenize a list", TOKENIZE, {"model": "tiny", "prompt": ["a"]}, 400, ("['a']",)),
        ("tokenize bad role", TOKENIZE, say({"role": "x", "content": "y"}), 400, ("'x'",)),
        ("tokenize tools", TOKENIZE, say({"role": "user", "content": "y"}) | {"tools": [1]}, 400, ("tools",)),
        ("tokenize unknown model", TOKENIZE, {"model": "x", "prompt": "a"}, 404, ("'x'",)),
        ("tokenize no model", TOKENIZE, {"prompt": "a"}, 400, ("model is missing",)),
        ("detokenize nothing", DETOKENIZE, {"model": "tiny"}, 400, ("tokens is missing",)),
        ("detokenize text", DETOKENIZE, {"model": "tiny", "tokens": "a"}, 400, ("'a'",)),
        ("detokenize strings", DETOKENIZE, {"model": "tiny", "tokens": ["a"]}, 400, ("'a'",)),
        ("detokenize -1", DETOKENIZE, {"model": "tiny", "tokens": [-1]}, 400, ("-1",)),
        ("detokenize too high", DETOKENIZE, {"model": "tiny", "tokens": [VOCAB_SIZE]}, 400, (str(VOCAB_SIZE - 1),)),
        ("detokenize huge", DETOKENIZE, {"model": "tiny", "tokens": [HUGE]}, 400, (str(HUGE),)),
        ("detokenize unknown model", DETOKENIZE, {"model": "x", "tokens": [5]}, 404, ("'x'",)),
    ]:
        yield Case(name, post(path, body), status, says)


CASES = [*json_cases(), *http_cases(), *shared_cases(), *chat_cases(), *completion_cases(), *token_cases()]


def test_there_are_enough() -> None:
    assert len({case.raw for case in CASES}) >= 150


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused(server: Server, case: Case) -> None:
    check_envelope(server.raw(case.raw), case.status, case.says)
    good = server.post(COMPLETIONS, completion())
    assert good.status == 200, "the server does not serve any more"
    assert good.json["choices"][0]["text"] == "Th"


def check_envelope(reply: Reply, status: int, says: tuple[str, ...]) -> None:
    assert reply.status == status, reply.body[:500]
    assert reply.headers["content-type"] == "application/json"
    assert len(reply.body) <= 16 * 1024
    assert set(reply.json) == {"error"}
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    for words in says:
        assert words in error["message"], f"{words!r} is not in {error['message']!r}"


def test_no_refused_request_reached_the_engine(server: Server) -> None:
    server.backend.requests.clear()
    for case in CASES[::7]:
        server.raw(case.raw)
    assert server.backend.requests == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", [1] * 500_000), ("stop_token_ids", ["a"] * 500_000), ("messages", [1] * 500_000),
        ("logit_bias", {str(i): "a" for i in range(500_000)}), ("metadata", {str(i): 1 for i in range(500_000)}),
        ("structured_outputs", {"choice": [1] * 500_000}),
    ],
)  # fmt: skip
def test_a_body_full_of_mistakes_is_refused_at_the_first(field: str, value: object) -> None:
    """All of them at once held up the event loop for seconds, and took gigabytes."""
    before = time.process_time()
    with pytest.raises(InvalidRequest, match=field):
        parse(ChatRequest, chat() | {field: value})
    assert time.process_time() - before < 0.3

"""Our own client against servers that refuse, fail, or are none of ours."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from shoal.cluster.client import Client
from shoal.cluster.offline import chat_with_server
from shoal.runtime.errors import EngineError, RequestError

REFUSAL = b'{"error": {"message": "too long"}}'


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """The URL of a server that says the same to everybody."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"data": []}'])
def test_a_server_of_another_kind(body: bytes) -> None:
    with answering(200, body) as url, pytest.raises(EngineError, match="is it OpenAI's API"):
        Client(url).first_model()


@pytest.mark.parametrize(("status", "kind"), [(400, RequestError), (429, RequestError), (503, EngineError)])
def test_refusals_and_failures_differ(status: int, kind: type[Exception]) -> None:
    with answering(status, REFUSAL) as url, pytest.raises(kind, match=f"status {status}: too long"):
        Client(url).first_model()


def test_nobody_there() -> None:
    with pytest.raises(EngineError, match=r"no answer from the server at 127\.0\.0\.1:1"):
        Client("127.0.0.1:1").first_model()


def test_a_refused_turn_does_not_end_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["one", "two"])

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    with answering(400, REFUSAL) as url:
        chat_with_server(url, "tiny", api_key=None, max_tokens=5, temperature=0)
    assert capsys.readouterr().err.count("refused: POST /v1/chat/completions: status 400: too long") == 2

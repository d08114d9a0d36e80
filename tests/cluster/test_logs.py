"""What a line of our log looks like."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from shoal.cluster.logs import JsonLines, TextLines, log_to_stderr
from shoal.runtime.errors import EngineDead, InvalidRequest


def record(message: str, *args: object, error: Exception | None = None, **facts: object) -> logging.LogRecord:
    made = logging.LogRecord("shoal.x", logging.WARNING, __file__, 1, message, args, None)
    made.created = 1_700_000_000.25
    vars(made)["facts"] = facts
    if error is not None:
        try:
            raise error
        except Exception:  # noqa: BLE001 - whichever it is
            made.exc_info = sys.exc_info()
    return made


def test_json() -> None:
    line = JsonLines().format(record("lost replica %s", "r1", ids=[1, 2], text='a\n"b"', share=0.5))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "shoal.x",
        "message": "lost replica r1",
        "ids": [1, 2],
        "text": 'a\n"b"',
        "share": 0.5,
    }


def test_text() -> None:
    line = TextLines().format(record("lost", id="r1", text="a\nb c", ids=[1, 2]))
    assert line == r'2023-11-14T22:13:20.250Z WARNING shoal.x: lost id=r1 text="a\nb c" ids=[1,2]'


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (EngineDead("rank 3 was killed"), True),
        (OSError(28, "No space left on device"), True),
        (InvalidRequest("stop is 'a quote'"), False),
        (ValueError("a quote"), False),
    ],
)
def test_only_what_cannot_quote_a_client_is_told(formatter: logging.Formatter, error: Exception, told: bool) -> None:
    text = formatter.format(record("it failed", error=error))
    assert type(error).__name__ in text
    assert "test_logs.py" in text  # where
    assert any(word in text for word in ("was killed", "No space")) == told
    assert "quote" not in text


def test_standard_error_gets_each_record_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though Serve has put its own stream in its place, which would write something before each."""
    logger = logging.getLogger("shoal")
    before = logger.level, list(logger.handlers)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    try:
        log_to_stderr("text")
        log_to_stderr("json")
        logging.getLogger("shoal.x").info("once", extra={"facts": {"n": 1}})
        logging.getLogger("shoal.x").debug("not at all")
        (line,) = capfd.readouterr().err.splitlines()
        assert (json.loads(line)["message"], json.loads(line)["n"]) == ("once", 1)
    finally:
        logger.level, logger.handlers = before

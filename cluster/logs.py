"""What our processes write to standard error: one record a line, as text or as JSON.

A record's `facts`, where it has any, are fields of the line. Tracebacks show where, and of which kind the error was;
its text only where it is ours about ourselves, or the system's: others' may quote a prompt.
"""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from ..runtime.errors import EngineError, StartupError

_MAX_CAUSES = 8
LogFormat = Literal["text", "json"]
_SPEAKING = (EngineError, StartupError, OSError)


def log_to_stderr(format: LogFormat) -> None:
    """From now on our records from INFO on go there: Ray keeps it as the actor's log. The last call counts.

    The process's own: Serve puts another in its place that writes a prefix before each line.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    logger = logging.getLogger("shoal")
    for other in list(logger.handlers):
        if isinstance(other.formatter, JsonLines | TextLines):
            logger.removeHandler(other)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message", ...facts}`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if error := _error(record):
            line["traceback"] = _traceback(error)
        return msgspec.json.encode(line).decode()


class TextLines(logging.Formatter):
    """The same for people: `time LEVEL logger: message fact=value ...`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = [f"{name}={_plain(value)}" for name, value in _facts(record).items()]
        line = " ".join([_time(record), record.levelname, f"{record.name}:", record.getMessage(), *facts])
        return line if (error := _error(record)) is None else f"{line}\n{_traceback(error)}"


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts = vars(record).get("facts", {})
    assert isinstance(facts, dict)
    return facts


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _error(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


def _traceback(error: BaseException) -> str:
    """Like Python's own, of the error and its causes."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < _MAX_CAUSES:
        text = f": {cause}" if isinstance(cause, _SPEAKING) else ""
        parts.append("".join(traceback.format_tb(cause.__traceback__)) + type(cause).__name__ + text)
        cause = cause.__cause__ or cause.__context__
    return "\ncaused by\n".join(parts)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() and " " not in value else _json(value)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()

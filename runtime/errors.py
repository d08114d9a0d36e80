"""Every error Shoal raises on purpose.

    ShoalError
    ├── RequestError            the client's fault: 4xx; carries `param` (the field) and `code` (as OpenAI's)
    │   ├── InvalidRequest      a value is wrong, out of its limits, or not supported: 400
    │   ├── ContextTooLong      prompt + max_tokens do not fit the context: 400 context_length_exceeded
    │   ├── Unauthorized        no key, or a wrong one: 401
    │   ├── NotFound            no such model or route: 404
    │   ├── MethodNotAllowed    405
    │   ├── RequestTimeout      the deadline passed before the end: 408
    │   ├── LogLost             the log that was to be continued is gone: 409
    │   ├── TooLarge            the body is over its limit: 413
    │   ├── UnsupportedMedia    the body is not JSON by its own header: 415
    │   └── QueueFull           no room, or over a tenant's limit: 429, with `retry_after`
    ├── EngineError             our fault: 5xx
    │   ├── EngineDead          the engine has stopped and will not come back by itself: 503
    │   ├── Unavailable         not ready, or draining: 503, with `retry_after`
    │   ├── CacheMiss           the client wanted a cached answer or none: 504
    │   └── RowFailed           this generation alone failed (a NaN in its logits, say): 500
    └── StartupError            the operator's: refused before anything runs
        ├── ConfigError         a flag or key is wrong
        ├── CheckpointError     the weights are not what the config says
        └── MemoryPlanError     the model does not fit

The mapping to HTTP statuses is in `router/http.py` and nowhere else. Messages name the value, the limit and the knob.
"""


class ShoalError(Exception):
    """Root of all errors raised on purpose; anything else is a bug."""


class RequestError(ShoalError, ValueError):
    """The client's fault. `param` names the request field, `code` is a short machine-readable reason."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidRequest(RequestError):
    """A value is wrong, out of its limits, or not supported."""


class ContextTooLong(RequestError):
    """The prompt and what is asked for do not fit the model's context."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "context_length_exceeded") -> None:
        super().__init__(message, param=param, code=code)


class Unauthorized(RequestError):
    """No API key where one is needed, or a wrong one."""


class NotFound(RequestError):
    """No such model or route."""


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""


class RequestTimeout(RequestError):
    """The request's deadline passed before its end."""


class LogLost(RequestError):
    """The client has had a part of a log that is gone, and that cannot be made again."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "log_lost") -> None:
        super().__init__(message, param=param, code=code)


class TooLarge(RequestError):
    """The body is over its limit."""


class UnsupportedMedia(RequestError):
    """The body's content type is not one we read."""


class QueueFull(RequestError):
    """As many requests wait as may, or this is over a tenant's limit; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0, code: str = "queue_full") -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class EngineError(ShoalError):
    """Our fault."""


class EngineDead(EngineError):
    """The engine has stopped and will not come back by itself."""


class Unavailable(EngineError):
    """Not ready yet, or draining; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CacheMiss(EngineError):
    """The client wanted a cached answer or none, and there is none."""

    code = "cache_miss"


class RowFailed(EngineError):
    """This generation failed and no other did."""


class StartupError(ShoalError):
    """Refused before anything runs."""


class ConfigError(StartupError, ValueError):
    """A flag or a config key is wrong."""


class CheckpointError(StartupError):
    """The weights are not what the config says; names file, tensor, expected and found."""


class MemoryPlanError(StartupError):
    """The model, or one sequence of the asked-for length, does not fit."""

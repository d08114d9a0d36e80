"""`helm test`: waits until /ready answers 200, then wants a token of the first model. Argument: its URL."""

import json
import os
import sys
import time
import urllib.error
import urllib.request

URL = sys.argv[1]
HEADERS = {"content-type": "application/json"}
if key := os.environ.get("SHOAL_API_KEY"):
    HEADERS["authorization"] = f"Bearer {key}"


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, HEADERS), timeout=60) as response:
        return response.read()


deadline = time.monotonic() + 240
while True:
    try:
        ask("/ready")
        break
    except OSError as problem:  # refused, or an HTTP error
        if time.monotonic() > deadline:
            sys.exit(f"{URL}/ready: {problem}")
        time.sleep(2)
model = json.loads(ask("/v1/models"))["data"][0]["id"]
answer = json.loads(ask("/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 1}))
sys.exit(None if answer["usage"]["completion_tokens"] == 1 else f"no token from {model}: {answer}")

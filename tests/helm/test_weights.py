"""Model files: who brings them, to which pods, and what the step that does so runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from .chart import Values, case, manifests, needs_helm, pod_templates, ray_service

pytestmark = needs_helm
NOT_WEIGHTS = "--exclude *.safetensors --exclude *.bin --exclude *.pt --exclude *.pth --exclude *.h5"


def test_weights_come_from_where_they_are_said_to() -> None:
    def fetching(name: str, part: str) -> dict[str, Any]:
        spec = pod_templates(ray_service(case(name)))[part]["spec"]
        return {"init": spec.get("initContainers", [{}])[0], "volumes": {v["name"]: v for v in spec["volumes"]}}

    small = fetching("models-and-variants", "small")
    assert small["init"]["args"][2:] == ["org/small", "org/draft"]
    router = fetching("models-and-variants", "router")
    assert router["init"]["args"][2:] == ["Qwen/Qwen3-0.6B", "org/next", "org/small", "org/draft"]
    assert "--exclude" in router["init"]["args"][0]  # an ingress reads the tokenizer
    assert "--exclude" not in small["init"]["args"][0]
    hub = fetching("hub", "stable")
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert token in hub["init"]["env"]
    assert hub["volumes"]["weights"]["persistentVolumeClaim"] == {"claimName": "hub-cache"}
    store = fetching("object-store", "stable")
    assert store["init"]["args"][2:] == [":s3,env_auth=true,provider=AWS,region=eu:bucket/models", "some-model"]
    assert store["init"]["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    claim = fetching("pvc", "router")
    assert not claim["init"]
    assert claim["volumes"]["weights"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    head = pod_templates(ray_service(case("hub")))["head"]["spec"]
    assert "initContainers" not in head


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"models": [{"name": "small", "engine": {"model": "org/small"}}]},
            [
                f"hf download {NOT_WEIGHTS} Qwen/Qwen3-0.6B",
                f"hf download {NOT_WEIGHTS} org/small",
            ],
        ),
        (
            {
                "engine": {"model": "/models/a/b", "speculative_model": "/models/c.gguf"},
                "weights": {
                    "source": "objectStore",
                    "objectStore": {"url": "s3://bucket/x/", "endpoint": "https://store:9000"},
                },
            },
            [
                (
                    "rclone --config  --transfers 16 --exclude *.safetensors --exclude *.bin copy "
                    ":s3,env_auth=true,provider=Other,endpoint='https://store:9000':bucket/x/a/b /models/a/b"
                ),
                (
                    "rclone --config  --transfers 16 --exclude *.safetensors --exclude *.bin copyto "
                    ":s3,env_auth=true,provider=Other,endpoint='https://store:9000':bucket/x/c.gguf /models/c.gguf"
                ),
            ],
        ),
    ],
)
def test_what_the_init_step_runs(values: Values, said: list[str], tmp_path: Path) -> None:
    step = pod_templates(ray_service(manifests(values)))["router"]["spec"]["initContainers"][0]
    for program in ("hf", "rclone"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$@"\n')
        (tmp_path / program).chmod(0o755)
    settings = {
        name: value for name, value in ((each["name"], each.get("value")) for each in step["env"]) if value is not None
    }
    ran = subprocess.run(
        [*step["command"], *step["args"]],
        env={**settings, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == said


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download asks for."""

    files: ClassVar = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
    commit = "a" * 40

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/org/small"):
            told: Any = {
                "id": "org/small",
                "sha": self.commit,
                "siblings": [{"rfilename": each} for each in self.files],
            }
            if "/tree/" in path:
                told = [
                    {"type": "file", "path": each, "size": len(self.files[each]), "oid": each} for each in self.files
                ]
            self.answer(json.dumps(told).encode(), {"content-type": "application/json"})
        elif "/resolve/" in path and name in self.files:
            self.answer(self.files[name], {"etag": f'"{name}"', "x-repo-commit": self.commit})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("part", ["router", "stable"])
def test_what_the_hub_gives_is_found_by_the_product(part: str, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        where = {"path": str(tmp_path), "hub": {"endpoint": f"http://127.0.0.1:{hub.server_port}"}}
        values = {"engine": {"model": "org/small"}, "weights": where}
        spec = pod_templates(ray_service(manifests(values)))[part]["spec"]
        step, container = spec["initContainers"][0], spec["containers"][0]

        def run(command: list[str], env: list[dict[str, str]]) -> str:
            settings = {each["name"]: each["value"] for each in env} | {"HOME": str(tmp_path), "NO_PROXY": "*"}
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            done = subprocess.run(command, env={**settings, "PATH": path}, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout

        run([*step["command"], *step["args"]], step["env"])
        hub.shutdown()
        find = "from shoal.runtime.hub import resolve_model as at; print(*(f.name for f in at('org/small').iterdir()))"
        found = run([sys.executable, "-P", "-c", find], container["env"]).split()
    assert set(found) == set(Hub.files) - ({"model.safetensors"} if part == "router" else set())

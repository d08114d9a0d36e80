"""`shoal ray-up`: what goes before Ray's own `ray up`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ray_up = typer.Typer(help="A folder for `ray up`: make it, check it.", no_args_is_help=True, rich_markup_mode=None)


@ray_up.command("init")
def init_folder(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    *,
    cloud: Annotated[str, typer.Option(help="aws, gcp, azure, or on-premises: machines with addresses.")],
    model: Annotated[str, typer.Option(help="A hub id, or a folder or .gguf file that is on every machine.")],
    wheel: Annotated[
        Path | None, typer.Option(help="This Shoal. Default: the image's own, or the package index's.")
    ] = None,
) -> None:
    """Make a folder with a cluster file, shoal.yaml, and secrets of its own."""
    from .ray_up import NODE, init

    init(folder, cloud, model, wheel=wheel)
    print(f"{folder / cloud}.yaml: fill in what stands between < and >; {folder / NODE}/shoal.yaml: what is served.")
    print(f"Then: cd {folder} && shoal ray-up check {cloud}.yaml && ray up {cloud}.yaml")


@ray_up.command("check")
def check_file(file: Annotated[Path, typer.Argument(metavar="FILE", help="The cluster file.")]) -> None:
    """Look for what is wrong with a cluster file and its folder, before it costs anything."""
    from .ray_up_check import check

    check(file)
    print(f"{file}: nothing found to be wrong")

"""The files under examples/: each is one that `shoal` takes."""

from pathlib import Path

import pytest

from shoal.cluster.config import check_supported, load_config
from shoal.cluster.serve_config import check_deployable, serve_config

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
OF_ONE_MACHINE = {"one-gpu.yaml", "eight-gpus.yaml"}


def test_there_is_one_for_each_kind_of_deployment() -> None:
    assert len(EXAMPLES) >= 6
    assert {file.name for file in EXAMPLES} > OF_ONE_MACHINE


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_accepted(file: Path) -> None:
    config = load_config({}, file=file)
    if file.name in OF_ONE_MACHINE:
        check_supported(config)
    else:
        check_deployable(config)
        applications = serve_config(config)["applications"]
        assert len(applications) == 2 + len(config.variants) + len(config.models)

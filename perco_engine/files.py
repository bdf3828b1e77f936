"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_beside(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all: beside its place first, then renamed."""
    import tempfile

    target = Path(path).absolute()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        beside.replace(target)
    except BaseException:
        beside.unlink()
        raise

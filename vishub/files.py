"""Writing files so that nothing is ever half written, and checking what is read."""
import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Iterator, Union

__all__ = ['atomic_path', 'sha256']


@contextlib.contextmanager
def atomic_path(path: Union[str, Path]) -> Iterator[Path]:
    """Give a temporary path beside `path` (same suffix) that becomes `path` when the block ends without an error.

    A reader sees the old file or the whole new one. After an error the temporary file is gone and `path` is as it was.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.stem}-', suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, 'rb') as written:  # on disk before it gets its name, so that a crash cannot empty it
            os.fsync(written.fileno())
        # mkstemp makes files private; give the rights an ordinary new file would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Union[str, Path], chunk_size: int = 1 << 20) -> str:
    """SHA-256 of a file as 64 lower-case hexadecimal digits, read in chunks of `chunk_size` bytes."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(chunk_size):
            digest.update(chunk)
    return digest.hexdigest()

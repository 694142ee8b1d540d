"""Files that a program stopped at any moment leaves whole: written aside, then moved into place."""
import contextlib
import os


@contextlib.contextmanager
def naming(path):
    """Gives an OSError of the block that names no file, as a full disk's, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def replacing(path, mode='w'):
    """Opens a file for writing that takes the place of `path`, at once, when the block has ended.

    Until then, and for ever where the block or the disk fails, `path` stays as it was.

    Args:
        mode: 'w' (text, UTF-8) or 'wb'.

    Raises:
        OSError: it cannot be written; its `filename` is set, for a message of one line.
    """
    temporary = f'{path}.tmp'
    try:
        with naming(path), open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise

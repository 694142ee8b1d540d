"""Files that a program stopped at any moment leaves whole: written aside, then moved into place.

A folder may come from a stranger, with symbolic links planted where a program is going to write.
None is followed: `create` replaces it, `plain` refuses it.
"""
import contextlib
import errno
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


def create(path, flags=os.O_WRONLY):
    """Returns the descriptor of a new file; what was there, a killed run's or a link, is removed.

    An opener for `open`. Raises OSError: it cannot be written, or another process was as quick.
    """
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def plain(path, flags):
    """Returns the descriptor of a file that is made where it is missing; a link is refused.

    An opener for `open`, which then keeps what the file holds, if its mode does.
    """
    try:
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(error.errno, 'is a symbolic link; expected a plain file', path) from None


@contextlib.contextmanager
def replacing(path, mode='w'):
    """Opens a file for writing that takes the place of `path`, at once, when the block has ended.

    Until then, and for ever where the block or the disk fails, `path` stays as it was.

    Args:
        mode: 'w' (text, UTF-8) or 'wb'.

    Raises:
        OSError: it cannot be written; its `filename` is set, for a message of one line.
    """
    temporary, ours = f'{path}.tmp', None
    try:
        with naming(path), open(temporary, mode, encoding=None if 'b' in mode else 'utf-8',
                                opener=create) as f:
            ours = os.fstat(f.fileno())
            yield f
            f.flush()
            os.fsync(f.fileno())
            if not os.path.samestat(ours, os.lstat(temporary)):
                raise FileNotFoundError(errno.ENOENT, 'another program is writing it', str(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            if ours is not None and os.path.samestat(ours, os.lstat(temporary)):
                os.remove(temporary)
        raise

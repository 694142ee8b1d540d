"""What a stopped program keeps of unfinished work: batches that are done are not done again.

Two loops over batches, `batches` for small results and `appended` for large ones, write down each
batch when it is done. A batch is taken up again only where all that its outcome depends on is the
same, the project's own code included, and where its SHA-256 is right: a file that was cut off or
changed counts for nothing. No file is unpickled, and no more is read than the results can take.
"""
import contextlib
import fcntl
import functools
import glob
import hashlib
from importlib import metadata
import io
import json
import os

import numpy as np

import tensorflow as tf

from running import UserError
from running.files import naming, plain, replacing
from running.progress import progress
from running.untrusted import read_json
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- what a number depends on


def file_digest(path):
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def checkpoint_digest(prefix):
    """Returns a digest of a checkpoint: of its index, which holds a checksum of every weight."""
    index = f'{prefix}.index'
    return file_digest(index if os.path.exists(index) else prefix)  # TensorFlow's old format: one


def data_digest(data):
    """Returns a digest of all images and labels of a CIFAR10Data, whatever is held out of them."""
    digest = hashlib.sha256()
    train, held_out, test = data.train_data, data.validation_data, data.eval_data
    for values in (train.xs, held_out.xs, train.ys, held_out.ys, test.xs, test.ys):
        digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()


@functools.cache
def code():
    """Returns what computes the numbers: a digest of the project's code, and library versions.

    The code is every .py file at the top level and in the rooms, tests and documents left out.
    """
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(f'{os.path.relpath(path, ROOT)} {file_digest(path)}\n'.encode())
    libraries = {'tensorflow': tf.__version__, 'numpy': np.__version__}
    for name in ('keras', 'foolbox'):
        with contextlib.suppress(metadata.PackageNotFoundError):
            libraries[name] = metadata.version(name)
    return [digest.hexdigest(), libraries]


def code_files():
    """Returns the paths of the project's .py files: the top level's, and those of its rooms.

    A room is a folder with an __init__.py: a new one counts without being named here.
    """
    root = glob.escape(ROOT)
    rooms = [os.path.dirname(path) for path in glob.glob(os.path.join(root, '*', '__init__.py'))]
    return sorted(path for folder in [ROOT, *rooms]
                  for path in glob.glob(os.path.join(glob.escape(folder), '*.py')))


def path_of(folder, name, what):
    """Returns where batches are kept: folder/NAME-DIGEST.part, the digest of `what` and the code.

    Args:
        what: JSON that says all that the batches depend on, except for the code.
    """
    text = json.dumps([what, code()], sort_keys=True)
    return os.path.join(folder, f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.part')


# ---- small results: written whole after each batch


def batches(path, arrays, n, size, label, shard=None):
    """Yields (start, end) of the batches of n examples that are still to be done, in order.

    The loop's body writes a batch's results into `arrays`, which are kept in `path` when it is
    through. Before the first batch, what was kept is put there. Shows the loop's progress.

    Args:
        path: a file, which need not exist, in a folder, which need not either. None: nothing is
            kept.
        arrays: numpy arrays, all that the loop finds. A file of other shapes or types is ignored.
        size: examples in a batch; the last one may be smaller.
        label: what the loop is called where its progress is shown.
        shard: (first, last) examples of whole batches, to do these alone; `path` is then that of
            shard_path. Once all shards are done, the loop without a shard finds their results.

    Raises:
        OSError: the file cannot be read or written.
    """
    first, last = shard or (0, n)
    done = np.array(first, np.int64)
    found = _load(path, [done, *arrays]) if path else None
    if path and not found and not shard:
        found = _joined(path, [done, *arrays], n)
    if found and first < found[0] <= last and (found[0] == last or found[0] % size == 0):
        for array, value in zip([done, *arrays], found):
            array[...] = value
        print(f'{label}: resuming after {done - first} of {last - first} examples', flush=True)
    with progress(label, last - first, int(done) - first) as update:
        for start in range(int(done), last, size):
            end = min(start + size, last)
            yield start, end
            done[...] = end
            if path:
                _save(path, [done, *arrays])
            update(end - start)


def shard_path(path, first, last):
    """Returns where the loop over one shard of the loop that keeps its batches in `path` does."""
    return f'{path}.{first}-{last}'


def shards_of(path):
    """Returns {(first, last): path} of the shards of a loop that are kept, in order."""
    found = {}
    for part in glob.glob(f'{glob.escape(path)}.*-*'):
        first, last = part.removeprefix(f'{path}.').split('-', 1)
        if first.isdecimal() and last.isdecimal():
            found[int(first), int(last)] = part
    return dict(sorted(found.items()))


def _joined(path, like, n):
    """Returns what _load would of one loop over n examples, from its shards; None unless all are.

    Each loop began with the same arrays, all zero, and wrote or added to what its batches find: so
    their sums hold all of it.
    """
    done, total = 0, [np.zeros_like(array) for array in like]
    for (first, last), part in shards_of(path).items():
        found = _load(part, like)
        if first != done or found is None or found[0] != last:
            return None
        done = last
        for array, value in zip(total[1:], found[1:]):
            array += value  # of bool: or
    total[0][...] = done
    return total if 0 < done == n else None


def _packed(arrays):
    """Returns the contents of a file of arrays: a SHA-256, then their bytes one after another."""
    shapes = json.dumps([[array.dtype.str, array.shape] for array in arrays])
    contents = b''.join(array.tobytes() for array in arrays)
    return hashlib.sha256(shapes.encode() + contents).digest() + contents


def _load(path, like):
    """Returns arrays of the shapes and types of `like`, or None where no such file is there."""
    offset, found = hashlib.sha256().digest_size, []
    size = offset + sum(array.nbytes for array in like)
    try:
        with open(path, 'rb') as f:
            contents = f.read(size + 1)  # a longer file is another
    except FileNotFoundError:
        return None
    if len(contents) != size:
        return None
    for array in like:
        found.append(np.frombuffer(contents, array.dtype, array.size, offset).reshape(array.shape))
        offset += array.nbytes
    return found if _packed(found) == contents else None


def _save(path, arrays):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Not found: a second program at the same work has just moved the file into its place
    with contextlib.suppress(FileNotFoundError), replacing(path, 'wb') as f:
        f.write(_packed(arrays))


def remove(paths):
    """Removes the files of work that is finished, and their folders where those are then empty."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))


# ---- large results: each batch appended to the file that is to be


def appended(path, array, size, what, label):
    """Yields (start, end) of the batches of `array` that are still to be done, in order.

    The loop's body fills array[start:end], which is then appended to PATH.part; PATH.part.json says
    what it is of and has the SHA-256 of each batch. Before the first batch, what was kept is put
    into `array`. After the last, PATH.part is the .npy file that np.save would write, and
    `finish(path)` moves it into place. Shows the loop's progress.

    Args:
        path: of the .npy file that is to be.
        array: [n, ...], C order.
        size: examples in a batch; the last one may be smaller.
        what: JSON that says all that the examples depend on, except for the code.
        label: what the loop is called where its progress is shown.

    Raises:
        OSError: a file cannot be read or written. What was finished before is kept.
        UserError: at the end, the file does not hold `array`: someone else wrote to it.
    """
    part, sidecar, n = f'{path}.part', f'{path}.part.json', len(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    header = header.getvalue()
    what = json.loads(json.dumps([what, code()]))
    try:
        kept = read_json(sidecar)
    except UserError:  # none, or damaged: the part is of no known work then
        kept = {}
    kept = kept.get('digests') if kept.get('what') == what else None
    digests, done = [], 0
    with naming(part), open(part, 'r+b', opener=plain) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another program is writing {part}; expected one at a time') from None
        if f.read(len(header)) == header and isinstance(kept, list):
            for start, digest in zip(range(0, n, size), kept):
                batch = array[start:start + size]
                contents = f.read(batch.nbytes)
                if hashlib.sha256(contents).hexdigest() != digest or len(contents) != batch.nbytes:
                    break
                batch[...] = np.frombuffer(contents, array.dtype).reshape(batch.shape)
                digests.append(digest)
                done = start + len(batch)
        if done:
            print(f'{label}: resuming after {done} of {n} examples', flush=True)
        f.seek(0)
        f.write(header)
        with progress(label, n, done) as update:
            for start in range(done, n, size):
                end = min(start + size, n)
                yield start, end
                # At its place, whatever is there: a second program at the same work does no harm
                f.seek(len(header) + array[:start].nbytes)
                f.write(array[start:end].data)
                f.flush()
                os.fsync(f.fileno())
                digests.append(hashlib.sha256(array[start:end].data).hexdigest())
                with replacing(sidecar) as s:
                    json.dump({'what': what, 'digests': digests}, s)
                update(end - start)
        f.truncate(len(header) + array.nbytes)
        f.seek(0)
        whole = [f.read(len(header)) == header, *(f.read(batch.nbytes) == batch.tobytes() for batch
                                                 in np.array_split(array, -(-n // size)))]
    if not all(whole):
        raise UserError(f'another program has written to {part}; expected one at a time')


def finish(path):
    """Moves PATH.part to PATH, at once, and removes what said what it is of."""
    os.replace(f'{path}.part', path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(f'{path}.part.json')

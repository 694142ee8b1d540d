"""How train.py survives interruptions: the log and curves cut back, locks, signals, full disks."""
import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import signal
import socket
import sys
import threading
from timeit import default_timer as timer

from google.protobuf.message import DecodeError

import tensorflow as tf
from tqdm import tqdm

from running import UserError
from running.files import create, plain, replacing
from running.untrusted import check_plain

LOG = 'log.jsonl'        # in model_dir: one line a report, the same numbers as on stdout
CUT_CURVES = 'cut.tmp'   # in model_dir while curves are cut back; TensorBoard does not look at it
PATIENCE = 2.            # seconds within which a second signal is the first one again


# ---- the log and the curves


def forget_steps(model_dir, start):
    """Takes the steps from `start` on out of the log and the TensorBoard files in model_dir.

    They are about to be done again: a run that was killed had gone past its last checkpoint. What a
    kill cut off goes, too. Every file is rewritten and moved into place, or left alone.
    """
    log = os.path.join(model_dir, LOG)
    if os.path.exists(log):
        check_plain(log)
        with open(log, encoding='utf-8', errors='replace') as f:
            lines = f.readlines()
        kept = [line for line in lines if line.endswith('\n') and logged_step(line) < start]
        if kept != lines:
            with replacing(log) as f:
                f.writelines(kept)
    for path in glob.glob(os.path.join(glob.escape(model_dir), 'events.out.tfevents.*')):
        check_plain(path)
        kept, whole = [], True
        try:
            for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
                if tf.compat.v1.Event.FromString(record).step < start or not kept:
                    kept.append(record)  # the first one tells the file's version
                else:
                    whole = False
        except (tf.errors.DataLossError, DecodeError) as error:
            whole = False
            if not isinstance(error, tf.errors.DataLossError) or 'truncated' not in error.message:
                print(f'{path} is damaged: the curves end there until step {start}', flush=True)
        if whole:
            continue
        temporary = os.path.join(model_dir, CUT_CURVES)
        try:
            os.close(create(temporary))  # TensorFlow's writer would follow a link
            with in_one_line(path), tf.io.TFRecordWriter(temporary) as writer:
                for record in kept:
                    writer.write(record)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


def logged_step(line):
    """Returns the step that a line of the log tells of; infinity where it was cut off."""
    try:
        return float(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float('inf')


def tell(text):
    """Prints text, above the progress bar; a reader of stdout that has gone away stops nothing."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes


# ---- disks that are full


def reason(error):
    """Returns what a TensorFlow error says, without the names of its operations, in one line."""
    text = re.sub(r'\{\{.*?\}\} ?| ?\[Op:.*', '', error.message)
    return '; '.join(line.strip() for line in text.splitlines() if line.strip())


@contextlib.contextmanager
def in_one_line(what):
    """Makes a UserError of what TensorFlow raises where `what` cannot be written."""
    try:
        yield
    except tf.errors.OpError as error:
        raise UserError(f'{what} cannot be written: {reason(error)}') from None


def refuse_full_disk(folder):
    """Raises OSError where there is no room left: TensorBoard's writer says nothing of it."""
    disk = os.statvfs(folder)
    if disk.f_blocks > 0 and disk.f_bavail == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)


def remove_unfinished(model_dir):
    """Removes what a checkpoint or curves that are cut back leave when their writing is stopped."""
    for name in ('checkpoint-*.tempstate*', 'checkpoint-*.tmp', 'checkpoint.tmp*', CUT_CURVES):
        for path in glob.glob(os.path.join(glob.escape(model_dir), name)):
            os.remove(path)


# ---- other processes, and signals


class Stopped(KeyboardInterrupt):
    """A signal stopped a training, which saved its last step: the same call resumes it."""


def take_lock(path):
    """Returns an open file, in a folder that is made, that no other process can have meanwhile.

    Raises:
        OSError: another process has it, or it cannot be written.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    f = open(path, 'a+', encoding='utf-8', errors='replace', opener=plain)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        holder = f.readline(200).strip() or 'another process'
        raise OSError(errno.EWOULDBLOCK, f'{holder} is training there; expected another model_dir',
                      path) from None
    f.truncate(0)
    f.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    f.flush()
    return f


@contextlib.contextmanager
def noted_signals():
    """Yields a list that Ctrl-C or SIGTERM adds to; a second one raises KeyboardInterrupt.

    For a notebook: nothing ends its process, and its own handlers are back at the end. Signals are
    the main thread's: in another one the list stays empty.
    """
    asked, handlers = [], {}

    def note(*_):
        if asked and timer() - asked[0] > PATIENCE:
            raise KeyboardInterrupt
        asked.append(timer())

    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    handlers[number] = signal.signal(number, note)
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def stop_on_signals():
    """Returns a list that Ctrl-C or SIGTERM adds to; a second one ends the process at once.

    For a program, until its end.
    Soon after the first, it is the same one: some schedulers tell a whole tree of processes, and
    each of these tells its children. A thread listens, as the main one may be in a step for
    minutes, where Python hears no signals.
    """
    asked, name = [], os.path.basename(sys.argv[0])
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM)
               if signal.getsignal(number) is not signal.SIG_IGN]  # as a background job's SIGINT is
    for number in numbers:
        signal.signal(number, lambda *_: None)  # what counts is that it is written to the pipe
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)

    def say(text):
        with contextlib.suppress(OSError):  # Ctrl-C may have ended who reads it
            os.write(2, f'\n{name}: {text}\n'.encode())

    def listen():
        while True:
            number = os.read(receiver, 1)[0]
            if number not in numbers:
                continue
            if asked and timer() - asked[0] > PATIENCE:
                say('stopped')
                os._exit(128 + number)
            asked.append(timer())
            if len(asked) == 1:
                say('finishing this step, then saving; once more to stop at once')

    threading.Thread(target=listen, daemon=True).start()
    return asked

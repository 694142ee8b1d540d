"""How far a long loop is: examples a second and the time left, on a terminal and in a log."""
import contextlib
from datetime import timedelta
import sys
from time import monotonic

from tqdm import tqdm

LINE_EVERY = 60  # seconds between two lines in a log


@contextlib.contextmanager
def progress(label, n, done=0):
    """Shows on stderr how far a loop over n examples is; yields f(examples) that moves it on.

    A terminal has a bar, gone at the end. Where stderr is none, a log for instance, there is
    nothing in the first minute, then a line a minute at most.

    Args:
        label: what is shown before the numbers. done: how many of the n were done before.
    """
    if sys.stderr.isatty():
        with tqdm(desc=label, total=n, initial=done, unit='example', leave=False) as bar:
            yield bar.update
        return
    begin = last = monotonic()
    first = done

    def update(examples):
        nonlocal last, done
        done += examples
        now = monotonic()
        if now - last < LINE_EVERY or done >= n:
            return
        last, rate = now, (done - first) / (now - begin)
        left = timedelta(seconds=round((n - done) / rate))
        print(f'{label}: {done} of {n} examples, {rate:.3g} a second, {left} left',
              file=sys.stderr, flush=True)

    yield update

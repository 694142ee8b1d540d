"""What a training writes beside its log: checkpoints, TensorBoard curves, a profile. Its pace."""
import contextlib
from datetime import timedelta
import json
import os
import shutil
from timeit import default_timer as timer

import numpy as np
import tensorflow as tf

from running import UserError
from running.files import naming, plain, replacing
from running.resume import LOG, in_one_line, reason, refuse_full_disk, remove_unfinished

PROFILE_STEPS = 10
TIMED_STEPS = 3  # after the first, until the whole time is estimated


@contextlib.contextmanager
def without_deprecations():
    """Keeps TensorFlow from saying in the block that its Saver is deprecated, at length."""
    logger = tf.get_logger()
    before = logger.level
    logger.setLevel('ERROR')
    try:
        yield
    finally:
        logger.setLevel(before)


NUM_KEPT = 3  # checkpoints of a training


class Saver:
    """Writes a training's checkpoints, the last NUM_KEPT kept, and knows the last good one.

    Args:
        model_dir: their folder. variables: {name: tf.Variable}.
        kept: prefixes of the checkpoints that are there, the oldest first. last_good: one of them.
        chief: whether this process writes. The others only look at the weights.
    """

    def __init__(self, model_dir, variables, kept, last_good, chief=True):
        self.model_dir, self.variables, self.last_good = model_dir, variables, last_good
        self.kept, self._saver = list(kept), None
        if chief:
            with without_deprecations():  # relative paths: model_dir may be moved
                self._saver = tf.compat.v1.train.Saver(variables, max_to_keep=None,
                                                       save_relative_paths=True)

    def save(self, step):
        """Saves a checkpoint, unless a weight is not finite: the last good one is kept then."""
        self.check_finite(step, 'a weight', (v.numpy() for v in self.variables.values()))
        if self._saver is None:
            self.last_good = os.path.join(self.model_dir, f'checkpoint-{step}')
            return
        try:
            with without_deprecations():
                self.last_good = self._saver.save(None, os.path.join(self.model_dir, 'checkpoint'),
                                                  step, write_meta_graph=False)
        except tf.errors.OpError as error:
            remove_unfinished(self.model_dir)
            raise UserError(f'no checkpoint could be written in {self.model_dir}: {reason(error)}; '
                            f'the last good one is {self.last_good}') from None
        self._forget_old_ones()

    def _forget_old_ones(self):
        """Removes all but the last NUM_KEPT. Raises OSError.

        TensorFlow's way takes a path for a pattern: [1] would match another training's folder.
        """
        self.kept = [*(prefix for prefix in self.kept if prefix != self.last_good), self.last_good]
        for prefix in self.kept[:-NUM_KEPT]:
            for end in ('.index', '.data-00000-of-00001'):  # an index means it is whole
                with contextlib.suppress(FileNotFoundError):
                    os.remove(prefix + end)
        self.kept = self.kept[-NUM_KEPT:]

    def keep_best(self, name):
        """Copies the last checkpoint to `name`, in place of what is there. Raises OSError."""
        if self._saver is None:
            return
        for end in ('.data-00000-of-00001', '.index'):  # in this order: an index means it is whole
            with open(self.last_good + end, 'rb') as source, replacing(
                    os.path.join(self.model_dir, name + end), 'wb') as f:
                shutil.copyfileobj(source, f)

    def check_finite(self, step, what, values):
        """Raises UserError, with the last good checkpoint, unless all values are finite."""
        if not all(np.isfinite(value).all() for value in values):
            raise UserError(f'{what} is NaN or infinite at step {step}; the last good checkpoint '
                            f'is {self.last_good}; try a lower learning rate in '
                            'step_size_schedule, with another model_dir')


class Log:
    """What a training reports, a line of JSON each, in model_dir. Only the chief writes."""

    def __init__(self, model_dir, chief=True):
        self.path = os.path.join(model_dir, LOG) if chief else None

    def append(self, line):
        """Adds a line, at once. Raises OSError: it cannot be written."""
        if self.path:
            with naming(self.path), open(self.path, 'ab', opener=plain) as f:
                f.write(json.dumps(line).encode() + b'\n')


class Curves:
    """TensorBoard summaries of a training, in model_dir. Only the chief writes."""

    def __init__(self, model_dir, chief=True):
        self.model_dir = model_dir
        with self._in_one_line():
            self._writer = (tf.summary.create_file_writer(model_dir) if chief
                            else tf.summary.create_noop_writer())

    def _in_one_line(self):
        return in_one_line(f'TensorBoard summaries in {self.model_dir}')

    @contextlib.contextmanager
    def writing(self):
        """Makes tf.summary in the block write here. Raises UserError, OSError: it cannot."""
        with self._in_one_line():
            with self._writer.as_default():
                yield
            self._writer.flush()
        refuse_full_disk(self.model_dir)


class Profile:
    """A TensorBoard profile of PROFILE_STEPS steps after the first, which also traces the graph.

    Args:
        model_dir: where it is written. start, end: the training's steps. wanted: False: none.

    Raises:
        UserError: there are too few steps.
    """

    def __init__(self, model_dir, start, end, wanted):
        if wanted and end - start <= PROFILE_STEPS:
            raise UserError(f'--profile takes {PROFILE_STEPS} steps after the first; '
                            f'{max(0, end - start)} are left')
        self.model_dir = model_dir
        self.steps = range(start + 1, start + 1 + PROFILE_STEPS) if wanted else range(0)

    def begin(self, step):
        if step in self.steps[:1]:
            with in_one_line(f'the profile in {self.model_dir}'):
                tf.profiler.experimental.start(self.model_dir)

    def end(self, step, stop):
        """Writes the profile after its last step, or at a stop; returns lines that tell of it."""
        if step not in self.steps or not (stop or step == self.steps[-1]):
            return []
        with in_one_line(f'the profile in {self.model_dir}'):
            tf.profiler.experimental.stop()
        return [f'Profile of steps {self.steps[0]} to {step}: tensorboard --logdir '
                f'{self.model_dir}']


class RunningMeans:
    """Means of what training steps return, over the steps since each kind of report.

    Their sums are in the checkpoints: a training that resumes reports what it would have reported
    had it never been stopped, bit for bit.

    Args:
        names: what is averaged. kinds: of reports. prefix: the checkpoint to resume from, or None.
    """

    def __init__(self, names, kinds, prefix=None):
        self.names = names
        self.variables = {f'running_means/{kind}': tf.Variable(
            np.zeros(1 + len(names)), dtype=tf.float64) for kind in kinds}  # steps, then sums
        if prefix:
            reader = tf.train.load_checkpoint(prefix)
            types, shapes = (reader.get_variable_to_dtype_map(),
                             reader.get_variable_to_shape_map())
            for name, variable in self.variables.items():  # earlier versions had none
                if types.get(name) == variable.dtype and shapes[name] == variable.shape:
                    sums = reader.get_tensor(name)
                    if np.isfinite(sums).all() and sums[0] >= 0:
                        variable.assign(sums)

    def add(self, metrics):
        """Counts a step in, {name: float}; it may lack some of the names."""
        step = np.array([1.] + [metrics.get(name, 0.) for name in self.names])
        for variable in self.variables.values():
            variable.assign_add(step)

    def tell(self, kind, metrics, restart=True):
        """Returns metrics with the means in place of a step's own, and over how many steps.

        Args:
            metrics: those of the last step added. restart: start new means.
        """
        variable = self.variables[f'running_means/{kind}']
        steps, *sums = variable.numpy().tolist()
        if restart:
            variable.assign(tf.zeros_like(variable))
        means = {name: total / steps for name, total in zip(self.names, sums) if name in metrics}
        return {**metrics, **means}, int(steps)


class Pace:
    """How long training steps take: examples a second since it was last told, and the whole time.

    Args:
        batch_size: examples in a step. start, end: the steps that are to be done.
    """

    def __init__(self, batch_size, start, end):
        self.batch_size, self.start, self.end = batch_size, start, end
        self.seconds, self.steps, self.first = 0., 0, []

    @contextlib.contextmanager
    def timed(self, step):
        """Times the block, a training step; the first, which also traces the graph, apart."""
        begin = timer()
        with tf.profiler.experimental.Trace('train', step_num=step, _r=1):
            yield
        seconds = timer() - begin
        if step > self.start:
            self.seconds += seconds
            self.steps += 1
        if len(self.first) <= TIMED_STEPS:
            self.first.append(seconds)

    def foretell(self, step):
        """Returns lines, after the first step and as soon as the whole time can be estimated."""
        if step == self.start:
            return [f'First step done in {duration(self.first[0])}, graph building included']
        if step != self.start + TIMED_STEPS:
            return []
        steps, seconds = self.end - self.start, float(np.median(self.first[1:]))
        return [f'{steps:,} {"more " if self.start else ""}steps: {duration(steps * seconds)} on '
                'this machine']

    def tell(self, step):
        """Returns (examples a second, time left) and starts again; None where no step was timed."""
        if not self.steps:
            return None
        seconds = self.seconds / self.steps
        self.seconds, self.steps = 0., 0
        return self.batch_size / seconds, timedelta(
            seconds=round(seconds * (self.end - 1 - step)))


def duration(seconds):
    """Returns seconds in words, in the unit that suits, with two digits or more."""
    units = (('s', 1, 90), ('minutes', 60, 90), ('hours', 3600, 48), ('days', 86400, np.inf))
    unit, size = next((unit, size) for unit, size, most in units if seconds < most * size)
    number = seconds / size
    return f'{number:.1f} {unit}' if number < 9.95 else f'{number:,.0f} {unit}'

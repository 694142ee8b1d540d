"""Trains a model, saving checkpoints and TensorBoard summaries (the original's train.py).

    python train.py                                    # config.json: w32-10, norm shaping
    python train.py --config configs/quick.json --set training_mode=adv_only

Started again with the same command, it resumes from the newest intact checkpoint in model_dir, and
ends as if it had never been stopped: all randomness is derived from the seeds and the step number,
and the log and the TensorBoard curves are cut back to that checkpoint. Ctrl-C and SIGTERM let it
finish the step and save; it then exits with status 75.
"""
import contextlib
from datetime import datetime
import json
import os
import sys
import zlib

from absl import flags
import numpy as np

from config import (begin, config_from_flags, define_download_flag, load_config, may_change,
                    of_training, store_config)
from running.program import STOPPED, run

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    define_download_flag()
    flags.DEFINE_boolean('profile', False, 'Write a TensorBoard profile of 10 steps into '
                         'model_dir.')
    flags.DEFINE_integer('logical_cpus', 1, 'Divide the CPU into so many logical devices, to try '
                         'distribution=mirrored without GPUs.')
    begin(__doc__)

import running.quiet  # noqa: F401
import keras
import tensorflow as tf
from tqdm import tqdm

from attacks import check_names
from cifar10_input import augment, eval_examples, load_data
from model import BEST, build_model, checkpoints, find_checkpoint
from pgd_attack import LinfPGDAttack
from running import UserError, brief
from running.arriving import step_of
from running.devices import (LOST, check_agreement, check_shares, divide_cpu, is_chief,
                             make_strategy, make_sum, num_workers, shares, uses_tensor_float_32)
from running.outputs import Curves, Log, Pace, Profile, RunningMeans, Saver
from running.resume import (Stopped, forget_steps, noted_signals, reason, remove_unfinished,
                            stop_on_signals, take_lock, tell)
from running.unfinished import data_digest
from running.untrusted import MAX_JSON_BYTES, parse_json
from shaping import masked, tail_mask
from trades import TradesAttack, kl_divergence

# In checkpoints, beside the original's names:
NUM_REPLICAS = 'num_replicas'     # where there are several
VALIDATION = 'validation/best'    # see Validation
TRAINING = 'training_config'      # see make_origin
IMAGES = 'images_sha256'
# What is reported as a mean over the steps since the last report, where a training has it
AVERAGED = ('loss', 'xent', 'accuracy', 'xent_clean', 'accuracy_clean', 'xent_adv', 'accuracy_adv',
            'kl')


def main():
    tf.get_logger().setLevel('ERROR')  # the Saver calls itself deprecated, at length
    config = config_from_flags()
    if flags.FLAGS.logical_cpus > 1 and config['distribution'] != 'mirrored':
        raise UserError(f'--logical_cpus is {flags.FLAGS.logical_cpus}, and distribution '
                        f'{config["distribution"]} uses one device a process; expected --set '
                        'distribution=mirrored')
    divide_cpu(flags.FLAGS.logical_cpus)
    strategy = make_strategy(config)
    try:
        train(config, strategy, flags.FLAGS.profile, flags.FLAGS.download, as_program=True)
    except Stopped as stop:
        tell(f'Stopped {stop}; the same command resumes')
        sys.exit(STOPPED)
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(f'memory is full: {reason(error)[:200]}; expected a smaller '
                        'training_batch_size or width_factor') from None
    except LOST as error:
        if num_workers(strategy) == 1:
            raise
        print(f'train.py: a worker was lost ({type(error).__name__}: {reason(error)[:200]}); '
              'unless one tells of a mistake, the same command on all workers resumes from the '
              'newest checkpoint', file=sys.stderr)
        sys.exit(STOPPED)


def train(config, strategy=None, profile=False, download=False, as_program=False):
    """Trains until max_num_training_steps, or until a signal; see the program's docstring.

    Args:
        config: what load_config returns. strategy: what devices.make_strategy returns; None: made
            here. profile: write a TensorBoard profile. download: as load_data takes it.
        as_program: signals are ours until the process ends, and a second one ends it at once.

    Returns:
        the prefix of the last checkpoint.

    Raises:
        Stopped, a KeyboardInterrupt: Ctrl-C or SIGTERM. The step was finished and saved.
        UserError, OSError: a mistake in the configuration, a full disk, ...
    """
    with contextlib.ExitStack() as at_end:  # lets go of the lock and the signals, come what may
        return run_training(config, strategy or make_strategy(config), profile, download,
                            as_program, at_end)


def run_training(config, strategy, profile, download, as_program, at_end):
    """Does train's work; at_end is an ExitStack, closed after it."""
    # Seeds and parameters
    keras.utils.set_random_seed(config['tf_random_seed'])
    batch_size, num_steps = config['training_batch_size'], config['max_num_training_steps']
    model_dir, chief = config['model_dir'], is_chief(strategy)
    sum_over_replicas = make_sum(strategy)

    # The data and the model
    data = load_data(config, download)
    check_later_use(data, config, strategy)
    with strategy.scope():
        model = build_model(config, data.num_classes)
        # The optimizer
        optimizer = make_optimizer(config)
        # The adversary, in one graph with the weight update
        train_step = make_train_step(model, optimizer, config)
    natural_accuracy, attacked_images = make_report(model, config)

    # The newest intact checkpoint, if there is one
    at_end.enter_context(take_lock(f'{model_dir}/lock') if chief else contextlib.nullcontext())
    start, newest, origin = resume(config, data, model, optimizer, strategy)

    # The TensorBoard, log and checkpoint outputs
    profiler = Profile(model_dir, start, num_steps, profile)
    if chief:
        prepare(config, start, strategy.num_replicas_in_sync)
    log, curves = Log(model_dir, chief), Curves(model_dir, chief)
    means = RunningMeans(AVERAGED, ('output', 'summary'), newest)
    validation = Validation(model, data, config, newest)
    saver = make_saver(config, model, optimizer, means, validation, start, newest, chief, origin)

    # Main training loop
    asked = stop_on_signals() if as_program else at_end.enter_context(noted_signals())
    pace = Pace(batch_size, start, num_steps)
    for ii in tqdm(range(start, num_steps), total=num_steps, initial=start, unit='step',
                   disable=not (chief and sys.stderr.isatty())):
        # A training batch
        profiler.begin(ii)
        x_batch, y_batch = data.train_data.get_batch(ii, batch_size)
        batch = tf.constant(x_batch), tf.constant(y_batch), tf.constant(ii, tf.int64)

        # What the step itself does not tell: natural accuracy and the attacked images
        output, summary = (ii % config[f'num_{kind}_steps'] == 0 for kind in ('output', 'summary'))
        last = ii + 1 == num_steps
        nat_acc = float(natural_accuracy(*batch)) if output or summary or last else None
        x_batch_adv = attacked_images(*batch) if summary else None

        # Attack and training step
        with pace.timed(ii):
            metrics = {name: float(value) for name, value in train_step(*batch).items()}
        saver.check_finite(ii, 'the loss', [metrics['loss']])
        means.add(metrics)
        stop = sum_over_replicas(len(asked)) > 0  # a signal to one worker stops all

        # Output to stdout, and to the log: before the checkpoint, so that a kill loses none of it
        report = pace.foretell(ii) + profiler.end(ii, stop)
        if output or last:  # after an extra report, the last one's, the means go on
            lines, line = describe(ii, nat_acc, *means.tell('output', metrics, restart=output),
                                   pace.tell(ii))
            report += lines
            log.append(line)
        if report and chief:
            tell('\n'.join(report))

        # TensorBoard summaries
        if summary:
            with curves.writing():
                write_summaries(*means.tell('summary', metrics), nat_acc, x_batch_adv, config, ii)

        # Validate on held-out training images
        due = (ii + 1) % config['num_checkpoint_steps'] == 0 or last
        if due and validation.n:
            line = validation.measure(ii + 1)
            log.append({'step': ii, **line})
            with curves.writing():
                report_validation(line, ii, chief)

        # Write a checkpoint
        if due or stop:
            saver.save(ii + 1)
        if due and validation.best_step == ii + 1:
            saver.keep_best(BEST)

        # Stop where a signal asked for it
        if stop and not last:
            raise Stopped(f'after {ii + 1} steps, which are saved in {model_dir}')
    if chief:
        tell(f'{num_steps} steps done: {saver.last_good}')
    return saver.last_good


# ---- the optimizer


class MomentumOptimizer(keras.optimizers.Optimizer):
    """Momentum as in TensorFlow 1, which the original trains with.

    velocity <- momentum * velocity + gradient; weight <- weight - learning rate * velocity. Keras's
    SGD takes the learning rate into the velocity, and so differs after every change of the rate.
    """

    def __init__(self, learning_rate, momentum):
        super().__init__(learning_rate=learning_rate, name='momentum')
        self.momentum = momentum

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self._velocities = self.add_optimizer_variables(variables, 'velocity')

    def velocity(self, variable):
        """Returns the velocity of one of the model's trainable variables."""
        return self._velocities[self._get_variable_index(variable)]

    def update_step(self, gradient, variable, learning_rate):
        velocity = self.velocity(variable)
        velocity.assign(self.momentum * velocity + gradient)
        variable.assign_sub(learning_rate * velocity)


def make_optimizer(config):
    """Returns the optimizer, its learning rate piecewise constant as step_size_schedule says.

    As in the original (tf.train.piecewise_constant), the step that a boundary names still has the
    rate before it.
    """
    steps, rates = zip(*config['step_size_schedule'])
    schedule = (keras.optimizers.schedules.PiecewiseConstantDecay(list(steps[1:]), list(rates))
                if len(rates) > 1 else rates[0])
    return MomentumOptimizer(schedule, config['momentum'])


def use_xla(config):
    """Returns whether XLA compiles the training step: it is what a GPU wants, and slows CPUs."""
    if config['xla'] == 'auto':
        return bool(tf.config.list_physical_devices('GPU'))
    return config['xla'] == 'on'


# ---- the training step


def adversarial_tail(config, num_replicas=1):
    """Returns the mask of the samples that a training batch's weight update sees attacked, [m].

    With num_replicas: of those of one replica's share, [m / replicas].
    """
    m = config['training_batch_size'] // num_replicas
    if config['training_mode'] in ('natural', 'adv_only'):
        return np.full(m, config['training_mode'] == 'adv_only')
    return tail_mask(m, config['shaping_ratio'])


def make_adversary(model, config, update_population_norms=True):
    """Returns (get_batch, perturb), made of TensorFlow ops: a training batch, and its attack.

    get_batch(images, labels, step) -> (x, x_nat, labels): where the attack starts, the augmented
    images, the labels. Randomness is derived from tf_random_seed and the step number alone.

    perturb(x, x_nat, labels) -> X^(T), what the weight update sees: clean head and adversarial
    tail, as training_mode says (paper, Eq. 5 and section VI). With attack_norms `batch`, every
    attack step normalizes by its own batch X^(i): Eq. 5, but for the original's random start, which
    puts noise into the first one's tail, and its clip to [0, 255]. With `fixed`, one pass over the
    natural batch records the statistics of every normalization; they are constants to all attack
    steps, so only the samples under attack pass through the network.

    With several replicas, each works on its share (devices.shares), and x, x_nat and so on are all
    replicas' values. What is random is drawn for the whole batch, then divided.
    """
    strategy = model.strategy
    replicas = strategy.num_replicas_in_sync
    samples = shares(adversarial_tail(config), replicas)
    tail = adversarial_tail(config, replicas)
    adversary = TradesAttack if config['adversary'] == 'trades' else LinfPGDAttack
    attack = adversary.from_config(model, config, update_population_norms=update_population_norms)

    def get_batch(images, labels, step):
        seed = tf.stack([tf.constant(config['tf_random_seed'], tf.int64), tf.cast(step, tf.int64)])
        x_nat = tf.cast(images, tf.float32)
        if config['data_augmentation']:
            x_nat = augment(x_nat, tf.random.fold_in(seed, 0, alg='philox'))
        x = attack.initialize(x_nat, tf.random.fold_in(seed, 1, alg='philox'))
        batch = x, x_nat, tf.cast(labels, tf.int64)
        return batch if replicas == 1 else strategy.run(share, batch)

    def share(*batch):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return [tf.gather(values, tf.gather(samples, replica)) for values in batch]

    def perturb(x, x_nat, labels):
        if config['training_mode'] == 'natural':
            return x_nat
        head_later = config['training_mode'] == 'shaping_in_training'  # all are attacked first
        attacked = np.ones_like(tail) if head_later else tail
        if config['attack_norms'] == 'fixed':
            x = by_fixed_norms(x, x_nat, labels, int((~attacked).sum()))
        else:
            x = attack.ascend(x, x_nat, labels, None if attacked.all() else attacked)
        return strategy.run(masked, (x, x_nat, tail)) if head_later else x

    def by_fixed_norms(x, x_nat, labels, k):
        """Attacks samples [k:], with the norms of the natural batch through all steps."""
        recorded = strategy.run(model.record, (x_nat, update_population_norms))
        attacked = strategy.run(lambda *batch: [values[k:] for values in batch], (x, x_nat, labels))
        x = attack.ascend(*attacked, None, recorded)
        return strategy.run(lambda x, x_nat: tf.concat([x_nat[:k], x], 0), (x, x_nat))

    return get_batch, perturb


def make_train_step(model, optimizer, config):
    """Returns the training step: augmentation, attack and weight update in one tf.function.

    The model and the optimizer are made in the scope of the tf.distribute strategy that the step is
    for, if any.

    Returns:
        f(images, labels, step) -> dict of scalar tensors. images: uint8 [m, 32, 32, 3], labels:
        int64 [m], step: int64, the number of steps before this one. The dict holds `loss` (with
        weight decay), `xent` and `accuracy` (means over the batch), the same of the clean head
        (`xent_clean`, `accuracy_clean`) and the adversarial tail (`xent_adv`, `accuracy_adv`) where
        the training mode has them, `kl` where trades_beta is at work, and `learning_rate`. All are
        from before the update.

    The loss is the mean over all m samples of cross-entropy, with weight decay. The TRADES
    adversary with trades_beta above 0 adds trades_beta * KL(p(x_nat) || p(x_adv)) to the loss of
    each attacked sample, before that mean: in adv_only, what TRADES adds. p(x_nat) comes from a
    pass over the natural batch, the tail's samples in the shaped batch as it was before the attack.
    With trades_xent `natural`, the cross-entropy in the loss is of that pass, too, as TRADES was
    published; what is reported as xent stays that of X^(T).

    Each replica's loss is divided by their number: their sum is the mean over the batch.
    """
    m, strategy = config['training_batch_size'], model.strategy
    replicas = strategy.num_replicas_in_sync
    tail = adversarial_tail(config, replicas)
    beta = config['trades_beta'] if config['adversary'] == 'trades' and tail.any() else 0.
    get_batch, perturb = make_adversary(model, config)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=replicas == 1 and use_xla(config), input_signature=[
        tf.TensorSpec([m, 32, 32, 3], tf.uint8), tf.TensorSpec([m], tf.int64),
        tf.TensorSpec([], tf.int64)])
    def train_step(images, labels, step):
        x, x_nat, labels = get_batch(images, labels, step)
        x_adv = perturb(x, x_nat, labels)
        learning_rate = tf.convert_to_tensor(optimizer.learning_rate)
        metrics = strategy.run(update, (x_adv, x_nat, labels))
        return {**mean_of_replicas(strategy, metrics), 'learning_rate': learning_rate}

    def update(x_adv, x_nat, labels):
        with tf.GradientTape() as tape:
            logits_nat = model(x_nat, update_population_norms=True) if beta else None
            logits = model(x_adv, update_population_norms=True)
            xent = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(xent)
            if beta and config['trades_xent'] == 'natural':
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits_nat))
            loss += config['weight_decay'] * model.weight_decay_loss()
            loss /= replicas
            if beta:
                kl = tf.gather(kl_divergence(logits_nat, logits), np.flatnonzero(tail))
                loss += beta * tf.reduce_sum(kl) / m
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # sums them over the replicas
        model.average_population_norms()

        means = batch_means(xent, tf.argmax(logits, 1) == labels, tail)
        if beta:
            means['kl'] = tf.reduce_mean(kl)
        return {'loss': loss * replicas, **means}

    return train_step


def batch_means(xent, correct, tail):
    """Returns the means over a batch, its clean head and its tail: {'xent', 'accuracy', ...}."""
    correct = tf.cast(correct, tf.float32)
    means = {'xent': tf.reduce_mean(xent), 'accuracy': tf.reduce_mean(correct)}
    for name, part in (('clean', ~tail), ('adv', tail)):
        if part.any():
            means[f'xent_{name}'] = tf.reduce_mean(tf.gather(xent, np.flatnonzero(part)))
            means[f'accuracy_{name}'] = tf.reduce_mean(tf.gather(correct, np.flatnonzero(part)))
    return means


def mean_of_replicas(strategy, values):
    """Returns {name: scalar}, the mean over all replicas, of what strategy.run returned."""
    names = list(values)
    together = strategy.run(lambda *values: tf.stack(values), [values[name] for name in names])
    return dict(zip(names, tf.unstack(strategy.reduce('MEAN', together, axis=None))))


# ---- what is reported


def make_report(model, config):
    """Returns two functions of (images, labels, step): natural accuracy, and the batch X^(T).

    To be called before the step: they draw the same random numbers. Unlike the original's, these
    passes leave the moving averages alone: how often a run reports does not change what it trains.
    Of several replicas, X^(T) is this process's first one's share.
    """
    strategy = model.strategy
    get_batch, perturb = make_adversary(model, config, update_population_norms=False)

    def accuracy(x_nat, labels):
        logits = model(x_nat)
        return {'accuracy': tf.reduce_mean(tf.cast(tf.argmax(logits, 1) == labels, tf.float32))}

    @tf.function
    def natural_accuracy(images, labels, step):
        accuracies = strategy.run(accuracy, get_batch(images, labels, step)[1:])
        return mean_of_replicas(strategy, accuracies)['accuracy']

    @tf.function
    def attacked_images(images, labels, step):
        x_adv = perturb(*get_batch(images, labels, step))
        return strategy.experimental_local_results(x_adv)[0]

    return natural_accuracy, attacked_images


class Validation:
    """Accuracy on the held-out training images, natural and under PGD; which checkpoint is best.

    PGD as in config, made and judged with population norms, so that the attack is direct. The best
    checkpoint has the highest accuracy under PGD; a `natural` training's, the highest natural one.
    Among equals it is the first. No test image takes part (Rice et al. 2020, "Overfitting in
    adversarially robust deep learning").

    Args:
        model, data, config: of the training. prefix: the checkpoint to resume from, or None.
    """

    def __init__(self, model, data, config, prefix=None):
        self.model, self.data, self.config = model, data.validation_data, config
        self.n = self.data.n
        self.attack = LinfPGDAttack.from_config(model, config, training=False)
        self._right = tf.function(self._count)
        with tf.device('CPU'):  # how many are right, at which step; stored with the weights
            self.best = tf.Variable([-1., -1.], dtype=tf.float64)
        self.variables = {VALIDATION: self.best} if self.n else {}
        stored = self.n and prefix and read_record(
            prefix, tf.train.load_checkpoint(prefix), VALIDATION, tf.float64, 1)
        if np.shape(stored) == (2,) and np.isfinite(stored).all():
            self.best.assign(stored)

    @property
    def best_step(self):
        """The step of the best checkpoint so far, -1 where there is none."""
        return int(self.best[1])

    def measure(self, step):
        """Returns what the log says of the weights after `step` steps; notes if they are best."""
        size, right = self.config['eval_batch_size'], np.zeros(2)
        for start in range(0, self.n, size):
            x, y = self.data.xs[start:start + size], self.data.ys[start:start + size]
            x_adv = self.attack.perturb(x, y, (self.config['np_random_seed'], start))
            right += [int(self._right(tf.cast(x, tf.float32), y)), int(self._right(x_adv, y))]
        counts = right[int(self.config['training_mode'] != 'natural')]
        if counts > self.best[0]:
            self.best.assign([counts, step])
        return {'checkpoint': step, 'validation_accuracy': right[0] / self.n,
                'validation_accuracy_adv': right[1] / self.n, 'best_checkpoint': self.best_step}

    def _count(self, x, y):
        """Returns how many are right. Of several replicas, each has all of x; the first answers."""
        strategy = self.model.strategy
        def count(x):
            return tf.reduce_sum(tf.cast(tf.argmax(self.model(x, training=False), 1) == y,
                                         tf.int32))
        return strategy.experimental_local_results(strategy.run(count, (x,)))[0]


def report_validation(line, step, chief):
    """Prints what Validation.measure returned, and writes its TensorBoard summaries."""
    natural, adv = line['validation_accuracy'], line['validation_accuracy_adv']
    if chief:
        tell(f'Checkpoint {line["checkpoint"]}: validation nat accuracy {100 * natural:.4}%, '
             f'adv accuracy {100 * adv:.4}%; best so far {line["best_checkpoint"]}')
    tf.summary.scalar('accuracy nat validation', natural, step)
    tf.summary.scalar('accuracy adv validation', adv, step)


def tell_start(config, num_replicas, start):
    """Prints what is about to run from step `start` on."""
    if start >= config['max_num_training_steps']:
        return
    share = config['training_batch_size'] // num_replicas
    tell(f'Training on {num_replicas} replica{"s" if num_replicas > 1 else ""}, {share} samples of '
         'a batch on each; the first step also builds the graph')
    if config['precision'] == 'float32' and uses_tensor_float_32():
        tell('float32 on this GPU: convolutions and matrix products in TensorFloat-32, their '
             'inputs rounded to 10 bits (docs/running.md)')


def describe(step, nat_acc, metrics, steps, speed):
    """Returns lines for stdout and a dict for the log that tell of one step.

    Args:
        nat_acc: natural accuracy of this step's batch. metrics, steps: RunningMeans.tell's, means
            over so many steps but for the learning rate. speed: Pace.tell's.
    """
    mean = f'mean of {steps} step{"s" if steps > 1 else ""}'
    report = [f'Step {step}:    ({datetime.now()})',
              f'    training nat accuracy {nat_acc * 100:.4}% (this batch)']
    if 'accuracy_adv' in metrics:
        report.append(f'    training adv accuracy {metrics["accuracy_adv"] * 100:.4}% ({mean})')
    report.append(f'    loss {metrics["loss"]:.4f} ({mean}), '
                  f'learning rate {metrics["learning_rate"]:.4g}')
    line = {'step': step, 'accuracy_nat': nat_acc, 'mean_of_steps': steps, **metrics}
    if speed:
        line['examples_per_second'], left = speed
        report.append(f'    {speed[0]:.1f} examples per second, {left} left')
    return report, line


def write_summaries(metrics, steps, nat_acc, x_adv, config, step):
    """Writes TensorBoard summaries; '... adv' are the original's tags.

    They tell of the attacked samples alone: what stays clean in the batch is under '... clean'.
    metrics, steps: means over so many steps, but for the learning rate.
    """
    def scalar(tag, value, what=f'mean over the steps since the last point, {steps} here'):
        tf.summary.scalar(tag, value, step, what)

    tail = adversarial_tail(config, config['training_batch_size'] // len(x_adv))
    for tag in ('{}', '{} train'):  # twice, as in the original: to compare with eval, with runs
        for name in ('adv', 'clean'):
            if f'xent_{name}' in metrics:
                scalar(tag.format(f'accuracy {name}'), metrics[f'accuracy_{name}'])
                scalar(tag.format(f'xent {name}'), metrics[f'xent_{name}'])
        scalar(tag.format('accuracy nat'), nat_acc, 'of one batch')
    for name in ('loss', 'kl'):
        if name in metrics:
            scalar(name, metrics[name])
    scalar('learning rate', metrics['learning_rate'], 'of this step')
    for name, part in (('adv', tail), ('clean', ~tail)):
        if part.any():
            tf.summary.image(f'images {name} train', x_adv.numpy()[part] / 255., step)


# ---- resuming, and what must agree


def check_later_use(data, config, strategy):
    """Raises UserError for what would fail later: fail now, not after the training."""
    check_shares(config, strategy.num_replicas_in_sync)
    data.train_data.get_batch(0, config['training_batch_size'])
    eval_examples(data, config)
    check_names(config)


def resume(config, data, model, optimizer, strategy):
    """Loads the newest intact checkpoint in model_dir, if there is one.

    Returns:
        its step and its prefix, or 0 and None; and the training's origin, for its checkpoints.

    Raises:
        UserError: it is of another training, none there is intact, or the workers do not agree.
    """
    model_dir, start, newest = config['model_dir'], 0, None
    origin = make_origin(config, data)
    if checkpoints(model_dir):
        check_same_run(config, os.path.join(model_dir, 'config.json'))
        newest = find_checkpoint(config)
        check_same_origin(config, newest, origin)
        check_same_replicas(config, newest, strategy.num_replicas_in_sync)
        start = model.load_madry_checkpoint(newest, optimizer)
        if start > config['max_num_training_steps']:
            raise UserError(f'{model_dir} holds a training of {start} steps, and '
                            f'max_num_training_steps is {config["max_num_training_steps"]}; '
                            f'expected {start} or more, or another model_dir')
        tell(f'Resuming from {newest}')
    check_workers(config, start, strategy, origin)
    return start, newest, origin


def make_origin(config, data):
    """Returns what a checkpoint tells of its training, {name in the checkpoint: uint8 array}.

    TRAINING holds the keys that may not change, as JSON, and IMAGES a SHA-256 of all images and
    labels: config.json may be lost, and data_path may change. The original ignores both.
    """
    training = json.dumps(of_training(config)).encode()
    images = bytes.fromhex(data_digest(data))
    return {name: np.frombuffer(value, np.uint8)
            for name, value in ((TRAINING, training), (IMAGES, images))}


def check_same_run(config, path, prefix=None):
    """Raises UserError where another configuration than `config` was trained with.

    Args:
        path: of a stored configuration. prefix: of a checkpoint, whose own record counts too.
    """
    if os.path.exists(path):
        refuse_changes(config, load_config(path), f', or --config {path}, which resumes that one')
    if prefix is not None:
        check_same_origin(config, prefix, {})


def refuse_changes(config, stored, instead=''):
    """Raises UserError where a key that may not change has another value in `stored`, a dict.

    Args:
        instead: what else is expected than another folder.
    """
    changed = [f'{key} (was {stored[key]}, is {config[key]})' for key in config
               if not may_change(key) and stored[key] != config[key]]
    if changed:
        raise UserError(f'{config["model_dir"]} holds another training: {", ".join(changed)}; '
                        f'expected another model_dir{instead}')


def check_same_origin(config, prefix, origin):
    """Raises UserError where a checkpoint is of another configuration, or of other images.

    A checkpoint of an older version tells neither, and passes.

    Args:
        origin: of this training. Where it has no IMAGES, these are not compared.
    """
    reader = tf.train.load_checkpoint(prefix)
    training = read_record(prefix, reader, TRAINING, tf.uint8, 1)
    if training is not None:
        try:
            stored = load_config(values=dict(parse_json(training.tobytes().decode())))
        except (ValueError, TypeError, RecursionError) as error:  # a UserError is a ValueError
            raise UserError(f'{prefix}: {TRAINING} is no configuration: {brief(error)}') from None
        refuse_changes(config, stored)
    if trained_on_others(prefix, origin[IMAGES].tobytes().hex() if IMAGES in origin else None):
        raise UserError(f'{prefix} was trained on other images or labels than data_path '
                        f'{config["data_path"]} holds; expected the same, or another model_dir')


def trained_on_others(prefix, digest):
    """Whether a checkpoint says that it was trained on other images or labels.

    Released weights, and checkpoints of older versions, do not say.

    Args:
        digest: unfinished.data_digest of the images at hand; None: they are not compared.
    """
    images = read_record(prefix, tf.train.load_checkpoint(prefix), IMAGES, tf.uint8, 1)
    return images is not None and digest is not None and images.tobytes().hex() != digest


def read_record(prefix, reader, name, dtype, rank):
    """Returns the tensor of that name in a checkpoint, or None. Raises UserError: of another type.

    Its size is bounded: what an index claims would be allocated.
    """
    if not reader.has_tensor(name):
        return None
    shape = reader.get_variable_to_shape_map()[name]
    found = reader.get_variable_to_dtype_map()[name]
    if found != dtype or len(shape) != rank or np.prod(shape, dtype=object) > MAX_JSON_BYTES:
        raise UserError(f'{prefix}: {name} is {found.name} {list(shape)}; expected {dtype.name} of '
                        f'rank {rank}')
    return reader.get_tensor(name)


def check_same_replicas(config, prefix, num_replicas):
    """Raises UserError where another number of replicas, each with its norms, trained so far."""
    found = read_record(prefix, tf.train.load_checkpoint(prefix), NUM_REPLICAS, tf.int32, 0)
    before = 1 if found is None else int(found)
    if config['batch_norms'] == 'per_replica' and before != num_replicas:
        raise UserError(f'{prefix} was trained by {before} replicas, each with batch norms of its '
                        f'own; here are {num_replicas}: expected as many, or another model_dir')


def check_workers(config, start, strategy, origin):
    """Raises UserError unless all workers have the same first step, configuration and images."""
    check_agreement(strategy, start, f'this worker found a checkpoint of step {start} in '
                    f'{config["model_dir"]}, another worker another one; expected a model_dir that '
                    'all workers share')
    text = json.dumps({**config, 'model_dir': '', 'data_path': ''}).encode()
    digest = zlib.crc32(text + origin[IMAGES].tobytes())
    check_agreement(strategy, digest, 'the workers have different configurations or images; '
                    'expected the same, but for model_dir and data_path')


def prepare(config, start, num_replicas):
    """Makes model_dir ready to train on from step `start`: what a killed run left there goes."""
    model_dir = config['model_dir']
    tell_start(config, num_replicas, start)
    store_config(config, os.path.join(model_dir, 'config.json'))  # kept with the model
    remove_unfinished(model_dir)
    forget_steps(model_dir, start)


def make_saver(config, model, optimizer, means, validation, start, newest, chief, origin):
    """Returns the Saver of all that a resumed training needs; the initial weights are saved.

    Checkpoints after `start` are forgotten: they will be written again.
    """
    variables = {**model.checkpoint_variables(optimizer), **means.variables,
                 **validation.variables}
    with tf.device('CPU'):
        variables |= {name: tf.Variable(value) for name, value in origin.items()}
    replicas = model.strategy.num_replicas_in_sync
    if replicas > 1:
        variables[NUM_REPLICAS] = tf.Variable(replicas)
    kept = [prefix for prefix in reversed(checkpoints(config['model_dir']))
            if step_of(prefix) <= start]
    saver = Saver(config['model_dir'], variables, kept, newest, chief)
    if start == 0:
        saver.save(0)
    elif validation.best_step == start:  # a kill may have come before it was kept
        saver.keep_best(BEST)
    return saver


if __name__ == '__main__':
    run(main)

"""Trains a model, saving checkpoints and TensorBoard summaries (the original's train.py).

    python train.py                                    # config.json: w32-10, norm shaping
    python train.py --config configs/quick.json --set training_mode=adv_only

Started again with the same command, it goes on from the newest checkpoint in model_dir that is
whole, and ends as if it had never been stopped: all that is random follows from the seeds and the
step number, and the log and the TensorBoard curves are cut back to that checkpoint. Ctrl-C and
SIGTERM let it finish the step and save; it then leaves with status 75.
"""
from datetime import datetime, timedelta
import json
import os
import sys
from timeit import default_timer as timer
import zlib

from absl import flags
import numpy as np

from config import STOPPED, UserError, config_from_flags, load_config, run, store_config
import keras
import tensorflow as tf
from tqdm import tqdm

from cifar10_input import eval_examples, load_data
from distribution import (LOST, check_shares, divide_cpu, is_chief, make_strategy, make_sum,
                          num_workers, shares)
from model import build_model, checkpoints, find_checkpoint
from pgd_attack import LinfPGDAttack, masked
from resume import (LOG, append, forget_steps, in_one_line, reason, refuse_full_disk,
                    remove_unfinished, stop_on_signals, take_lock, tell)
from shaping import tail_mask
from trades import TradesAttack, kl_divergence

# Keys that a run may change when it is started again: they leave the training itself as it was.
MAY_CHANGE = ('model_dir', 'data_path', 'max_num_training_steps', 'num_output_steps',
              'num_summary_steps', 'num_checkpoint_steps', 'num_eval_examples', 'eval_batch_size',
              'eval_on_cpu', 'store_adv_path', 'inference_shaping_ratio', 'shaping_batch_size',
              'xla', 'fgsm_epsilon', 'apgd_num_steps', 'eot_draws', 'num_attack_examples')
NUM_REPLICAS = 'num_replicas'  # in the checkpoints of several
PROFILE_STEPS = 10


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


def augment(images, seed):
    """Pads images [b, 32, 32, 3] by 2 zeros a side, crops 32 x 32 and flips, both at random."""
    b, size = images.shape[0], images.shape[1]
    padded = tf.pad(images, [[0, 0], [2, 2], [2, 2], [0, 0]])
    corner = tf.random.stateless_uniform([b, 2, 1], seed, 0, 5, tf.int32, alg='philox')
    rows, columns = tf.unstack(corner + tf.range(size), axis=1)  # [b, 32] each
    flipped = tf.random.stateless_uniform([b, 1], tf.random.fold_in(seed, 1, alg='philox'), 0, 2,
                                          tf.int32, alg='philox') == 1
    columns = tf.where(flipped, tf.reverse(columns, [1]), columns)
    return tf.gather(tf.gather(padded, rows, batch_dims=1), columns, axis=2, batch_dims=1)


def adversarial_tail(config, num_replicas=1):
    """Returns the mask of the samples that a training batch's weight update sees attacked, [m].

    With num_replicas: of those of one replica's share, [m / replicas].
    """
    m = config['training_batch_size'] // num_replicas
    if config['training_mode'] in ('natural', 'adv_only'):
        return np.full(m, config['training_mode'] == 'adv_only')
    return tail_mask(m, config['shaping_ratio'])


def make_batch(model, config, update_population_norms=True):
    """Returns f(images, labels, step) -> (x_nat, x, labels): augmented images, and the batch X^(T).

    X^(T) is what the weight update sees: clean head and adversarial tail, as training_mode says
    (paper, Eq. 5 and section VI). f is made of TensorFlow ops, its randomness of tf_random_seed and
    the step number alone. With several replicas, each works on its share (distribution.shares), and
    what f returns is all replicas' values; the attack's loop is around them, as replicas cannot
    exchange anything within a loop of their own.
    """
    strategy = model.strategy
    tail = adversarial_tail(config)
    samples = shares(tail, strategy.num_replicas_in_sync)
    mode = config['training_mode']
    ball = config['epsilon'], config['num_steps'], config['step_size']
    if config['adversary'] == 'trades':
        attack = TradesAttack(model, *ball, update_population_norms=update_population_norms)
    else:
        attack = LinfPGDAttack(model, *ball, config['random_start'], config['loss_func'],
                               update_population_norms=update_population_norms)
    attacked = None  # that is, all
    if mode == 'shaping_in_attack_and_training':
        attacked = adversarial_tail(config, strategy.num_replicas_in_sync)

    def first(images, labels, step):
        """What precedes the loop, in each replica: drawn for the whole batch, then shared out."""
        seed = tf.stack([tf.constant(config['tf_random_seed'], tf.int64), tf.cast(step, tf.int64)])
        x_nat = x = tf.cast(images, tf.float32)
        labels = tf.cast(labels, tf.int64)
        if config['data_augmentation']:
            x_nat = x = augment(x_nat, tf.random.fold_in(seed, 0, alg='philox'))
        if mode != 'natural':
            x = attack.first(x_nat, tf.random.fold_in(seed, 1, alg='philox'),
                             None if attacked is None else tail)
        if len(samples) > 1:
            mine = tf.gather(samples, tf.distribute.get_replica_context().replica_id_in_sync_group)
            x_nat, x, labels = (tf.gather(values, mine) for values in (x_nat, x, labels))
        return x_nat, x, labels, () if mode == 'natural' else attack.target(x_nat, labels)

    def attack_step(x, x_nat, target):
        return attack.step(x, x_nat, target, attacked)

    def put_head_back(x, x_nat):
        return masked(x, x_nat, adversarial_tail(config, len(samples)))

    def batch(images, labels, step):
        x_nat, x, labels, target = strategy.run(first, (images, labels, step))
        if mode != 'natural':
            for _ in tf.range(config['num_steps']):
                x = strategy.run(attack_step, (x, x_nat, target))
        if mode == 'shaping_in_training':
            x = strategy.run(put_head_back, (x, x_nat))
        return x_nat, x, labels

    return batch


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

    Each replica's loss is divided by their number: their sum is the mean over the batch.
    """
    m, strategy = config['training_batch_size'], model.strategy
    replicas = strategy.num_replicas_in_sync
    tail = adversarial_tail(config, replicas)
    beta = config['trades_beta'] if config['adversary'] == 'trades' and tail.any() else 0.
    batch = make_batch(model, config)
    optimizer.build(model.trainable_variables)

    def update(x_nat, x, labels):
        with tf.GradientTape() as tape:
            logits_nat = model(x_nat) if beta else None
            logits = model(x)
            xent = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(xent) + config['weight_decay'] * model.weight_decay_loss()
            loss /= replicas
            if beta:
                kl = tf.gather(kl_divergence(logits_nat, logits), np.flatnonzero(tail))
                loss += beta * tf.reduce_sum(kl) / m
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # sums them over the replicas
        model.average_population_norms()

        correct = tf.cast(tf.argmax(logits, 1) == labels, tf.float32)
        means = {'xent': tf.reduce_mean(xent), 'accuracy': tf.reduce_mean(correct)}
        if beta:
            means['kl'] = tf.reduce_mean(kl)
        for name, part in (('clean', ~tail), ('adv', tail)):
            if part.any():
                means[f'xent_{name}'] = tf.reduce_mean(tf.gather(xent, np.flatnonzero(part)))
                means[f'accuracy_{name}'] = tf.reduce_mean(tf.gather(correct, np.flatnonzero(part)))
        return {'loss': loss * replicas, **means}

    @tf.function(jit_compile=replicas == 1 and use_xla(config), input_signature=[
        tf.TensorSpec([m, 32, 32, 3], tf.uint8), tf.TensorSpec([m], tf.int64),
        tf.TensorSpec([], tf.int64)])
    def train_step(images, labels, step):
        learning_rate = tf.convert_to_tensor(optimizer.learning_rate)
        metrics = strategy.run(update, batch(images, labels, step))
        return {**mean_of_replicas(strategy, metrics), 'learning_rate': learning_rate}

    return train_step


def mean_of_replicas(strategy, values):
    """Returns {name: scalar}, the mean over all replicas, of what strategy.run returned."""
    names = list(values)
    together = strategy.run(lambda *values: tf.stack(values), [values[name] for name in names])
    return dict(zip(names, tf.unstack(strategy.reduce('MEAN', together, axis=None))))


def make_report(model, config):
    """Returns two functions of (images, labels, step): natural accuracy, and the batch X^(T).

    To be called before the step: they draw the same random numbers. Unlike the original's, these
    passes leave the moving averages alone: how often a run reports does not change what it trains.
    Of several replicas, X^(T) is this process's first one's share.
    """
    strategy = model.strategy
    natural = make_batch(model, {**config, 'training_mode': 'natural'})
    batch = make_batch(model, config, update_population_norms=False)

    @tf.function
    def natural_accuracy(images, labels, step):
        def accuracy(_, x, labels):
            logits = model(x, update_population_norms=False)
            return {'accuracy': tf.reduce_mean(tf.cast(tf.argmax(logits, 1) == labels, tf.float32))}
        accuracies = strategy.run(accuracy, natural(images, labels, step))
        return mean_of_replicas(strategy, accuracies)['accuracy']

    @tf.function
    def attacked_images(images, labels, step):
        return strategy.experimental_local_results(batch(images, labels, step)[1])[0]

    return natural_accuracy, attacked_images


def write_summaries(metrics, nat_accuracy, x, tail, step):
    """Writes TensorBoard summaries; '... adv' are the original's tags.

    They tell of the attacked samples alone: what stays clean in the batch is under '... clean'.
    """
    for tag in ('{}', '{} train'):  # twice, as in the original: to compare with eval, with runs
        for name in ('adv', 'clean'):
            if f'xent_{name}' in metrics:
                tf.summary.scalar(tag.format(f'accuracy {name}'), metrics[f'accuracy_{name}'], step)
                tf.summary.scalar(tag.format(f'xent {name}'), metrics[f'xent_{name}'], step)
        tf.summary.scalar(tag.format('accuracy nat'), nat_accuracy, step)
    for name in ('loss', 'kl'):
        if name in metrics:
            tf.summary.scalar(name, metrics[name], step)
    tf.summary.scalar('learning rate', metrics['learning_rate'], step)
    for name, part in (('adv', tail), ('clean', ~tail)):
        if part.any():
            tf.summary.image(f'images {name} train', x.numpy()[part] / 255., step)


def check_same_run(config, path):
    """Raises UserError when `path` holds the configuration of another training than `config`'s."""
    if not os.path.exists(path):
        return
    stored = load_config(path)
    changed = [f'{key} (was {stored[key]}, is {config[key]})' for key in config
               if key not in MAY_CHANGE and stored[key] != config[key]]
    if changed:
        raise UserError(f'{config["model_dir"]} holds another training: {", ".join(changed)}; '
                        'another model_dir would fit')


def check_same_replicas(config, prefix, num_replicas):
    """Raises UserError where another number of replicas, each with its norms, trained so far."""
    reader = tf.train.load_checkpoint(prefix)
    before = int(reader.get_tensor(NUM_REPLICAS)) if reader.has_tensor(NUM_REPLICAS) else 1
    if config['batch_norms'] == 'per_replica' and before != num_replicas:
        raise UserError(f'{prefix} was trained by {before} replicas, each with batch norms of its '
                        f'own; here are {num_replicas}: as many, or another model_dir, would fit')


def main():
    tf.get_logger().setLevel('ERROR')  # the Saver calls itself deprecated, at length
    config = config_from_flags()
    divide_cpu(flags.FLAGS.logical_cpus)
    strategy = make_strategy(config)
    check_shares(config, strategy.num_replicas_in_sync)
    try:
        train(config, strategy)
    except LOST as error:
        if num_workers(strategy) == 1:
            raise
        print(f'train.py: a worker was lost ({type(error).__name__}: {reason(error)[:200]}); '
              'unless one tells of a mistake, the same command on all workers goes on from the '
              'newest checkpoint', file=sys.stderr)
        sys.exit(STOPPED)


def train(config, strategy):
    """Trains until max_num_training_steps, or until a signal; see the program's docstring."""
    chief = is_chief(strategy)
    sum_over_replicas = make_sum(strategy)
    keras.utils.set_random_seed(config['tf_random_seed'])
    max_num_training_steps = config['max_num_training_steps']
    batch_size = config['training_batch_size']
    model_dir = config['model_dir']
    stored_config = os.path.join(model_dir, 'config.json')

    # Setting up the data, the model and the optimizer
    data = load_data(config)
    data.train_data.get_batch(0, batch_size)
    eval_examples(data, config)  # rather told now than after the training
    with strategy.scope():
        model = build_model(config, data.num_classes)
        optimizer = make_optimizer(config)
        train_step = make_train_step(model, optimizer, config)
    natural_accuracy, attacked_images = make_report(model, config)
    tail = adversarial_tail(config, strategy.num_replicas_in_sync)

    # Going on from the newest checkpoint that is whole, where there is one
    start, newest = 0, None
    os.makedirs(model_dir, exist_ok=True)
    _lock = take_lock(os.path.join(model_dir, 'lock')) if chief else None
    if checkpoints(model_dir):
        check_same_run(config, stored_config)
        newest = find_checkpoint(config)
        check_same_replicas(config, newest, strategy.num_replicas_in_sync)
        start = model.load_madry_checkpoint(newest, optimizer)
        tell(f'Going on from {newest}')
    if sum_over_replicas(start) != start * strategy.num_replicas_in_sync:
        raise UserError(f'this worker found a checkpoint of step {start} in {model_dir}, another '
                        'one another: a model_dir that all workers share would fit')
    digest = zlib.crc32(json.dumps({**config, 'model_dir': '', 'data_path': ''}).encode())
    if sum_over_replicas(digest) != digest * strategy.num_replicas_in_sync:
        raise UserError('the workers have different configurations; the same but for model_dir and '
                        'data_path would fit')
    # The first step is left out: it also traces the graph
    profiled = range(start + 1, start + 1 + PROFILE_STEPS) if flags.FLAGS.profile else range(0)
    if flags.FLAGS.profile and max_num_training_steps - start <= PROFILE_STEPS:
        raise UserError(f'--profile takes {PROFILE_STEPS} steps after the first; '
                        f'{max(0, max_num_training_steps - start)} are left')

    # Setting up the TensorBoard, log and checkpoint outputs
    if chief:
        store_config(config, stored_config)  # kept with the model, for reproducibility
        remove_unfinished(model_dir)
        forget_steps(model_dir, start)
        state = model.checkpoint_variables(optimizer)
        if strategy.num_replicas_in_sync > 1:
            state[NUM_REPLICAS] = tf.Variable(strategy.num_replicas_in_sync)
        saver = tf.compat.v1.train.Saver(state, max_to_keep=3,
                                         save_relative_paths=True)  # model_dir may be moved
        saver.recover_last_checkpoints([prefix for prefix in reversed(checkpoints(model_dir))
                                        if int(prefix.rpartition('-')[2]) <= start])
        log = os.path.join(model_dir, LOG)
        with in_one_line(f'TensorBoard summaries in {model_dir}'):
            summary_writer = tf.summary.create_file_writer(model_dir)

    last_good = newest

    def save(step):
        """Saves a checkpoint, unless a weight is not finite: the last good one is kept then."""
        nonlocal last_good
        state = model.checkpoint_variables(optimizer).values()
        if not all(np.isfinite(v.numpy()).all() for v in state):
            stop_diverged(step, 'a weight')
        if not chief:
            return
        try:
            last_good = saver.save(None, os.path.join(model_dir, 'checkpoint'), step,
                                   write_meta_graph=False)
        except tf.errors.OpError as error:
            remove_unfinished(model_dir)
            raise UserError(f'no checkpoint could be written in {model_dir}: {reason(error)}; the '
                            f'last good one is {last_good}') from None

    def stop_diverged(step, what):
        raise UserError(f'{what} is NaN or infinite at step {step}; the last good checkpoint is '
                        f'{last_good}; a lower learning rate in step_size_schedule, with another '
                        'model_dir, may fit')

    if start == 0:
        save(0)

    # Main training loop
    asked = stop_on_signals()
    training_time, timed_steps = 0., 0
    bar = tqdm(total=max_num_training_steps, initial=start, unit='step',
               disable=not (chief and sys.stderr.isatty()))
    for ii in range(start, max_num_training_steps):
        if ii in profiled[:1]:
            with in_one_line(f'the profile in {model_dir}'):
                tf.profiler.experimental.start(model_dir)
        x_batch, y_batch = data.train_data.get_batch(ii, batch_size)
        inputs = tf.constant(x_batch), tf.constant(y_batch), tf.constant(ii, tf.int64)

        # What the step itself does not tell: natural accuracy and the attacked images
        output = ii % config['num_output_steps'] == 0
        summary = ii % config['num_summary_steps'] == 0
        nat_accuracy = float(natural_accuracy(*inputs)) if output or summary else None
        images = attacked_images(*inputs) if summary else None

        # Actual training step
        begin = timer()
        with tf.profiler.experimental.Trace('train', step_num=ii, _r=1):
            metrics = {name: float(value) for name, value in train_step(*inputs).items()}
        if ii > start:  # the first step also traces the graph
            training_time += timer() - begin
            timed_steps += 1
        bar.update()
        if not np.isfinite(metrics['loss']):
            stop_diverged(ii, 'the loss')
        stop = sum_over_replicas(len(asked)) > 0  # a signal to one worker stops all
        last = ii + 1 == max_num_training_steps

        # What is reported, first where a kill cannot make it forgotten: before the checkpoint
        report = []
        if output:
            report = [f'Step {ii}:    ({datetime.now()})',
                      f'    training nat accuracy {nat_accuracy * 100:.4}%']
            if 'accuracy_adv' in metrics:
                report.append(f'    training adv accuracy {metrics["accuracy_adv"] * 100:.4}%')
            report.append(f'    loss {metrics["loss"]:.4f}, '
                          f'learning rate {metrics["learning_rate"]:.4g}')
            line = {'step': ii, 'accuracy_nat': nat_accuracy, **metrics}
            if timed_steps:
                seconds = training_time / timed_steps
                left = timedelta(seconds=round(seconds * (max_num_training_steps - ii - 1)))
                report.append(f'    {batch_size / seconds:.1f} examples per second, {left} left')
                line['examples_per_second'] = batch_size / seconds
                training_time, timed_steps = 0., 0
            if chief:
                append(log, json.dumps(line))

        # TensorBoard summaries
        if summary and chief:
            with in_one_line(f'TensorBoard summaries in {model_dir}'):
                with summary_writer.as_default():
                    write_summaries(metrics, nat_accuracy, images, tail, ii)
                summary_writer.flush()
            refuse_full_disk(model_dir)
        if ii in profiled and (stop or ii == profiled[-1]):
            with in_one_line(f'the profile in {model_dir}'):
                tf.profiler.experimental.stop()
            report.append(f'Profile of steps {profiled[0]} to {ii}: tensorboard --logdir '
                          f'{model_dir}')

        # Write a checkpoint
        if (ii + 1) % config['num_checkpoint_steps'] == 0 or last or stop:
            save(ii + 1)

        # Output to stdout
        if report and chief:
            tell('\n'.join(report))
        if stop and not last:
            bar.close()
            tell(f'Stopped after {ii + 1} steps, which are saved; the same command goes on')
            sys.exit(STOPPED)
    bar.close()
    if chief:
        tell(f'{max(start, max_num_training_steps)} steps done: {last_good}')


if __name__ == '__main__':
    flags.DEFINE_boolean('profile', False, f'Write a TensorBoard profile of {PROFILE_STEPS} steps '
                         'into model_dir.')
    flags.DEFINE_integer('logical_cpus', 1, 'Divide the CPU into so many logical devices, to try '
                         'distribution=mirrored without GPUs.')
    run(main)

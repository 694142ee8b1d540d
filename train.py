"""Trains a model, saving checkpoints and TensorBoard summaries (the original's train.py).

    python train.py                                    # config.json: w32-10, norm shaping
    python train.py --config configs/quick.json --set training_mode=adv_only

Started again, it goes on from the newest checkpoint in model_dir.
"""
from datetime import datetime, timedelta
import os
import sys
from timeit import default_timer as timer

import numpy as np

from config import UserError, config_from_flags, load_config, run, store_config
import keras
import tensorflow as tf
from tqdm import tqdm

from cifar10_input import eval_examples, load_data
from model import build_model
from pgd_attack import LinfPGDAttack
from shaping import tail_mask
from trades import TradesAttack, kl_divergence

# Keys that a run may change when it is started again: they leave the training itself as it was.
MAY_CHANGE = ('model_dir', 'data_path', 'max_num_training_steps', 'num_output_steps',
              'num_summary_steps', 'num_checkpoint_steps', 'num_eval_examples', 'eval_batch_size',
              'eval_on_cpu', 'store_adv_path', 'inference_shaping_ratio', 'shaping_batch_size',
              'xla', 'fgsm_epsilon', 'apgd_num_steps', 'eot_draws', 'num_attack_examples')


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


def adversarial_tail(config):
    """Returns the mask [m] of the samples that a training batch's weight update sees attacked."""
    m = config['training_batch_size']
    if config['training_mode'] in ('natural', 'adv_only'):
        return np.full(m, config['training_mode'] == 'adv_only')
    return tail_mask(m, config['shaping_ratio'])


def make_batch(model, config, update_population_norms=True):
    """Returns f(images, labels, step) -> (x_nat, x): the augmented images, and the batch X^(T).

    X^(T) is what the weight update sees: clean head and adversarial tail, as training_mode says
    (paper, Eq. 5 and section VI). f is made of TensorFlow ops, its randomness of tf_random_seed and
    the step number alone.
    """
    ball = config['epsilon'], config['num_steps'], config['step_size']
    if config['adversary'] == 'trades':
        attack = TradesAttack(model, *ball, update_population_norms=update_population_norms)
    else:
        attack = LinfPGDAttack(model, *ball, config['random_start'], config['loss_func'],
                               update_population_norms=update_population_norms)
    tail = adversarial_tail(config)

    def batch(images, labels, step):
        seed = tf.stack([tf.constant(config['tf_random_seed'], tf.int64), tf.cast(step, tf.int64)])
        x_nat = tf.cast(images, tf.float32)
        if config['data_augmentation']:
            x_nat = augment(x_nat, tf.random.fold_in(seed, 0, alg='philox'))
        attack_seed = tf.random.fold_in(seed, 1, alg='philox')
        if config['training_mode'] == 'natural':
            return x_nat, x_nat
        if config['training_mode'] == 'shaping_in_attack_and_training':
            return x_nat, attack.perturb(x_nat, labels, attack_seed, tail)
        x_adv = attack.perturb(x_nat, labels, attack_seed)
        return x_nat, tf.where(tail[:, None, None, None], x_adv, x_nat)

    return batch


def make_train_step(model, optimizer, config):
    """Returns the training step: augmentation, attack and weight update in one tf.function.

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
    """
    m = config['training_batch_size']
    tail = adversarial_tail(config)
    beta = config['trades_beta'] if config['adversary'] == 'trades' and tail.any() else 0.
    batch = make_batch(model, config)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=use_xla(config), input_signature=[
        tf.TensorSpec([m, 32, 32, 3], tf.uint8), tf.TensorSpec([m], tf.int64),
        tf.TensorSpec([], tf.int64)])
    def train_step(images, labels, step):
        x_nat, x = batch(images, labels, step)
        with tf.GradientTape() as tape:
            logits_nat = model(x_nat) if beta else None
            logits = model(x)
            xent = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(xent) + config['weight_decay'] * model.weight_decay_loss()
            if beta:
                kl = tf.gather(kl_divergence(logits_nat, logits), np.flatnonzero(tail))
                loss += beta * tf.reduce_sum(kl) / m
        learning_rate = tf.convert_to_tensor(optimizer.learning_rate)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

        correct = tf.cast(tf.argmax(logits, 1) == labels, tf.float32)
        metrics = {'loss': loss, 'xent': tf.reduce_mean(xent), 'accuracy': tf.reduce_mean(correct),
                   'learning_rate': learning_rate}
        if beta:
            metrics['kl'] = tf.reduce_mean(kl)
        for name, part in (('clean', ~tail), ('adv', tail)):
            if part.any():
                metrics[f'xent_{name}'] = tf.reduce_mean(tf.gather(xent, np.flatnonzero(part)))
                metrics[f'accuracy_{name}'] = tf.reduce_mean(
                    tf.gather(correct, np.flatnonzero(part)))
        return metrics

    return train_step


def make_report(model, config):
    """Returns two functions of (images, labels, step): natural accuracy, and the batch X^(T).

    To be called before the step: they draw the same random numbers. Unlike the original's, these
    passes leave the moving averages alone: how often a run reports does not change what it trains.
    """
    natural = make_batch(model, {**config, 'training_mode': 'natural'})
    batch = make_batch(model, config, update_population_norms=False)

    @tf.function
    def natural_accuracy(images, labels, step):
        logits = model(natural(images, labels, step)[1], update_population_norms=False)
        return tf.reduce_mean(tf.cast(tf.argmax(logits, 1) == labels, tf.float32))

    @tf.function
    def attacked_images(images, labels, step):
        return batch(images, labels, step)[1]

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


def main():
    tf.get_logger().setLevel('ERROR')  # the Saver calls itself deprecated, at length
    config = config_from_flags()
    keras.utils.set_random_seed(config['tf_random_seed'])
    max_num_training_steps = config['max_num_training_steps']
    batch_size = config['training_batch_size']
    model_dir = config['model_dir']
    stored_config = os.path.join(model_dir, 'config.json')

    # Setting up the data, the model and the optimizer
    data = load_data(config)
    data.train_data.get_batch(0, batch_size)
    eval_examples(data, config)  # rather told now than after the training
    model = build_model(config, data.num_classes)
    optimizer = make_optimizer(config)
    train_step = make_train_step(model, optimizer, config)
    natural_accuracy, attacked_images = make_report(model, config)
    tail = adversarial_tail(config)

    # Setting up the TensorBoard and checkpoint outputs
    saver = tf.compat.v1.train.Saver(model.checkpoint_variables(optimizer), max_to_keep=3,
                                     save_relative_paths=True)  # model_dir may be moved
    found = tf.train.get_checkpoint_state(model_dir)
    start = 0
    if not found and tf.io.gfile.glob(os.path.join(model_dir, 'checkpoint-*.index')):
        raise UserError(f'{model_dir} holds checkpoints, but no readable file `checkpoint` that '
                        'names the newest; another model_dir would fit')
    if found:
        check_same_run(config, stored_config)
        start = model.load_madry_checkpoint(found.model_checkpoint_path, optimizer)
        saver.recover_last_checkpoints(found.all_model_checkpoint_paths)
        print(f'Going on from {found.model_checkpoint_path}', flush=True)
    os.makedirs(model_dir, exist_ok=True)
    store_config(config, stored_config)  # kept with the model, for reproducibility
    summary_writer = tf.summary.create_file_writer(model_dir)

    def save():
        """Saves a checkpoint, unless a weight is not finite: the last good one is kept then."""
        state = model.checkpoint_variables(optimizer).values()
        if not all(np.isfinite(v.numpy()).all() for v in state):
            stop_diverged(int(optimizer.iterations), 'a weight')
        try:
            saver.save(None, os.path.join(model_dir, 'checkpoint'), optimizer.iterations.value,
                       write_meta_graph=False)
        except tf.errors.OpError as error:
            raise UserError(f'no checkpoint could be written in {model_dir}: '
                            f'{error.message.splitlines()[0]}') from None

    def stop_diverged(step, what):
        raise UserError(f'{what} is NaN or infinite at step {step}; the last good checkpoint is '
                        f'{tf.train.latest_checkpoint(model_dir)}; a lower learning rate in '
                        'step_size_schedule, with another model_dir, may fit')

    if start == 0:
        save()

    # Main training loop
    training_time, timed_steps = 0., 0
    bar = tqdm(total=max_num_training_steps, initial=start, unit='step',
               disable=not sys.stderr.isatty())
    for ii in range(start, max_num_training_steps):
        x_batch, y_batch = data.train_data.get_batch(ii, batch_size)
        inputs = tf.constant(x_batch), tf.constant(y_batch), tf.constant(ii, tf.int64)

        # What the step itself does not tell: natural accuracy and the attacked images
        output = ii % config['num_output_steps'] == 0
        summary = ii % config['num_summary_steps'] == 0
        nat_accuracy = float(natural_accuracy(*inputs)) if output or summary else None
        images = attacked_images(*inputs) if summary else None

        # Actual training step
        begin = timer()
        metrics = {name: float(value) for name, value in train_step(*inputs).items()}
        if ii > start:  # the first step also traces the graph
            training_time += timer() - begin
            timed_steps += 1
        bar.update()
        if not np.isfinite(metrics['loss']):
            stop_diverged(ii, 'the loss')

        # Output to stdout
        if output:
            report = [f'Step {ii}:    ({datetime.now()})',
                      f'    training nat accuracy {nat_accuracy * 100:.4}%']
            if 'accuracy_adv' in metrics:
                report.append(f'    training adv accuracy {metrics["accuracy_adv"] * 100:.4}%')
            report.append(f'    loss {metrics["loss"]:.4f}, '
                          f'learning rate {metrics["learning_rate"]:.4g}')
            if timed_steps:
                seconds = training_time / timed_steps
                left = timedelta(seconds=round(seconds * (max_num_training_steps - ii - 1)))
                report.append(f'    {batch_size / seconds:.1f} examples per second, {left} left')
                training_time, timed_steps = 0., 0
            tqdm.write('\n'.join(report))
            sys.stdout.flush()

        # TensorBoard summaries
        if summary:
            with summary_writer.as_default():
                write_summaries(metrics, nat_accuracy, images, tail, ii)
            summary_writer.flush()

        # Write a checkpoint
        if (ii + 1) % config['num_checkpoint_steps'] == 0 or ii + 1 == max_num_training_steps:
            save()
    bar.close()
    print(f'{max(start, max_num_training_steps)} steps done: '
          f'{tf.train.latest_checkpoint(model_dir)}')


if __name__ == '__main__':
    run(main)

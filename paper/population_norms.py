"""Other ways to estimate the population norms, tried on trained weights.

A moving average keeps 0.9 of itself in every forward pass with batch norms, and a training step
makes num_steps + 1 of them: nearly 0.7 of what `pn` normalizes by is the last training batch
(1 - 0.9 ** 11), most of that from half-finished attacks. Training itself normalizes by batch norms
alone, so any other rule can be tried on the trained weights. The table `norms` shows how much of
the difference between `pn` and `bn_shaping` depends on the rule.
"""
import functools
import json
from typing import NamedTuple

import numpy as np
import keras
import tensorflow as tf

from model import BN_DECAY, build_model, checkpoints
from paper.trainings import trained_precision
from running.arriving import step_of
from train import make_adversary, make_optimizer, make_train_step

NUM_BATCHES = 200  # of each rule but 'last batch'
# The keys are part of what kept numbers are known by: renaming one orphans them
RULES = {
    'trained': 'the moving averages of the training',
    'again': f'the same after {NUM_BATCHES} more batches, weights frozen: a check of the rest',
    'updates': f'likewise, updated by the {NUM_BATCHES} X^(T) alone, not by attack steps',
    'last batch': 'the statistics of one X^(T)',
    'training batches': f'the mean over {NUM_BATCHES} X^(T)',
    'clean images': f'the mean over {NUM_BATCHES} batches of unchanged training images',
    'attacked batches': f'the mean over {NUM_BATCHES} batches of attacked samples alone'}


class Replay(NamedTuple):
    """Population norms that the training itself would have had, found by training again."""
    decay: float = BN_DECAY  # of the moving averages
    stale: int = 0           # how many steps before the weights they stop


REPLAYS = {
    **{f'decay {decay}': Replay(decay=decay) for decay in (0.5, 0.99)},
    **{f'stale {steps}': Replay(stale=steps) for steps in (10, 100, 1000)}}
NUM_REPLAYED = 500  # steps, at least, before the norms are taken: `fixed` makes two updates in
# each, and 0.99 ** (500 * 2) is 0.00004


def set_population_norms(model, data, config, rule):
    """Sets a trained model's population norms by a rule.

    Args:
        model: a model.Model with the weights and population norms of a training.
        data: a CIFAR10Data. config: the training's configuration.
        rule: one of RULES. The batches are the next ones of the training, augmented and attacked as
            its training mode says; for 'clean images' they are neither, for 'attacked batches' they
            are attacked as a whole, whatever the training mode. Or one of REPLAYS.

    Raises:
        UserError: a replay finds no checkpoint that a training can resume from.
    """
    if rule == 'trained':
        return
    if rule in REPLAYS:
        config = {**config, 'precision': trained_precision(config)}
        for v, norm in zip(population_norms(model), replayed(data, json.dumps(config), rule)):
            v.assign(norm)
        return
    if rule == 'attacked batches':
        config = {**config, 'training_mode': 'adv_only', 'attack_norms': 'batch'}
    get_batch, perturb = make_adversary(model, config, update_population_norms=rule == 'again')
    attacked = tf.function(lambda *batch: perturb(*get_batch(*batch)))
    one_batch = batch_statistics(model)
    total, num_batches = 0., 1 if rule == 'last batch' else NUM_BATCHES
    for i in range(num_batches):
        step = config['max_num_training_steps'] + i
        x, labels = data.train_data.get_batch(step, config['training_batch_size'])
        if rule != 'clean images':
            x = attacked(tf.constant(x), tf.constant(labels), tf.constant(step, tf.int64))
        if rule in ('again', 'updates'):
            model(tf.cast(x, tf.float32), update_population_norms=True)
        else:
            total += one_batch(x)
    if rule not in ('again', 'updates'):
        for v, mean in zip(population_norms(model), total / num_batches):
            v.assign(mean)


@functools.lru_cache(maxsize=1)
def replayed(data, config, rule):
    """Returns what `replay` does, kept for the next attack. config: as JSON."""
    return replay(data, json.loads(config), REPLAYS[rule])


def replay(data, config, wanted):
    """Returns the population norms of a training as a Replay wants them, a list of arrays.

    The training's last steps are made again from a checkpoint of its folder, to the bit on the
    machine that it was made on. Where there is none, as its folder keeps three, from its start.

    Args:
        config: the training's, of max_num_training_steps steps.
    """
    goal = max(0, config['max_num_training_steps'] - wanted.stale)
    keras.utils.set_random_seed(config['tf_random_seed'])
    model, optimizer = build_model(config, data.num_classes), make_optimizer(config)
    model.norm_decay = wanted.decay
    start = 0
    for prefix in checkpoints(config['model_dir']):  # the newest first
        step = step_of(prefix)
        if step <= goal - (NUM_REPLAYED if wanted.decay != BN_DECAY else 0):
            start = model.load_madry_checkpoint(prefix, optimizer)
            break
    train_step = make_train_step(model, optimizer, config)
    for ii in range(start, goal):
        x_batch, y_batch = data.train_data.get_batch(ii, config['training_batch_size'])
        train_step(tf.constant(x_batch), tf.constant(y_batch), tf.constant(ii, tf.int64))
    return [v.numpy() for v in population_norms(model)]


def batch_statistics(model):
    """Returns f(x [b, 32, 32, 3]) -> the statistics that x moves the population norms towards.

    They are arrays [channels] in an object array, in the order of population_norms: means and
    unbiased variances. f leaves the population norms as they were.
    """
    norms = population_norms(model)
    forward = tf.function(lambda x: model(x, update_population_norms=True))

    def statistics(x):
        before = [v.numpy() for v in norms]
        for v in norms:
            v.assign(tf.zeros_like(v))
        forward(tf.cast(x, tf.float32))  # moves them by 1 - BN_DECAY of this batch's statistics
        found = np.empty(len(norms), object)
        for i, v in enumerate(norms):
            found[i] = v.numpy() / np.float32(1 - BN_DECAY)
            v.assign(before[i])
        return found

    return statistics


def population_norms(model):
    """Returns the variables that hold a model's population norms, means and variances."""
    return [v for name, v in model.variables_by_name.items()
            if name.endswith(('/moving_mean', '/moving_variance'))]

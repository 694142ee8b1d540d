"""The L-infinity PGD attack (the original's pgd_attack.py), all its steps in one graph.

Run as a program it attacks the evaluation set with the newest checkpoint, with population norms as
the original does, and stores the result in store_adv_path:

    python pgd_attack.py --config FILE

Stopped and started again with the same command, it goes on after the last batch that was finished:
until the end they are kept in STORE_ADV_PATH.part.
"""
import os

from absl import flags
import numpy as np

from config import UserError, config_from_flags, define_model_flags, run
import tensorflow as tf

LOSS_FUNCS = ('xent', 'cw')


class LinfPGDAttack:
    """Projected gradient ascent on the sum of the losses of a batch, by signs of the gradient.

    Args:
        model: called as model(images, training=...) -> logits, and with
            update_population_norms=False where that is asked for.
        epsilon: radius of the L-infinity ball around the natural image, in pixels of [0, 255].
        num_steps, step_size: number of steps, and the length of each in pixels.
        random_start: start uniformly within the ball rather than at the natural image.
        loss_func: 'xent', or 'cw' (the original's margin loss, -relu(correct - best other + 50)).
        training: normalize by the batch (True, the default) or by the population norms.
        update_population_norms: with batch norms, let every step move the moving averages, as the
            original's training does. An attack on a model that is only judged must say False.

    Raises:
        ValueError: an unknown loss_func. (The original fell back to 'xent'.)
    """

    def __init__(self, model, epsilon, num_steps, step_size, random_start, loss_func, training=True,
                 update_population_norms=True):
        if loss_func not in LOSS_FUNCS:
            raise ValueError(f'loss_func is {loss_func!r}; one of {LOSS_FUNCS} would fit')
        self.model = model
        self.epsilon = epsilon
        self.num_steps = num_steps
        self.step_size = step_size
        self.rand = random_start
        self.loss_func = loss_func
        self.norms = {'training': training}
        if not update_population_norms:
            self.norms['update_population_norms'] = False
        self._graph = tf.function(self._perturb)

    def perturb(self, x_nat, y, seed, tail=None):
        """Returns adversarial examples within epsilon of x_nat and within [0, 255].

        Args:
            x_nat: natural images [b, 32, 32, 3], pixels in [0, 255], any numeric type.
            y: labels [b], integers.
            seed: an int or two of them ([2]); the random start follows from it alone.
            tail: boolean mask [b] of the samples that are attacked, None for all. The others'
                pixels come back bit for bit as they were. They still take part in every step:
                in the batch norms and in the loss (paper, Eq. 5).

        Returns:
            float32 [b, 32, 32, 3].
        """
        x_nat = tf.cast(x_nat, tf.float32)
        seed = tf.cast(seed, tf.int64)
        if seed.shape.rank == 0:
            seed = tf.stack([seed, tf.zeros_like(seed)])
        if tail is not None:
            tail = tf.convert_to_tensor(tail, tf.bool)
        return self._graph(x_nat, tf.cast(y, tf.int64), seed, tail)

    def _perturb(self, x_nat, y, seed, tail, *given):
        target = self.target(x_nat, y)
        x = self.first(x_nat, seed, tail)
        for _ in tf.range(self.num_steps):
            x = self.step(x, x_nat, target, tail, *given)
            x.set_shape(x_nat.shape)
        return x

    def ball(self, x_nat):
        """Returns the least and the greatest pixels that an example may have, [b, 32, 32, 3]."""
        return tf.maximum(x_nat - self.epsilon, 0.), tf.minimum(x_nat + self.epsilon, 255.)

    def first(self, x_nat, seed, tail):
        """Returns the batch before the first step; `perturb` says what the arguments are."""
        return masked(self.start(x_nat, *self.ball(x_nat), seed), x_nat, tail)

    def step(self, x, x_nat, target, tail, *given):
        """Returns the batch x [b, 32, 32, 3] one step on; `target` is what self.target returned."""
        x += self.step_size * tf.sign(self.gradient(x, target, *given))
        return masked(tf.clip_by_value(x, *self.ball(x_nat)), x_nat, tail)

    def start(self, x_nat, lower, upper, seed):
        """Returns where the attack starts, [b, 32, 32, 3]."""
        if not self.rand:
            return x_nat
        noise = 2. ** -31 * tf.cast(random_bits(x_nat, seed), tf.float32)  # uniform in [-1, 1]
        return tf.clip_by_value(x_nat + self.epsilon * noise, lower, upper)

    def target(self, x_nat, y):
        """Returns what the loss compares the logits with: the labels y [b]."""
        return y

    def gradient(self, x, target):
        """Returns the gradient of the summed loss with respect to x, [b, 32, 32, 3]."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            loss = self.loss(self.model(x, **self.norms), target)
        return tape.gradient(loss, x)

    def loss(self, logits, y):
        """Returns the loss that the attack maximizes, summed over the batch."""
        if self.loss_func == 'xent':
            return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        return -tf.reduce_sum(tf.nn.relu(margin(logits, y) + 50))


def masked(x, x_nat, tail):
    """Returns x where the mask tail [b] is set and x_nat elsewhere; x where tail is None."""
    return x if tail is None else tf.where(tail[:, None, None, None], x, x_nat)


def margin(logits, y):
    """Returns the correct logit less the best other one of each sample, [b]."""
    is_label = tf.one_hot(y, logits.shape[-1], on_value=True, off_value=False)
    correct = tf.reduce_sum(tf.where(is_label, logits, 0.), axis=1)
    best_other = tf.reduce_max(tf.where(is_label, logits.dtype.min, logits), axis=1)
    return correct - best_other


def random_bits(like, seed):
    """Returns int32s over their whole range, in the shape of `like`; they follow from the seed.

    Random floats are made of these: XLA makes other floats of one seed than the standard kernels.
    """
    return tf.random.stateless_uniform(tf.shape(like), seed, None, None, tf.int32, alg='philox')


def main():
    from attacks import make_attack, perturbation_fault
    from cifar10_input import eval_examples, load_data
    from model import build_model, find_checkpoint
    from unfinished import appended, checkpoint_digest, data_digest, finish, relevant
    config = config_from_flags()
    path = config['store_adv_path']
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or '.'):
        raise UserError(f'store_adv_path is {path}; the path of a file in a folder that exists '
                        'would fit')
    if config['eval_on_cpu']:
        tf.config.set_visible_devices([], 'GPU')
    data = load_data(config)
    images, _ = eval_examples(data, config)
    model = build_model(config, data.num_classes)
    checkpoint = find_checkpoint(config, flags.FLAGS.checkpoint)
    model.load_madry_checkpoint(checkpoint)
    attack, settings = make_attack('pgd', model, data, config)
    what = [checkpoint_digest(checkpoint), data_digest(data), relevant(config, 'pgd')]

    # Iterate over the samples batch by batch
    x_adv = np.empty(images.shape, np.float32)
    for start, end in appended(path, x_adv, config['eval_batch_size'], what, 'pgd'):
        x_adv[start:end] = attack(start, end)
    fault = perturbation_fault(images, x_adv, settings['epsilon'])
    if fault:
        raise RuntimeError(fault)
    finish(path)
    print(f'{len(x_adv)} examples stored in {path}')


if __name__ == '__main__':
    define_model_flags()
    run(main)

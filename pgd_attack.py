"""The L-infinity PGD attack (the original's pgd_attack.py), all its steps in one graph.

Run as a program it attacks the evaluation set with the newest checkpoint, with population norms as
the original does, and stores the result in store_adv_path:

    python pgd_attack.py --config FILE

Stopped and started again with the same command, it resumes after the last finished batch: until the
end they are kept in STORE_ADV_PATH.part.
"""
import os

from absl import flags
import numpy as np

from config import LOSS_FUNCS, begin, config_from_flags, define_model_flags, relevant
from running.program import run

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    define_model_flags()
    begin(__doc__)

import running.quiet  # noqa: F401
import tensorflow as tf

from cifar10_input import eval_examples, load_data
from model import build_model, find_checkpoint
from running import UserError
from running.devices import leave_gpus
from running.unfinished import appended, checkpoint_digest, data_digest, finish
from shaping import masked


class LinfPGDAttack:
    """Projected gradient ascent on the sum of the losses of a batch, by signs of the gradient.

    Args:
        model: called as model(images, training=...) -> logits, and with
            update_population_norms=True where that is asked for.
        epsilon: radius of the L-infinity ball around the natural image, in pixels of [0, 255].
        num_steps, step_size: number of steps, and the length of each in pixels.
        random_start: start uniformly within the ball rather than at the natural image.
        loss_func: 'xent', or 'cw' (the original's margin loss, -relu(correct - best other + 50)).
        training: normalize by the batch (True, the default) or by the population norms.
        update_population_norms: with batch norms, let every step move the moving averages, as the
            original's training does. Only a training asks for it.

    Raises:
        ValueError: an unknown loss_func. (The original falls back to 'xent'.)
    """

    def __init__(self, model, epsilon, num_steps, step_size, random_start, loss_func, training=True,
                 update_population_norms=False):
        if loss_func not in LOSS_FUNCS:
            raise ValueError(f'loss_func must be one of {LOSS_FUNCS}, got {loss_func!r}')
        self.model = model
        self.epsilon = epsilon
        self.num_steps = num_steps
        self.step_size = step_size
        self.rand = random_start
        self.loss_func = loss_func
        self.norms = {'training': training}
        if update_population_norms:
            self.norms['update_population_norms'] = True
        self.strategy = getattr(model, 'strategy', None) or tf.distribute.get_strategy()
        self._graph = tf.function(self._perturb)

    def loss(self, logits, y):
        """Returns the loss that the attack maximizes, summed over the batch."""
        if self.loss_func == 'xent':
            return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        return -tf.reduce_sum(tf.nn.relu(margin(logits, y) + 50))

    def gradient(self, x, reference, *given):
        """Returns the gradient of the summed loss with respect to x, [b, 32, 32, 3]."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            loss = self.loss(self.logits(x, *given), reference)
        return tape.gradient(loss, x)

    def perturb(self, x_nat, y, seed, tail=None):
        """Returns adversarial examples within epsilon of x_nat and within [0, 255].

        Args:
            x_nat: natural images [b, 32, 32, 3], pixels in [0, 255], any numeric type.
            y: labels [b], integers.
            seed: an int or two of them ([2]); the random start is derived from it alone.
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
        return self.ascend(self.initialize(x_nat, seed), x_nat, y, tail, *given)

    def initialize(self, x_nat, seed):
        """Returns where the attack starts, [b, 32, 32, 3]."""
        if not self.rand:
            return x_nat
        return self.project(x_nat + self.epsilon * uniform_noise(x_nat, seed), x_nat)

    def ascend(self, x, x_nat, y, tail=None, *given):
        """Returns the batch after num_steps steps from x; to be called within a tf.function.

        The loop is around the replicas of the model's strategy, where there are several: these
        cannot exchange anything within a loop of their own. x, x_nat and y are then all replicas'
        values, and tail is the mask of one share. `given` is what `logits` takes beside x.
        """
        run_ = self.strategy.run
        x, reference = run_(self.before, (x, x_nat, y, tail, *given))
        for _ in tf.range(self.num_steps):
            x = run_(self.step, (x, x_nat, reference, tail, *given))
        return x

    def step(self, x, x_nat, reference, tail, *given):
        """Returns the batch x [b, 32, 32, 3] one step on; reference: see `reference`.

        It raises the loss, as in the original; the paper's Eq. 4 and 5 have a minus there.
        """
        stepped = x + self.step_size * tf.sign(self.gradient(x, reference, *given))
        stepped = masked(self.project(stepped, x_nat), x_nat, tail)
        stepped.set_shape(x_nat.shape)
        return stepped

    def project(self, x, x_nat):
        """Returns x [b, 32, 32, 3] clipped to the ball around x_nat and to [0, 255]."""
        return project(x, x_nat, self.epsilon)

    # ---- beyond the original's file

    @classmethod
    def from_config(cls, model, config, **norms):
        """Returns the attack that a configuration describes. norms: as above, by name."""
        return cls(model, **pgd_settings(config), **norms)

    def before(self, x, x_nat, y, tail, *given):
        """Returns the batch before the first step, and what the loss compares the logits with.

        The copy makes it a value of this replica, as each step's is: the loop keeps one structure.
        """
        return tf.identity(masked(x, x_nat, tail)), self.reference(x_nat, y, *given)

    def reference(self, x_nat, y, *given):
        """Returns what the loss compares the logits with: the labels y [b]."""
        return y

    def logits(self, x, recorded=None):
        """Returns the logits that the attack goes through: by recorded norms, where given."""
        return (self.model(x, **self.norms) if recorded is None else
                self.model(x, recorded=recorded))


def added(gradient, another):
    """Returns the sum of two gradients, in a loop within a loop.

    `+` will not do: TensorFlow's optimizer joins it with the tape's own sums and, where the network
    is deep and the batch large, keeps the result in a temporary variable that is still there at the
    next call, which then fails (tensorflow/tensorflow issue 23780).
    """
    return tf.reduce_sum([gradient, another], axis=0)


def project(x, x_nat, epsilon):
    """Returns x [b, 32, 32, 3] clipped to the ball around x_nat and to [0, 255]."""
    return tf.clip_by_value(x, tf.maximum(x_nat - epsilon, 0.), tf.minimum(x_nat + epsilon, 255.))


def pgd_settings(config):
    """Returns what LinfPGDAttack takes from a configuration."""
    return {key: config[key] for key in ('epsilon', 'num_steps', 'step_size', 'random_start',
                                         'loss_func')}


def margin(logits, y):
    """Returns the correct logit less the best other one of each sample, [b]."""
    is_label = tf.one_hot(y, logits.shape[-1], on_value=True, off_value=False)
    correct = tf.reduce_sum(tf.where(is_label, logits, 0.), axis=1)
    best_other = tf.reduce_max(tf.where(is_label, logits.dtype.min, logits), axis=1)
    return correct - best_other


def random_bits(like, seed):
    """Returns int32s over their whole range, in the shape of `like`, derived from the seed.

    Random floats are made of these: XLA makes other floats of one seed than the standard kernels.
    """
    return tf.random.stateless_uniform(tf.shape(like), seed, None, None, tf.int32, alg='philox')


def uniform_noise(like, seed):
    """Returns float32s, uniform in [-1, 1], in the shape of `like`, derived from the seed."""
    return 2. ** -31 * tf.cast(random_bits(like, seed), tf.float32)


def finite(values, what):
    """Returns values as an array. Raises UserError where one is NaN or infinite.

    An accuracy would hide it: the largest of NaNs is the first class.
    """
    values = np.asarray(values)
    if not np.isfinite(values).all():
        raise UserError(f'{what} are NaN or infinite; expected a model whose training did not '
                        'diverge')
    return values


def perturbation_fault(x_nat, x_adv, epsilon, slack=1e-4):
    """Returns what is wrong with adversarial examples, a line, or None if nothing is.

    Args:
        x_nat, x_adv: [b, 32, 32, 3]. epsilon: radius of the ball, in pixels, or None: there is no
            ball, [0, 255] alone. slack: for rounding.
    """
    x_adv = np.asarray(x_adv, np.float64)
    if not np.isfinite(x_adv).all():
        return 'a pixel is NaN or infinite'
    low, high = x_adv.min(), x_adv.max()
    if low < -slack or high > 255 + slack:
        return f'pixels lie in [{low:.6g}, {high:.6g}]; expected [0, 255]'
    if epsilon is None:
        return None
    l_inf = np.abs(x_adv - np.asarray(x_nat, np.float64)).max()
    if l_inf > epsilon + slack:
        return f'the largest perturbation is {l_inf:.6g}; expected at most epsilon, {epsilon:.6g}'
    return None


def main():
    config = config_from_flags()
    path = config['store_adv_path']
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or '.'):
        raise UserError(f'store_adv_path is {path}; expected the path of a file in a folder that '
                        'exists')
    leave_gpus(config)

    # The newest checkpoint
    checkpoint = find_checkpoint(config, flags.FLAGS.checkpoint, flags.FLAGS.select)

    # The data, the model and the attack
    data = load_data(config, flags.FLAGS.download)
    images, labels = eval_examples(data, config)
    model = build_model(config, data.num_classes)
    attack = LinfPGDAttack.from_config(model, config, training=False)
    model.load_madry_checkpoint(checkpoint)

    # Attack the samples, batch by batch
    x_adv = np.empty(images.shape, np.float32)
    what = [checkpoint_digest(checkpoint), data_digest(data), relevant(config, 'pgd')]
    for bstart, bend in appended(path, x_adv, config['eval_batch_size'], what, 'pgd'):
        seed = config['np_random_seed'], bstart
        x_adv[bstart:bend] = attack.perturb(images[bstart:bend], labels[bstart:bend], seed)
    fault = perturbation_fault(images, finite(x_adv, 'pixels by pgd'), config['epsilon'])
    if fault:
        raise RuntimeError(fault)

    # Store the examples
    finish(path)
    print(f'{len(x_adv)} examples stored in {path}')


if __name__ == '__main__':
    run(main)

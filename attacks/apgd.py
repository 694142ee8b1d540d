"""Auto-PGD (Croce and Hein 2020, "Reliable evaluation of adversarial robustness", algorithm 1).

PGD with momentum and a step size that halves itself, sample by sample, where a check finds no
progress. Without draws it is APGD of AutoAttack's standard version; with the gradient averaged over
fresh draws it is the attack of AutoAttack's `rand` version, for defences that draw at random: a
single draw's gradient is noise to an attacker who cannot know the draw.
"""
import numpy as np
import tensorflow as tf

from cifar10_input import eval_examples
from pgd_attack import margin, random_bits
from shaping import MAX_GRADIENT_IMAGES, Inference, form_of

MOMENTUM = 0.75        # the paper's alpha
PROGRESS = 0.75        # rho: the share of steps since the last check that must have raised the loss
FIRST_CHECK = 0.22     # all three as shares of num_steps: p_1,
CLOSER = 0.03          # by how much the checks' distance shrinks each time,
CLOSEST = 0.06         # and the least that it becomes


def dlr_loss(logits, y):
    """Returns the difference of logits ratio of each sample, [b] (the paper's equation 6).

    -(z_y - best other) / (largest - third largest): no softmax, so no scale of the logits can hide
    its gradient. Needs three classes or more.
    """
    top = tf.math.top_k(logits, 3).values
    return -margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def xent_loss(logits, y):
    """Returns the cross-entropy of each sample, [b]."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)


LOSSES = {'xent': xent_loss, 'dlr': dlr_loss}


def checkpoints(num_steps):
    """Returns the steps at which progress is checked: ceil(p_j * num_steps), p_1 < p_2 < ... < 1.

    In whole hundredths, as sums of 0.03s would miss them by rounding.
    """
    before, at = 0, round(100 * FIRST_CHECK)
    steps = []
    while at < 100:
        steps.append(-(-at * num_steps // 100))
        distance = max(at - before - round(100 * CLOSER), round(100 * CLOSEST))
        before, at = at, at + distance
    return sorted(set(steps))


class APGDAttack:
    """Auto-PGD on one loss through logits under draws, all its steps in one graph.

    Args:
        logits: f(x [b, 32, 32, 3], drawn) -> logits [b, classes].
        loss_func: a key of LOSSES.
        epsilon: radius of the ball in pixels. num_steps: steps, one gradient more.

    What is kept is the iterate that fewest draws answer rightly and, among equals, the one with the
    highest loss. (AutoAttack keeps one that its last draw misclassified: with random draws, luck.)
    """

    def __init__(self, logits, loss_func, epsilon, num_steps):
        self.logits, self.loss = logits, LOSSES[loss_func]
        self.epsilon, self.num_steps = epsilon, num_steps
        checks = checkpoints(num_steps)
        self.is_check = np.isin(np.arange(num_steps + 1), checks)
        self.since_last = np.zeros(num_steps + 1, np.float32)  # at a check: steps since the last
        self.since_last[checks] = np.diff([0, *checks])
        self._graph = tf.function(self._perturb)
        self._judge = tf.function(self.evaluate)

    def perturb(self, x_nat, y, seed, drawn):
        """Returns (x_adv [b, 32, 32, 3], share [b] of the draws that answer it rightly).

        Args:
            x_nat: [b, 32, 32, 3] in [0, 255]. y: labels [b]. seed: two ints, of the random start.
            drawn: [steps, draws, ...], what `logits` takes beside x: for each gradient, the draws
                to average over. The start has the first. Fewer steps take turns.
        """
        return self._graph(tf.cast(x_nat, tf.float32), tf.cast(y, tf.int64),
                           tf.cast(seed, tf.int64), tf.convert_to_tensor(drawn))

    def judge(self, x, y, drawn):
        """Returns (loss [b], share [b]), means over the draws `drawn`, [draws, ...]."""
        return self._judge(tf.cast(x, tf.float32), tf.cast(y, tf.int64),
                           tf.convert_to_tensor(drawn))[:2]

    def evaluate(self, x, y, drawn):
        """Returns the loss [b], the share of right answers [b] and the gradient, draws' means."""
        loss, share, gradient = tf.zeros_like(y, tf.float32), tf.zeros_like(y, tf.float32), 0. * x
        for one_draw in drawn:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                z = self.logits(x, one_draw)
                of_draw = self.loss(z, y)
            loss += of_draw
            share += tf.cast(tf.argmax(z, 1) == y, tf.float32)
            gradient += tape.gradient(of_draw, x)
        n = tf.cast(len(drawn), tf.float32)
        return loss / n, share / n, gradient / n

    def initialize(self, x_nat, seed):
        """Returns where the attack starts: noise that reaches the ball's surface."""
        noise = tf.cast(random_bits(x_nat, seed), tf.float32)
        noise /= tf.reduce_max(tf.abs(noise), axis=[1, 2, 3], keepdims=True)
        return self.project(x_nat + self.epsilon * noise, x_nat)

    def project(self, x, x_nat):
        """Returns x clipped to the ball around x_nat and to [0, 255]."""
        return tf.clip_by_value(x, tf.maximum(x_nat - self.epsilon, 0.),
                                tf.minimum(x_nat + self.epsilon, 255.))

    def _perturb(self, x_nat, y, seed, drawn):
        is_check, since_last = tf.constant(self.is_check), tf.constant(self.since_last)
        x = x_before = self.initialize(x_nat, seed)
        loss, share, gradient = self.evaluate(x, y, drawn[0])
        x_adv, adv_share, adv_loss = x, share, loss
        x_best, loss_best, gradient_best = x, loss, gradient
        step_size = tf.fill(tf.shape(y), tf.constant(2. * self.epsilon))
        increases = tf.zeros_like(loss)  # since the last check
        loss_at_check, halved_at_check = loss, tf.ones_like(y, tf.bool)

        for step in tf.range(1, self.num_steps + 1):
            # The step, with momentum
            alpha = tf.where(step > 1, MOMENTUM, 1.)
            z = self.project(x + per_sample(step_size) * tf.sign(gradient), x_nat)
            x_next = self.project(x + alpha * (z - x) + (1 - alpha) * (x - x_before), x_nat)
            x_before, x, loss_before = x, x_next, loss
            loss, share, gradient = self.evaluate(x, y, drawn[step % len(drawn)])

            stronger = (share < adv_share) | ((share == adv_share) & (loss > adv_loss))
            x_adv = tf.where(per_sample(stronger), x, x_adv)
            adv_share = tf.where(stronger, share, adv_share)
            adv_loss = tf.where(stronger, loss, adv_loss)
            increases += tf.cast(loss > loss_before, tf.float32)
            better = loss > loss_best
            x_best = tf.where(per_sample(better), x, x_best)
            loss_best = tf.where(better, loss, loss_best)
            gradient_best = tf.where(per_sample(better), gradient, gradient_best)

            # The check: halve the step, and go back to the best point, where there is no progress
            stuck = increases <= PROGRESS * since_last[step]
            stuck |= ~halved_at_check & (loss_at_check >= loss_best)
            stuck &= is_check[step]
            step_size = tf.where(stuck, step_size / 2, step_size)
            x = tf.where(per_sample(stuck), x_best, x)
            gradient = tf.where(per_sample(stuck), gradient_best, gradient)
            loss = tf.where(stuck, loss_best, loss)
            loss_at_check = tf.where(is_check[step], loss_best, loss_at_check)
            halved_at_check = tf.where(is_check[step], stuck, halved_at_check)
            increases = tf.where(is_check[step], 0., increases)
        return x_adv, adv_share


def per_sample(values):
    """Returns values [b] in the shape in which they go with images, [b, 1, 1, 1]."""
    return values[:, None, None, None]


def strongest(examples, attack, y, drawn):
    """Returns for each sample the strongest of several examples, and its share of right draws.

    Args:
        examples: a list of [b, 32, 32, 3]. attack: the APGDAttack whose loss settles what as many
            draws answer rightly. drawn: the draws that judge, the same for all.
    """
    judged = [attack.judge(x, y, drawn) for x in examples]
    loss, share = (np.array([one[i] for one in judged]) for i in (0, 1))
    first = np.lexsort((-loss, share), axis=0)[0]  # fewest right draws, then highest loss
    return np.choose(per_sample(first), [np.asarray(x) for x in examples])


def apgd_settings(data, config):
    """Returns what Auto-PGD takes from a configuration. (With two classes there is no DLR.)"""
    loss_funcs = [f for f in LOSSES if f != 'dlr' or data.num_classes > 2]
    return {'epsilon': config['epsilon'], 'num_steps': config['apgd_num_steps'],
            'loss_func': '+'.join(loss_funcs)}


def apgd(model, data, config, num_draws):
    """Returns Auto-PGD of apgd_num_steps steps with population norms; see attacks.make_attack.

    It runs once on cross-entropy and once on the difference of logits ratio, each on every sample,
    and keeps for each sample the stronger of the two examples.
    """
    return _through(Inference(model, 'pn'), data, config, {})


def apgd_eot(inference, data, config, num_draws):
    """Returns Auto-PGD through fresh draws at every step; see attacks.make_attack.

    It averages loss and gradient over eot_draws draws, the attacker's own: he knows the training
    set and the protocol, the recordings if there are any, not the defender's seed. AutoAttack's
    `rand` version gives a sample up as beaten after one lucky draw (its pull requests 104 and 105):
    here no sample is given up, and which of the two examples is stronger is settled by eot_draws
    more draws, the same for both. Where several test samples share a batch, each sample's best
    example met the others' examples of the same step, not their best ones; shaping_batch_size = n +
    1 leaves nothing to share. Where nothing is drawn, one gradient a step is enough.
    """
    eot_draws = {'eot_draws': config['eot_draws']} if inference.draws else {}
    return _through(inference, data, config, eot_draws)


def _through(inference, data, config, eot_draws):
    """Returns Auto-PGD on each loss through an inference: through fresh draws, so many if any."""
    images, labels = eval_examples(data, config)
    settings = apgd_settings(data, config)
    attacks = [APGDAttack(inference.logits, f, settings['epsilon'], settings['num_steps'])
               for f in settings['loss_func'].split('+')]
    steps, draws = (settings['num_steps'] + 1, *eot_draws.values()) if eot_draws else (1, 1)

    def perturb(start, end):
        # None of the attacker's own draws is the defender's
        rng = np.random.default_rng([config['np_random_seed'], start, 0, 0, 1])
        examples = []
        for part in inference.parts(end - start, MAX_GRADIENT_IMAGES):
            a, b = start + part.start, start + part.end
            of_losses = []
            for i, attack in enumerate(attacks):
                drawn = fresh_draws(inference, part, rng, steps, draws)
                seed = config['np_random_seed'], len(attacks) * a + i
                of_losses.append(attack.perturb(images[a:b], labels[a:b], seed, drawn)[0])
            judging, = fresh_draws(inference, part, rng, 1, draws)
            examples.append(strongest(of_losses, attacks[0], labels[a:b], judging))
        return tf.constant(np.concatenate(examples))

    return perturb, {**settings, 'norms': inference.mode, **eot_draws,
                     **form_of(inference.mode, config)}


def fresh_draws(inference, part, rng, steps, draws):
    """Returns `draws` of one's own for each of so many steps, int32 [steps, draws, ...]."""
    return np.stack([[inference.drawn(part, inference.fresh(rng)) for _ in range(draws)]
                     for _ in range(steps)])

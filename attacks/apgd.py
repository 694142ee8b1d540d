"""Auto-PGD (Croce and Hein 2020, "Reliable evaluation of adversarial robustness", algorithm 1).

PGD with momentum and a step size that halves itself, sample by sample, where a check finds no
progress. Without draws it is APGD of AutoAttack's standard version; with the gradient averaged over
fresh draws of clean samples it is the attack of AutoAttack's `rand` version, for defences that draw
at random: a single draw's gradient is noise to an attacker who cannot know the draw.
"""
import functools

import numpy as np
import tensorflow as tf

from cifar10_input import eval_examples
from pgd_attack import margin
from shaping import MAX_GRADIENT_IMAGES, ShapedInference, shaping_settings

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


def apgd(evaluate, x_nat, epsilon, num_steps, rng):
    """Returns (x_adv, share): the strongest iterates, and how many of the draws are right.

    Args:
        evaluate: f(x) -> (loss [b], share [b], gradient [b, 32, 32, 3]), NumPy arrays. The loss to
            maximize and its gradient, means over the draws; the share of draws with a right answer,
            0 or 1 where there is one draw or none.
        x_nat: [b, 32, 32, 3] in [0, 255].
        epsilon: radius of the ball in pixels. num_steps: steps, one evaluation more.
        rng: a NumPy generator, of the random start.

    What is kept is the iterate that fewest draws answer rightly and, among equals, the one with the
    highest loss. (AutoAttack keeps one that its last draw misclassified: with random draws, luck.)
    """
    x_nat = np.asarray(x_nat, np.float32)
    lower, upper = np.maximum(x_nat - epsilon, 0), np.minimum(x_nat + epsilon, 255)

    def per_sample(values):
        return values[:, None, None, None]

    noise = rng.uniform(-1, 1, x_nat.shape).astype(np.float32)
    noise /= per_sample(np.abs(noise).max((1, 2, 3)) + np.float32(1e-12))  # it reaches the ball
    x = np.clip(x_nat + epsilon * noise, lower, upper).astype(np.float32)
    loss, share, gradient = evaluate(x)
    x_adv, adv_share, adv_loss = x.copy(), share.copy(), loss.copy()
    x_best, loss_best, gradient_best = x.copy(), loss.copy(), gradient.copy()
    x_before = x
    step_size = np.full(len(x), 2 * epsilon, np.float32)
    increases = np.zeros(len(x), int)  # since the last check
    loss_at_check, halved_at_check = loss_best.copy(), np.ones(len(x), bool)
    checks, last_check = checkpoints(num_steps), 0

    for step in range(1, num_steps + 1):
        # The step, with momentum
        alpha = MOMENTUM if step > 1 else 1.
        z = np.clip(x + per_sample(step_size) * np.sign(gradient), lower, upper)
        x_next = np.clip(x + alpha * (z - x) + (1 - alpha) * (x - x_before), lower, upper)
        x_before, x = x, x_next.astype(np.float32)
        loss_before = loss
        loss, share, gradient = evaluate(x)

        stronger = (share < adv_share) | ((share == adv_share) & (loss > adv_loss))
        x_adv[stronger] = x[stronger]
        adv_share[stronger], adv_loss[stronger] = share[stronger], loss[stronger]
        increases += loss > loss_before
        better = loss > loss_best
        x_best[better], loss_best[better] = x[better], loss[better]
        gradient_best[better] = gradient[better]

        # The check: halve the step, and go back to the best point, where there is no progress
        if step in checks:
            stuck = increases <= PROGRESS * (step - last_check)
            stuck |= ~halved_at_check & (loss_at_check >= loss_best)
            step_size[stuck] /= 2
            x = np.where(per_sample(stuck), x_best, x)
            gradient = np.where(per_sample(stuck), gradient_best, gradient)
            loss = np.where(stuck, loss_best, loss)
            loss_at_check, halved_at_check = loss_best.copy(), stuck
            increases[:], last_check = 0, step
    return x_adv, adv_share


def loss_gradient(logits, loss_func):
    """Returns a tf.function of (x, y, *given) -> (loss [b], right [b] as 0 or 1, gradient).

    Args:
        logits: f(x, *given) -> logits [b, classes]. loss_func: a key of LOSSES.
    """
    @tf.function
    def f(x, y, *given):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            z = logits(x, *given)
            loss = LOSSES[loss_func](z, y)
        right = tf.cast(tf.argmax(z, 1) == y, tf.float32)
        return loss, right, tape.gradient(loss, x)
    return f


def averaged(gradient_of, y, draws):
    """Returns apgd's evaluate: the mean of a loss_gradient over draws.

    Args:
        y: labels [b]. draws: f() -> what to average over, each the `given` of one call.
    """
    y = tf.constant(y, tf.int64)

    def evaluate(x):
        x = tf.constant(x, tf.float32)
        parts = [[v.numpy() for v in gradient_of(x, y, *given)] for given in draws()]
        return [np.mean(part, axis=0, dtype=np.float32) for part in zip(*parts)]

    return evaluate


def strongest(gradient_of, x_nat, y, epsilon, num_steps, rng, draws):
    """Returns for each sample the stronger of APGD's examples on each loss, [b, 32, 32, 3].

    Args:
        gradient_of: {loss: loss_gradient of it}. draws: as averaged takes them. Which example is
            stronger is decided by one more set of draws, the same for all.
    """
    examples = [apgd(averaged(gradient, y, draws), x_nat, epsilon, num_steps, rng)[0]
                for gradient in gradient_of.values()]
    given = list(draws())
    judged = [averaged(gradient_of['xent'], y, lambda: given)(x) for x in examples]
    loss, share = (np.array([one[i] for one in judged]) for i in (0, 1))
    first = np.lexsort((-loss, share), axis=0)[0]  # fewest right draws, then highest loss
    return np.choose(first[:, None, None, None], examples)


def apgd_settings(data, config):
    """Returns what Auto-PGD takes from a configuration. (With two classes there is no DLR.)"""
    loss_funcs = [f for f in LOSSES if f != 'dlr' or data.num_classes > 2]
    return {'epsilon': config['epsilon'], 'num_steps': config['apgd_num_steps'],
            'loss_func': '+'.join(loss_funcs)}


def attackers_rng(config, start):
    """Returns the generator of the attacker's own draws: none is the defender's."""
    return np.random.default_rng([config['np_random_seed'], start, 0, 0, 1])


def apgd_attack(model, data, config, num_draws):
    """Returns Auto-PGD of apgd_num_steps steps with population norms; see attacks.make_attack.

    It runs once on cross-entropy and once on the difference of logits ratio, each on every sample,
    and keeps for each sample the stronger of the two examples.
    """
    images, labels = eval_examples(data, config)
    settings = apgd_settings(data, config)
    gradient_of = {f: loss_gradient(lambda x: model(x, training=False), f)
                   for f in settings['loss_func'].split('+')}

    def perturb(start, end):
        return tf.constant(strongest(
            gradient_of, images[start:end], labels[start:end], settings['epsilon'],
            settings['num_steps'], attackers_rng(config, start), lambda: [()]))

    return perturb, {**settings, 'norms': 'pn'}


def apgd_eot(model, data, config, num_draws):
    """Returns Auto-PGD through fresh draws of clean samples at every step; see attacks.make_attack.

    It goes through n:1 batches of the inference's form and averages loss and gradient over
    eot_draws draws of clean training samples, the attacker's own: he knows the training set and the
    protocol, not the defender's seed. AutoAttack's `rand` version gives a sample up as beaten after
    one lucky draw (its pull requests 104 and 105): here no sample is given up, and which of the two
    examples is stronger is settled by eot_draws more draws, the same for both. Where several test
    samples share a batch, each sample's best example met the others' examples of the same step, not
    their best ones; shaping_batch_size = n + 1 leaves nothing to share.
    """
    images, labels = eval_examples(data, config)
    settings, clean_images = apgd_settings(data, config), data.train_data.xs
    shaped = ShapedInference.from_config(model, data, config)
    gradient_of = {f: loss_gradient(shaped.logits, f) for f in settings['loss_func'].split('+')}

    def fresh_draws(rng, groups, k):
        for _ in range(config['eot_draws']):
            yield clean_images[np.stack([rng.choice(len(clean_images), k, replace=False)
                                         for _ in range(groups)])],

    def perturb(start, end):
        x_nat, y, rng = images[start:end], labels[start:end], attackers_rng(config, start)
        parts = []
        for a, b, (groups, k) in shaped.parts(end - start, MAX_GRADIENT_IMAGES):
            draws = functools.partial(fresh_draws, rng, groups, k)
            parts.append(strongest(gradient_of, x_nat[a:b], y[a:b], settings['epsilon'],
                                   settings['num_steps'], rng, draws))
        return tf.constant(np.concatenate(parts))

    return perturb, {**settings, 'norms': 'bn_shaping', 'eot_draws': config['eot_draws'],
                     **shaping_settings(config)}

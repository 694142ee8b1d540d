"""Auto-PGD (Croce and Hein 2020, "Reliable evaluation of adversarial robustness", algorithm 1).

PGD with momentum and a step size that halves itself, sample by sample, where a check finds no
progress. Here it goes through any inference, under known draws (`adaptive`; `apgd` where nothing is
drawn) or through fresh draws at every step (`apgd_eot`). Under population norms, it is APGD-CE and
APGD-T of AutoAttack's standard version, with untargeted DLR between them. That version has nine
targets (here as many as restarts), ranks them on the clean image (here on the strongest example so
far, so that two runs may have one target), and has FAB-T and Square beside them. Through fresh
draws, it is the attack of its `rand` version: one draw's gradient is noise to who cannot know the
draw.
"""
import numpy as np
import tensorflow as tf

from cifar10_input import eval_examples
from pgd_attack import added, margin, project, random_bits
from shaping import MAX_GRADIENT_IMAGES, Inference, form_of, masked, queries_of

MOMENTUM = 0.75        # the paper's alpha
PROGRESS = 0.75        # rho: the share of steps since the last check that must have raised the loss
FIRST_CHECK = 0.22     # all three as shares of num_steps: p_1,
CLOSER = 0.03          # by how much the checks' distance shrinks each time,
CLOSEST = 0.06         # and the least that it becomes
NUM_KEPT = 5           # iterates of apgd_eot that other draws judge


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


def targeted_dlr_loss(logits, y, target):
    """Returns the targeted difference of logits ratio of each sample, [b] (the paper's equation 7).

    -(z_y - z_target) / (largest - mean of third and fourth). Needs four classes or more.
    """
    top = tf.math.top_k(logits, 4).values
    lead = tf.gather(logits, y, batch_dims=1) - tf.gather(logits, target, batch_dims=1)
    return -lead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def targeted_xent_loss(logits, y, target):
    """Returns minus the cross-entropy of the target class, [b]; for less than four classes."""
    return -xent_loss(logits, target)


def untargeted(loss):
    """Returns a loss that is asked for a target, as the targeted ones are, and has none."""
    return lambda logits, y, target: loss(logits, y)


LOSSES = {'xent': untargeted(xent_loss), 'dlr': untargeted(dlr_loss),
          'targeted_dlr': targeted_dlr_loss, 'targeted_xent': targeted_xent_loss}


def loss_funcs_for(num_classes):
    """Returns the names of the losses that Auto-PGD runs on, in their order."""
    return ['xent', *(['dlr'] if num_classes > 2 else []),
            'targeted_dlr' if num_classes > 3 else 'targeted_xent']


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
    """Auto-PGD through logits under draws, all its steps in one graph.

    Args:
        logits: f(x [b, 32, 32, 3], drawn) -> logits [b, classes].
        loss_funcs: keys of LOSSES, any of which `perturb` may be asked for.
        epsilon: radius of the ball in pixels; `balls` may give each sample another.
        num_steps: steps, one gradient more.
        any_size: one graph for batches of all sizes, which logits must allow.
        num_kept: how many iterates are kept.

    What is kept are the iterates that fewest draws answer rightly and, among equals, those with the
    highest loss. (AutoAttack keeps one that its last draw misclassified: with random draws, luck.)
    Where the draws are fresh at every step, the best by its own draws is the luckiest, too: keep
    several, and judge them by other draws.
    """

    def __init__(self, logits, loss_funcs, epsilon, num_steps, any_size=False, num_kept=1):
        self.logits, self.loss_funcs = logits, loss_funcs
        self.epsilon, self.num_steps, self.num_kept = epsilon, num_steps, num_kept
        checks = checkpoints(num_steps)
        self.is_check = np.isin(np.arange(num_steps + 1), checks)
        self.since_last = np.zeros(num_steps + 1, np.float32)  # at a check: steps since the last
        self.since_last[checks] = np.diff([0, *checks])
        self._graph = tf.function(self._perturb, reduce_retracing=any_size)
        self._judge = tf.function(self._shares)

    def perturb(self, x_nat, y, seed, drawn, loss_func, start=None, active=None, rank=1):
        """Returns num_kept examples of each image, float32 [num_kept, b, 32, 32, 3].

        Args:
            x_nat: [b, 32, 32, 3] in [0, 255]. y: labels [b]. seed: two ints, of the random start.
            drawn: [steps, draws, ...], what `logits` takes beside x: for each gradient, the draws
                to average over. The start has the first. Fewer steps take turns.
            loss_func: one of loss_funcs.
            start, active: where active [b] is not set, the sample stays as it is in start [b, ...],
                and still takes part in the norms of the others. Default: all are attacked.
            rank: of the target class, for a targeted loss: 1 is the most probable wrong one.
        """
        x_nat, y = tf.cast(x_nat, tf.float32), tf.cast(y, tf.int64)
        start = x_nat if start is None else tf.cast(start, tf.float32)
        active = tf.ones(len(y), tf.bool) if active is None else tf.cast(active, tf.bool)
        return self._graph(x_nat, y, tf.cast(seed, tf.int64), tf.convert_to_tensor(drawn), start,
                           active, tf.constant(self.loss_funcs.index(loss_func)),
                           tf.constant(rank))

    def judge(self, x, y, drawn):
        """Returns (cross-entropy [b], share right [b]), means over `drawn`, [draws, ...]."""
        return self._judge(tf.cast(x, tf.float32), tf.cast(y, tf.int64),
                           tf.convert_to_tensor(drawn))

    def _shares(self, x, y, drawn):
        xent, share = tf.zeros_like(y, tf.float32), tf.zeros_like(y, tf.float32)
        for one_draw in drawn:
            z = self.logits(x, one_draw)
            xent += xent_loss(z, y)
            share += tf.cast(tf.argmax(z, 1) == y, tf.float32)
        n = tf.cast(len(drawn), tf.float32)
        return xent / n, share / n

    def target_class(self, x, y, drawn, rank):
        """Returns the target class of each sample, [b]: the rank-th most probable wrong one."""
        total = self.logits(x, drawn[0])
        for one_draw in drawn[1:]:
            total += self.logits(x, one_draw)
        wrong = tf.where(tf.one_hot(y, total.shape[-1], True, False), -np.inf, total)
        return tf.gather(tf.argsort(wrong, direction='DESCENDING'), rank - 1, axis=1)

    def evaluate(self, x, y, target, drawn, loss_func):
        """Returns the loss [b], the share of right answers [b] and the gradient, draws' means."""
        loss, share, gradient = tf.zeros_like(y, tf.float32), tf.zeros_like(y, tf.float32), 0. * x
        for one_draw in drawn:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                z = self.logits(x, one_draw)
                of_draw = tf.gather([LOSSES[f](z, y, target) for f in self.loss_funcs], loss_func)
            loss += of_draw
            share += tf.cast(tf.argmax(z, 1) == y, tf.float32)
            gradient = added(gradient, tape.gradient(of_draw, x))
        n = tf.cast(len(drawn), tf.float32)
        return loss / n, share / n, gradient / n

    def balls(self, y):
        """Returns the radius of each sample's ball in pixels, [b]."""
        return tf.fill(tf.shape(y), tf.constant(self.epsilon, tf.float32))

    def initialize(self, x_nat, seed, epsilon):
        """Returns where the attack starts: noise that reaches the ball's surface."""
        noise = tf.cast(random_bits(x_nat, seed), tf.float32)
        noise /= tf.reduce_max(tf.abs(noise), axis=[1, 2, 3], keepdims=True)
        return project(x_nat + epsilon * noise, x_nat, epsilon)

    def _perturb(self, x_nat, y, seed, drawn, start, active, loss_func, rank):
        is_check, since_last = tf.constant(self.is_check), tf.constant(self.since_last)
        is_targeted = tf.constant([f.startswith('targeted') for f in self.loss_funcs])
        target = tf.cond(tf.gather(is_targeted, loss_func),
                         lambda: tf.cast(self.target_class(start, y, drawn[0], rank), tf.int64),
                         lambda: y)
        radii = self.balls(y)
        epsilon = per_sample(radii)
        x = x_before = masked(self.initialize(x_nat, seed, epsilon), start, active)
        loss, share, gradient = self.evaluate(x, y, target, drawn[0], loss_func)
        kept = tf.repeat(x[None], self.num_kept, axis=0)
        kept_share, kept_loss = (tf.repeat(v[None], self.num_kept, axis=0) for v in (share, loss))
        x_best, loss_best, gradient_best = x, loss, gradient
        step_size = 2 * radii
        increases = tf.zeros_like(loss)  # since the last check
        loss_at_check, halved_at_check = loss, tf.ones_like(y, tf.bool)

        for step in tf.range(1, self.num_steps + 1):
            # The step, with momentum
            alpha = tf.where(step > 1, MOMENTUM, 1.)
            z = project(x + per_sample(step_size) * tf.sign(gradient), x_nat, epsilon)
            x_next = project(x + alpha * (z - x) + (1 - alpha) * (x - x_before), x_nat, epsilon)
            x_before, x, loss_before = x, masked(x_next, start, active), loss
            loss, share, gradient = self.evaluate(x, y, target, drawn[step % len(drawn)],
                                                  loss_func)

            # Those that are kept stand in order, the strongest first
            weaker = (share < kept_share) | ((share == kept_share) & (loss > kept_loss))
            kept = inserted(x, kept, weaker)
            kept_share = inserted(share, kept_share, weaker)
            kept_loss = inserted(loss, kept_loss, weaker)
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
        return kept


def inserted(value, kept, weaker):
    """Returns kept [k, b, ...] with value [b, ...] before the weaker ones, the last left out.

    Args:
        weaker: bool [k, b], which of the kept ones are weaker; the last of them, if any.
    """
    before = tf.concat([tf.zeros_like(weaker[:1]), weaker[:-1]], 0)
    shifted = tf.concat([value[None], kept[:-1]], 0)
    shape = tf.concat([tf.shape(weaker), tf.ones([tf.rank(kept) - 2], tf.int32)], 0)
    before, weaker = (tf.reshape(flags, shape) for flags in (before, weaker))
    return tf.where(weaker, tf.where(before, shifted, value), kept)


def per_sample(values):
    """Returns values [b] in the shape in which they go with images, [b, 1, 1, 1]."""
    return values[:, None, None, None]


# ---- the attacks


def apgd(model, data, config):
    """Returns Auto-PGD of apgd_num_steps steps with population norms; see attacks.make_attack."""
    return adaptive(Inference(model, 'pn'), data, config, 1)


def adaptive(inference, data, config, num_draws, until_wrong=True):
    """Returns Auto-PGD through the draws that will answer; see attacks.make_attack.

    Test samples are placed as they will be: all that the inference leaves to chance is known. With
    num_draws above 1, the attack is on the sum of the losses under all those draws.

    It runs num_restarts times on each loss: on cross-entropy, on the difference of logits ratio
    (DLR; three classes or more) and on targeted DLR (four or more; else on the target's
    cross-entropy), whose target is the r-th most probable wrong class in the r-th run. An image
    that all known draws answer wrongly is not attacked again; with until_wrong False it is, and
    gets, of the examples that fewest draws answer rightly, the one of highest cross-entropy.

    Where the images of a batch share their norms (`bn`; `bn_shaping` with several queries in a
    batch), all of them stay in every run. Those that are answered wrongly keep their pixels, and so
    take part in the norms that the others are attacked under. After each run the whole batch is
    judged as it will be; a group of images that share norms takes the new examples if fewer of them
    are then answered rightly, or as many with a higher cross-entropy.
    """
    def attack_part(images, labels, drawn, attack, runs, seed):
        batch = Batch(inference, images, labels, drawn, until_wrong)
        batch.run(attack, runs, seed)
        return batch.x_adv

    return through_known_draws(inference, data, config, num_draws, attack_part)


def through_known_draws(inference, data, config, num_draws, attack_part):
    """Returns an attack by Auto-PGD that knows the draws; see attacks.make_attack.

    Args:
        attack_part: f(images [b, 32, 32, 3], labels [b], drawn [draws, groups, size], attack, runs,
            seed) -> x_adv of what passes through the network at once. attack: an APGDAttack. runs:
            a list of (loss, rank of the target). seed: two ints, of the first run.
    """
    images, labels = eval_examples(data, config)
    runs = [(loss_func, restart + 1) for loss_func in loss_funcs_for(data.num_classes)
            for restart in range(config['num_restarts'])]
    attack = make_apgd(inference, data, config)
    num_draws = num_draws if inference.is_random else 1

    def perturb(start, end):
        draws = [inference.known(query)
                 for query in queries_of(start // config['eval_batch_size'], num_draws)]
        return tf.constant(np.concatenate([
            attack_part(images[a:b], labels[a:b], drawn, attack, runs,
                        (config['np_random_seed'], len(runs) * a))
            for a, b, drawn in inference.attacked_parts(start, end, draws)]))

    known = {'num_draws_known': num_draws} if inference.is_random else {}
    gradients = len(runs) * (attack.num_steps + 1) * num_draws * inference.number_forward_passes
    return perturb, {**apgd_settings(data, config), 'num_restarts': config['num_restarts'],
                     'norms': inference.mode, **known, **form_of(inference.mode, config),
                     'gradients': gradients}


class Batch:
    """Images under attack together, and the strongest examples so far.

    Args:
        inference: a shaping.Inference. images: [b, 32, 32, 3]. labels: [b].
        drawn: [draws, groups, size], the known draws for them.
        until_wrong: leave an image alone once all known draws answer it wrongly.
    """

    def __init__(self, inference, images, labels, drawn, until_wrong=True):
        self.inference, self.labels, self.drawn = inference, labels, drawn
        self.until_wrong = until_wrong
        self.x_nat = self.x_adv = images.astype(np.float32)
        self.judged = None  # (cross-entropy, share right) of x_adv, [b] each

    def start_from(self, attack, x_adv, is_fooled):
        """Goes on from examples that other draws were attacked with; leaves the fooled ones alone.

        Args:
            x_adv: [b, 32, 32, 3]. is_fooled: bool [b].
        """
        xent, share = self.judge(attack, x_adv)
        self.x_adv, self.judged = x_adv, [xent, np.where(is_fooled, 0, share)]

    def run(self, attack, runs, seed):
        """Attacks once for each of (loss, rank of the target); seed: two ints, of the first run."""
        for number, (loss_func, rank) in enumerate(runs):
            self.attack(attack, loss_func, (seed[0], seed[1] + number), rank)

    def attack(self, attack, loss_func, seed, rank):
        """Attacks the images that some draw answers rightly, or all; keeps what is stronger."""
        if self.judged is None:
            self.judged = self.judge(attack, self.x_adv)
        active = (self.judged[1] > 0) | (not self.until_wrong)
        if not active.any():
            return
        num_targets = int(self.inference.model.num_classes) - 1
        chosen = self.chosen(active)
        x_adv, = attack.perturb(
            self.x_nat[chosen], self.labels[chosen], seed,
            self.inference.drawn_for(self.drawn, chosen)[None], loss_func, self.x_adv[chosen],
            active[chosen], (rank - 1) % num_targets + 1)
        candidate = self.x_adv.copy()
        candidate[chosen[active[chosen]]] = x_adv.numpy()[active[chosen]]
        judged = self.judge(attack, candidate)
        better = self.is_better(judged)
        self.x_adv = np.where(per_sample(better), candidate, self.x_adv)
        self.judged = [np.where(better, new, old) for new, old in zip(judged, self.judged)]

    def judge(self, attack, x):
        return [v.numpy() for v in attack.judge(x, self.labels, self.drawn)]

    def chosen(self, active):
        """Returns which images pass through the network in a run, their places in the batch.

        All of them, where they share norms. Else those that are active, and some others, so that
        there are few sizes: a graph may be made for each.
        """
        n = len(active)
        if self.inference.coupled:
            return np.arange(n)
        first = np.argsort(~active, kind='stable')
        return first[:next(-(-n // part) for part in (4, 2, 1) if active.sum() <= -(-n // part))]

    def is_better(self, judged):
        """Returns which images take new examples, [b] bool: alike for those that share norms."""
        groups = np.arange(len(self.labels))
        if self.inference.coupled:
            groups = groups // self.inference.group_size(len(groups))
        xent, share = (np.bincount(groups, new - old)[groups]
                       for new, old in zip(judged, self.judged))
        return (share < -1e-6) | ((np.abs(share) <= 1e-6) & (xent > 0))


def apgd_eot(inference, data, config, num_draws):
    """Returns Auto-PGD through fresh draws at every step; see attacks.make_attack.

    It averages loss and gradient over eot_draws draws, the attacker's own: he knows the training
    set and the protocol, the recordings if there are any, not the defender's seed. AutoAttack's
    `rand` version gives a sample up as beaten after one lucky draw (its pull requests 104 and 105):
    here no sample is given up. On cross-entropy and on DLR, the NUM_KEPT best iterates by the draws
    of their steps are kept; which of them is the strongest is settled by eot_draws more draws, the
    same for all. Where several test samples share a batch, each sample's best example met the
    others' examples of the same step, not their best ones; shaping_batch_size = n + 1 leaves
    nothing to share. Where nothing is drawn, one gradient a step is enough.
    """
    images, labels = eval_examples(data, config)
    loss_funcs = [f for f in loss_funcs_for(data.num_classes) if not f.startswith('targeted')]
    settings = {**apgd_settings(data, config), 'loss_func': '+'.join(loss_funcs)}
    attack = make_apgd(inference, data, config, NUM_KEPT if inference.is_random else 1)
    steps, draws, eot_draws = 1, 1, {}
    if inference.is_random:
        steps, draws = attack.num_steps + 1, config['eot_draws']
        eot_draws = {'eot_draws': draws}

    def perturb(start, end):
        # None of the attacker's own draws is the defender's
        rng = np.random.default_rng([config['np_random_seed'], start, 0, 0, 1])
        examples = []
        for part in inference.parts(end - start, MAX_GRADIENT_IMAGES):
            a, b = start + part.start, start + part.end
            kept = []
            for i, loss_func in enumerate(loss_funcs):
                drawn = fresh_draws(inference, part, rng, steps, draws)
                seed = config['np_random_seed'], len(loss_funcs) * a + i
                kept += [*attack.perturb(images[a:b], labels[a:b], seed, drawn, loss_func)]
            judging, = fresh_draws(inference, part, rng, 1, draws)
            examples.append(strongest(kept, attack, labels[a:b], judging))
        return tf.constant(np.concatenate(examples))

    gradients = (len(loss_funcs) * (attack.num_steps + 1) * draws
                 * inference.number_forward_passes)
    return perturb, {**settings, 'norms': inference.mode, **eot_draws,
                     **form_of(inference.mode, config), 'gradients': gradients}


def fresh_draws(inference, part, rng, steps, draws):
    """Returns `draws` of one's own for each of so many steps, int32 [steps, draws, ...]."""
    return np.stack([[inference.drawn(part, inference.fresh(rng)) for _ in range(draws)]
                     for _ in range(steps)])


def strongest(examples, attack, y, drawn):
    """Returns for each sample the strongest of several examples, [b, 32, 32, 3].

    Args:
        examples: a list of [b, 32, 32, 3]. attack: an APGDAttack, which judges them. drawn: the
            draws that judge, the same for all.
    """
    judged = [attack.judge(x, y, drawn) for x in examples]
    loss, share = (np.array([one[i] for one in judged]) for i in (0, 1))
    first = np.lexsort((-loss, share), axis=0)[0]  # fewest right draws, then highest loss
    return np.choose(per_sample(first), [np.asarray(x) for x in examples])


def make_apgd(inference, data, config, num_kept=1):
    """Returns the APGDAttack through an inference that a configuration describes."""
    return APGDAttack(inference.logits, loss_funcs_for(data.num_classes), config['epsilon'],
                      config['apgd_num_steps'], inference.mode in ('pn', 'bn_recorded'), num_kept)


def apgd_settings(data, config):
    """Returns what Auto-PGD takes from a configuration."""
    return {'epsilon': config['epsilon'], 'num_steps': config['apgd_num_steps'],
            'loss_func': '+'.join(loss_funcs_for(data.num_classes))}

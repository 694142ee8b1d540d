"""The evaluation's attacks (paper, section VI): each makes its adversarial examples once.

What an attack here knows: the weights, the true labels, and the norms that its function names.
"""
import functools

import numpy as np

from config import UserError
import tensorflow as tf

from apgd import LOSSES, apgd, averaged, loss_gradient
from cifar10_input import eval_examples
from pgd_attack import LinfPGDAttack, random_bits
from shaping import MAX_GRADIENT_IMAGES, ShapedInference, ShapedPGDAttack, num_clean, queries_of

MINIMUM_NORM = ('cw', 'deepfool')  # they look for the smallest perturbation, whatever epsilon is
RANDOM_DRAWS = 1000
CLEVERHANS_CW = {'binary_search_steps': 5, 'num_steps': 1000, 'learning_rate': 5e-3,
                 'initial_const': 1e-2, 'confidence': 0, 'abort_early': True}
CLEVERHANS_DEEPFOOL = {'num_steps': 50, 'candidates': 10, 'overshoot': 0.02}


def make_attack(name, model, data, config, num_draws=1):
    """Returns (attack, settings): attack(start, end) -> x_adv of evaluation images [start:end].

    x_adv is float32 [end - start, 32, 32, 3]. `settings` says how the examples are made, for the
    results: epsilon, the radius of the ball that every example must lie in (None: there is no
    ball), num_steps, step_size, norms and so on. The model is left as it is. start must be a
    multiple of eval_batch_size: the batches are those that will be classified.

    Args:
        name: one of config.ATTACKS. 'clean' changes nothing.
            'fgsm': one step of fgsm_epsilon (16, as the paper has it) by the gradient's sign, with
            population norms. 'pgd': LinfPGDAttack as configured, with population norms.
            'cw', 'deepfool': minimum L2, with population norms; see minimum_norm_attack.
            'shaping': PGD with batch norms; see shaping_attack.
            'adaptive': PGD through the very clean samples that bn_shaping will use for the batch.
            'adaptive_weak': the same through other training samples; see adaptive_attack.
            'apgd': Auto-PGD with population norms, on cross-entropy and on DLR; see apgd_attack.
            'apgd_eot': the same through eot_draws fresh draws of clean samples at every step.
            'random': the strongest of 1,000 random perturbations; see random_attack.
        data: a CIFAR10Data. config: the configuration.
        num_draws: under how many draws bn_shaping will classify each batch.

    What the paper leaves open: its attacks come from CleverHans, which takes the model's own
    predictions for labels unless told otherwise. Ours take the true labels, as the original's
    attack does.
    """
    images, labels = eval_examples(data, config)
    if name == 'clean':
        return lambda start, end: tf.cast(images[start:end], tf.float32), {'epsilon': 0.}
    if name in MINIMUM_NORM:
        return minimum_norm_attack(name, model, images, labels)
    if name == 'random':
        return random_attack(model, images, labels, config)
    if name in ('apgd', 'apgd_eot'):
        return apgd_attack(name, model, data, config)
    if name in ('adaptive', 'adaptive_weak'):
        return adaptive_attack(name, model, data, config, num_draws)
    if name == 'fgsm':
        settings = dict(epsilon=config['fgsm_epsilon'], num_steps=1,
                        step_size=config['fgsm_epsilon'], random_start=False, loss_func='xent')
    else:
        settings = pgd_settings(config)
    attack = LinfPGDAttack(model, **settings, training=name == 'shaping',
                           update_population_norms=False)
    settings['norms'] = 'bn' if name == 'shaping' else 'pn'
    if name == 'shaping':
        settings['shaping_ratio'] = config['shaping_ratio']
        return shaping_attack(attack, images, labels, config), settings
    return lambda start, end: attack.perturb(
        images[start:end], labels[start:end], (config['np_random_seed'], start)), settings


def pgd_settings(config):
    """Returns what LinfPGDAttack takes from a configuration."""
    return {key: config[key] for key in ('epsilon', 'num_steps', 'step_size', 'random_start',
                                         'loss_func')}


def num_examples(name, config):
    """Returns on how many of the evaluation examples, the first ones, an attack is run."""
    n = config['num_eval_examples']
    return min(config['num_attack_examples'].get(name, n), n)


def random_attack(model, images, labels, config):
    """Returns (attack, settings): the strongest of RANDOM_DRAWS uniform perturbations in the ball.

    A check of the others: whatever uses a gradient must be stronger. 'Strongest' is the largest
    cross-entropy with population norms.
    """
    epsilon = config['epsilon']

    @tf.function
    def strongest(x_nat, y, seed):
        best, best_loss = x_nat, tf.fill([len(x_nat)], -np.inf)
        for draw in tf.range(RANDOM_DRAWS):
            noise = 2. ** -31 * tf.cast(random_bits(x_nat, seed + [0, draw]), tf.float32)
            x = tf.clip_by_value(x_nat + epsilon * noise, 0., 255.)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=False))
            better = loss > best_loss
            best = tf.where(better[:, None, None, None], x, best)
            best_loss = tf.where(better, loss, best_loss)
        return best

    def perturb(start, end):
        seed = tf.constant([config['np_random_seed'], RANDOM_DRAWS * start], tf.int32)
        return strongest(tf.cast(images[start:end], tf.float32), labels[start:end], seed)

    return perturb, {'epsilon': epsilon, 'random_draws': RANDOM_DRAWS, 'norms': 'pn'}


def shaping_attack(attack, images, labels, config):
    """Returns the paper's norm shaping attack: (start, end) -> x_adv of images[start:end].

    PGD with batch norms; in each batch, unchanged : attacked test samples are shaping_ratio : 1. A
    batch of eval_batch_size is attacked in shaping_ratio + 1 passes, another share of it each time,
    so that over the run every sample is attacked once and unchanged in the other passes. A last
    batch that is not full is filled up with the first test samples, which take their turn to keep
    the ratio and are then dropped.

    Raises:
        UserError: eval_batch_size does not fit the ratio.
    """
    m, shares = config['eval_batch_size'], config['shaping_ratio'] + 1
    try:
        num_clean(m, config['shaping_ratio'])
    except ValueError as error:
        raise UserError(f'eval_batch_size is {m}, shaping_ratio {shares - 1}: {error}') from None

    def perturb(start, end):
        chosen = np.arange(start, start + m) % len(images)
        x_nat, y = images[chosen], labels[chosen]
        x_adv = tf.cast(x_nat, tf.float32)
        for share in range(-(-(end - start) * shares // m)):  # all that hold one of ours
            tail = np.arange(m) // (m // shares) == share
            perturbed = attack.perturb(x_nat, y, (config['np_random_seed'], start + share), tail)
            x_adv = tf.where(tail[:, None, None, None], perturbed, x_adv)
        return x_adv[:end - start]

    return perturb


def adaptive_attack(name, model, data, config, num_draws):
    """Returns the paper's adaptive attacks (Table III), as make_attack does.

    'adaptive': PGD with batch norms through the clean samples that bn_shaping will draw for each
    batch, test samples placed as they will be; all that the inference leaves to chance is known.
    'adaptive_weak': through training samples that are none of those that the inference will use
    for the same batch of the n:1 form, as many of them.

    With num_draws above 1, the attack is on the sum of the losses under as many draws: 'adaptive'
    knows all those that the inference will use.
    """
    images, labels = eval_examples(data, config)
    settings = pgd_settings(config)
    shaped = ShapedInference.from_config(model, data, config)
    pgd = ShapedPGDAttack(shaped, **settings)
    k, num_images = shaped.num_clean, data.train_data.n
    if name == 'adaptive_weak' and (num_draws + 1) * k > num_images:
        raise UserError(f'{num_draws} draws of {k} clean samples could leave adaptive_weak too few '
                        f'of {num_images} training images; at most {num_images // k - 1} draws '
                        'would fit')
    settings |= {'norms': 'bn_shaping', 'num_draws_known': num_draws if name == 'adaptive' else 0,
                 **shaping_settings(config)}

    def perturb(start, end):
        x_nat, y = images[start:end], labels[start:end]
        queries = queries_of(start // config['eval_batch_size'], num_draws)
        draw = shaped.draw if name == 'adaptive' else shaped.draw_others(queries)
        draws = [shaped.split(end - start, query, MAX_GRADIENT_IMAGES, draw) for query in queries]
        parts = []
        for one_part in zip(*draws):  # the same images under each draw
            a, b = one_part[0][:2]
            clean = np.stack([part[2] for part in one_part])
            parts.append(pgd.perturb(x_nat[a:b], y[a:b],
                                     (config['np_random_seed'], start + a), clean))
        return tf.concat(parts, axis=0)

    return perturb, settings


def shaping_settings(config):
    """Returns the form of bn_shaping's batches, as it stands in a configuration."""
    return {key: config[key] for key in ('inference_shaping_ratio', 'shaping_batch_size')}


def apgd_attack(name, model, data, config):
    """Returns Auto-PGD of apgd_num_steps steps, as make_attack does.

    It runs once on cross-entropy and once on the difference of logits ratio, each on every sample,
    and keeps for each sample the stronger of the two examples. (With two classes there is no DLR.)

    'apgd' goes through the population norms: one answer, no draws. 'apgd_eot' goes through n:1
    batches of the inference's form and averages loss and gradient over eot_draws draws of clean
    training samples, fresh ones at every step and the attacker's own: he knows the training set and
    the protocol, not the defender's seed. AutoAttack's `rand` version gives a sample up as beaten
    after one lucky draw (its pull requests 104 and 105): here no sample is given up, and which of
    the two examples is stronger is settled by eot_draws more draws, the same for both. Where
    several test samples share a batch, each sample's best example met the others' examples of the
    same step, not their best ones; shaping_batch_size = n + 1 leaves nothing to share.
    """
    images, labels = eval_examples(data, config)
    epsilon, num_steps = config['epsilon'], config['apgd_num_steps']
    loss_funcs = [f for f in LOSSES if f != 'dlr' or data.num_classes > 2]
    settings = {'epsilon': epsilon, 'num_steps': num_steps, 'loss_func': '+'.join(loss_funcs),
                'norms': 'pn'}
    clean_images = data.train_data.xs
    if name == 'apgd_eot':
        shaped = ShapedInference.from_config(model, data, config)
        settings |= {'norms': 'bn_shaping', 'eot_draws': config['eot_draws'],
                     **shaping_settings(config)}
        logits = shaped.logits
    else:
        def logits(x):
            return model(x, training=False)
    gradient_of = {f: loss_gradient(logits, f) for f in loss_funcs}

    def strongest(x_nat, y, rng, draws):
        examples = [apgd(averaged(gradient_of[f], y, draws), x_nat, epsilon, num_steps, rng)[0]
                    for f in loss_funcs]
        given = list(draws())
        judged = [averaged(gradient_of['xent'], y, lambda: given)(x) for x in examples]
        loss, share = (np.array([one[i] for one in judged]) for i in (0, 1))
        first = np.lexsort((-loss, share), axis=0)[0]  # fewest right draws, then highest loss
        return np.choose(first[:, None, None, None], examples)

    def fresh_draws(rng, groups, k):
        for _ in range(config['eot_draws']):
            yield clean_images[np.stack([rng.choice(len(clean_images), k, replace=False)
                                         for _ in range(groups)])],

    def perturb(start, end):
        x_nat, y = images[start:end], labels[start:end]
        rng = np.random.default_rng([config['np_random_seed'], start, 0, 0, 1])  # no defender's key
        if name == 'apgd':
            return tf.constant(strongest(x_nat, y, rng, lambda: [()]))
        parts = []
        for a, b, (groups, k) in shaped.parts(end - start, MAX_GRADIENT_IMAGES):
            draws = functools.partial(fresh_draws, rng, groups, k)
            parts.append(strongest(x_nat[a:b], y[a:b], rng, draws))
        return tf.constant(np.concatenate(parts))

    return perturb, settings


def minimum_norm_attack(name, model, images, labels):
    """Returns foolbox's C&W L2 or DeepFool L2 attack on the population norms, as make_attack does.

    The settings are the defaults of CleverHans v2.1, which the paper used, on the [0, 1] scale:
    'cw' (its CarliniWagnerL2): 5 binary search steps, 1,000 iterations, learning rate 5e-3, initial
    constant 1e-2, confidence 0, abort early. 'deepfool' (its DeepFool): 10 candidate classes or all
    there are, overshoot 0.02, 50 iterations.

    What differs from CleverHans, v2.1, each on purpose or by the library:
    - The true labels are used, where CleverHans takes the model's prediction: a sample that is
      wrong already comes back as it is, and cannot become right.
    - A sample on which the attack finds nothing comes back as it is, too (CleverHans's C&W does so;
      its DeepFool returns its last try).
    - foolbox's DeepFool oversteps at every iteration, CleverHans's once, at the end, where it has
      crossed the boundary; against a difference of logits of zero, foolbox adds 1e-4 to the
      distance, CleverHans 1e-5 to the difference.
    - foolbox's C&W looks every 100 iterations whether the loss of the whole batch went down, and
      aborts all or none; CleverHans attacks one sample at a time by default.

    Raises:
        UserError: foolbox is not installed.
    """
    try:
        import foolbox
    except ImportError:
        raise UserError(f'the attack {name} needs foolbox: pip install foolbox') from None
    settings = CLEVERHANS_CW if name == 'cw' else CLEVERHANS_DEEPFOOL
    foolbox_names = {'num_steps': 'steps', 'learning_rate': 'stepsize'}
    library = (foolbox.attacks.L2CarliniWagnerAttack if name == 'cw'
               else foolbox.attacks.L2DeepFoolAttack)
    attack = library(**{foolbox_names.get(key, key): value for key, value in settings.items()})
    classify = tf.function(lambda x: model(x, training=False))
    graph = tf.function(lambda x: model(255 * x, training=False))
    fmodel = foolbox.TensorFlowModel(graph, bounds=(0, 1), device=device())

    def perturb(start, end):
        x_nat, y = tf.cast(images[start:end], tf.float32), tf.constant(labels[start:end])
        x_adv = 255 * attack(fmodel, x_nat / 255, y, epsilons=None)[0]
        right = tf.argmax(classify(x_nat), 1) == y
        fooled = tf.argmax(classify(x_adv), 1) != y
        found = tf.reduce_any(x_adv > 0, axis=[1, 2, 3])  # its C&W returns black where it fails
        return tf.where((right & fooled & found)[:, None, None, None], x_adv, x_nat)

    return perturb, {'epsilon': None, 'norms': 'pn', 'library': f'foolbox {foolbox.__version__}',
                     **settings}


def device():
    """Returns the name of the device that TensorFlow runs on: the first GPU, else the CPU."""
    return '/GPU:0' if tf.config.get_visible_devices('GPU') else '/CPU:0'


def perturbation_fault(x_nat, x_adv, epsilon, slack=1e-4):
    """Returns what is wrong with adversarial examples, a line, or None when they are as allowed.

    Args:
        x_nat, x_adv: [b, 32, 32, 3]. epsilon: radius of the ball, in pixels, or None: there is no
            ball, [0, 255] alone. slack: for rounding.
    """
    x_adv = np.asarray(x_adv, np.float64)
    if not np.isfinite(x_adv).all():
        return 'a pixel is NaN or infinite'
    low, high = x_adv.min(), x_adv.max()
    if low < -slack or high > 255 + slack:
        return f'pixels lie in [{low:.6g}, {high:.6g}]; [0, 255] would fit'
    if epsilon is None:
        return None
    l_inf = np.abs(x_adv - np.asarray(x_nat, np.float64)).max()
    if l_inf > epsilon + slack:
        return f'the largest perturbation is {l_inf:.6g}; at most epsilon, {epsilon:.6g}, would fit'
    return None

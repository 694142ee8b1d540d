"""What makes a robust accuracy doubtful: the flags that results carry.

They follow AutoAttack's checks (Croce and Hein 2020) and the indicators of Pintor et al. 2022,
"Indicators of attack failure". A flag is no proof of a fault, and no flag is no proof of strength.
"""
import functools
from math import comb

import numpy as np
import tensorflow as tf

from config import SCHEMA
from pgd_attack import margin
from shaping import MAX_GRADIENT_IMAGES

INDIRECT = ('shaping', 'transfer')  # their batches, or weights, are others than those that judge
BY_GRADIENTS = ('adaptive', 'adaptive_pgd', 'adaptive_weak', 'apgd', 'apgd_eot', 'pgd')
LEVEL = 0.05  # of the one-sided test by which one attack leaves less than another

# A flag: what it says of a row
FLAGS = {
    'transferred': 'made under other norms than those that judge',
    'random answer': 'another draw gives other logits',
    'shared norms': 'all images of the batch were attacked at once; one that the whole batch is '
                    'spent on is not known to survive (reproduce.py neighbours)',
    'zero gradients': 'the gradient vanishes on some images',
    'masked gradients': 'square leaves less than an attack by gradients',
    'beaten by transfer': 'an attack through other norms, or another model, leaves less',
    'more steps': 'twice the steps leave less',
    'more restarts': 'twice the runs leave less',
    'more draws': 'twice the draws leave less',
    'lost iterates': 'some images were answered wrongly at a step, but not at the last one',
}
# With one of these, an accuracy is no robust accuracy ('unreliable' in RobustBench's words)
UNRELIABLE = set(FLAGS) - {'random answer'}
# What --check looks for: the keys of which it takes twice the value, where the attack has them
DOUBLED = {'more steps': ('num_steps', 'apgd_num_steps'), 'more restarts': ('num_restarts',),
           'more draws': ('eot_draws',)}
# They return their last iterate, whatever they met on the way
LAST_ITERATE = ('pgd', 'adaptive_pgd', 'adaptive_weak')


def is_direct(name, settings, mode):
    """Whether an attack's examples went through the norms of the mode that judges them.

    Args:
        settings: of its result; 'norms' are those that it went through. `clean` goes through none.
    """
    return settings.get('norms') == mode and name not in INDIRECT


def is_transferred(name, settings, mode):
    """Whether an attack's examples went through other norms than those of the mode that judges."""
    return 'norms' in settings and not is_direct(name, settings, mode)


def settings_of(result):
    """Returns {attack: its settings} of a result, which is of one attack, or of several."""
    return result.get('attack_settings', {result['attack']: result})


def all_transferred(result):
    """Whether a result is of transferred attacks alone: `clean` is none, and takes nothing away."""
    mode = result['inference']
    transferred = [is_transferred(name, settings, mode)
                   for name, settings in settings_of(result).items() if name != 'clean']
    return bool(transferred) and all(transferred)


def shares_norms(result):
    """Whether a direct attack was made on images several of which met the same norms.

    Args:
        result: of one attack, or of several: then whether that was so for one of them.
    """
    def shared(name, of_attack):
        return is_direct(name, of_attack, mode) and (mode == 'bn' or (
            mode == 'bn_shaping'
            and of_attack['shaping_batch_size'] > of_attack['inference_shaping_ratio'] + 1))
    mode = result['inference']
    return any(shared(*each) for each in settings_of(result).items())


class Probe:
    """What an inference mode is like to attack, on some clean images; measured when asked for.

    Args:
        inference: a shaping.Inference. images: [b, 32, 32, 3], pixels in [0, 255]. labels: [b].
    """

    def __init__(self, inference, images, labels):
        self.inference, self.images, self.labels = inference, tf.cast(images, tf.float32), labels

    @functools.cached_property
    def random_answers(self):
        """The share of the images to which two draws give other logits."""
        logits = [self.inference(self.images, query).numpy() for query in (0, 1)]
        return float(np.mean(np.any(logits[0] != logits[1], axis=1)))

    @functools.cached_property
    def zero_gradients(self):
        """The share of the images where the margin's gradient is zero, under a known draw."""
        draw, vanishes = self.inference.known(0), []
        for part in self.inference.parts(len(self.images), MAX_GRADIENT_IMAGES):
            x, y = self.images[part.start:part.end], self.labels[part.start:part.end]
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = margin(self.inference.logits(x, self.inference.drawn(part, draw)), y)
            vanishes += [~np.any(tape.gradient(loss, x) != 0, axis=(1, 2, 3))]
        return float(np.mean(np.concatenate(vanishes)))


def chance(strong, weak):
    """Returns the probability that one attack leaves so many fewer images right by chance alone.

    The exact one-sided McNemar test: of the images that one of them alone leaves right, as many
    should be either's.

    Args:
        strong, weak: bool [n] or [draws, n], which of the same images are right. Of several draws,
            the first counts.
    """
    strong, weak = (np.atleast_2d(right)[0] for right in (strong, weak))
    lost, gained = int(np.sum(weak & ~strong)), int(np.sum(strong & ~weak))
    n = lost + gained
    return sum(comb(n, k) for k in range(lost, n + 1)) / 2 ** n  # of integers of any size


def fewer(strong, weak, level=LEVEL):
    """Whether one attack leaves fewer images right than another, by more than chance explains."""
    return chance(strong, weak) <= level


def flags_of(result, probe, right, transferred=()):
    """Returns {flag: whether it is seen} of those in FLAGS that cost next to nothing to look for.

    Args:
        result: as eval.evaluate_attack returns it. probe: the Probe of its inference mode.
        right: {attack: bool [draws, n]} under this mode, of all attacks that were run: which images
            are answered rightly, or have no example within epsilon.
        transferred: those of them that are transferred.
    """
    name, mode = result['attack'], result['inference']
    direct = is_direct(name, result, mode)
    seen = {'transferred': is_transferred(name, result, mode),
            'random answer': probe.random_answers > 0}
    if direct:
        seen['shared norms'] = shares_norms(result)
    if direct and name in BY_GRADIENTS:
        seen['zero gradients'] = probe.zero_gradients > 0
        if 'square' in right:
            seen['masked gradients'] = fewer(*first_of_all(right['square'], right[name]))
        if transferred:
            seen['beaten by transfer'] = any(
                fewer(*first_of_all(right[other], right[name])) for other in transferred)
    return seen


def first_of_all(*right):
    """Returns those of several bool [n] or [draws, n] that are of samples that all of them have."""
    n = min(each.shape[-1] for each in right)
    return [each[..., :n] for each in right]


def within(settings, epsilon):
    """Returns whether all examples of an attack lie within epsilon, not only those that count."""
    radius = settings.get('epsilon')
    return radius is not None and radius <= epsilon


def flagged(seen):
    """Returns what a result says of {flag: whether it is seen}, a dict."""
    flags = [flag for flag, is_seen in seen.items() if is_seen]
    return {'flags': flags, 'looked_for': list(seen),
            'unreliable': bool(UNRELIABLE & set(flags))}


def of_worst(worst, results):
    """Returns what a worst case says of flags: what its strongest direct attack says.

    Its strongest one, where none is direct: that no transfer succeeds is no robustness. Where
    `square` is the strongest, gradients were masked, and it may not be strong enough, either. In a
    ball, attacks that stay within it come first: of the others, only some examples count.

    Args:
        worst: a result over several attacks. results: flagged ones, those attacks' among them.
    """
    attacks = [result for result in results if result['inference'] == worst['inference']
               and result['attack'] in worst['attacks'] and result['attack'] != 'clean']
    if 'epsilon' in worst:
        attacks = [result for result in attacks if within(result, worst['epsilon'])] or attacks
    direct = [result for result in attacks
              if is_direct(result['attack'], result, worst['inference'])]
    strongest = min(direct or attacks,
                    key=lambda result: result['right'][0][:worst['num_examples']].count('1'))
    seen = {flag: flag in strongest['flags'] for flag in strongest['looked_for']}
    masked = any('masked gradients' in result['flags'] for result in direct)
    return flagged(seen | ({'masked gradients': True} if masked else {}))


def renewed(former, row):
    """Returns the new row, with the verdicts of the former one that were not looked for again.

    So attacks can be run one by one, and --check once. What other code found may be true no more.

    Args:
        former: from a file, of whatever contents.
    """
    flags, looked_for, where = (former.get(key) for key in ('flags', 'looked_for', 'provenance'))
    if ('flags' not in row or not isinstance(flags, list) or not isinstance(looked_for, list)
            or not isinstance(where, dict) or where.get('code') != row['provenance']['code']):
        return row
    seen = {flag: flag in flags for flag in FLAGS if flag in looked_for}
    return row | flagged(seen | {flag: flag in row['flags'] for flag in row['looked_for']})


def doubled(name, config, draws=True):
    """Yields (flag, changed keys) of each way in which an attack can be given twice as much.

    PGD's steps are its own; those of the configuration are a training's, too.

    Args:
        draws: whether the inference that it goes through draws; else there are no more draws.
    """
    for flag, keys in DOUBLED.items():
        if flag == 'more draws' and not draws:
            continue
        changed = {key: 2 * config[key] for key in keys
                   if name in (*SCHEMA[key].attacks, *(LAST_ITERATE if key == 'num_steps' else ()))}
        if changed:
            yield flag, changed

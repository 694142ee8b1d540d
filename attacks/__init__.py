"""The evaluation's attacks (paper, section VI): each makes its adversarial examples once.

A new attack is one file here and one line in ATTACKS. What an attack knows: the weights, the true
labels, and the norms that its maker names.

What the paper leaves open: its attacks come from CleverHans, which takes the model's own
predictions for labels unless told otherwise. Ours take the true labels, as the original's attack
does.
"""
import importlib

from running import UserError

# name: file.maker; a maker is f(model, data, config) -> (attack, settings), see make_attack; of
# those in DIRECT, f(inference, data, config, num_draws). The files are imported when they are used:
# the names are known before TensorFlow is.
ATTACKS = {
    'clean': 'gradient.clean',                   # changes nothing
    'fgsm': 'gradient.fgsm',                     # one step of fgsm_epsilon (16, the paper's), PN
    'pgd': 'gradient.pgd',                       # LinfPGDAttack as configured, PN
    'cw': 'minimum_norm.cw',                     # minimum L2, PN
    'deepfool': 'minimum_norm.deepfool',         # minimum L2, PN
    'shaping': 'shaping.shaping',                # PGD with BN on one share of a batch at a time
    'adaptive': 'apgd.adaptive',                 # Auto-PGD through the draw that will answer
    'adaptive_pgd': 'adaptive.adaptive_pgd',     # PGD, the same: the paper's adaptive attack
    'adaptive_weak': 'adaptive.adaptive_weak',   # PGD through another draw
    'retry': 'retry.retry',                      # adaptive on each of several draws alone, in turn
    'apgd': 'apgd.apgd',                         # Auto-PGD, PN
    'apgd_eot': 'apgd.apgd_eot',                 # Auto-PGD through fresh draws at every step
    'square': 'square.square',                   # random search by scores, fresh draws
    'transfer': 'transfer.transfer',             # adaptive's examples, made on another model
    'hopskipjump': 'hopskipjump.hopskipjump',    # minimum L2 by labels alone, the draw that answers
    'random': 'random_search.random_search',     # the strongest of 1,000 perturbations: a check
}
# They go through the inference that judges them, and are made anew for each: 'direct'. (transfer
# goes through the same inference of another model.)
DIRECT = ('adaptive', 'adaptive_pgd', 'adaptive_weak', 'retry', 'apgd_eot', 'square', 'transfer',
          'hopskipjump')
# They look for the smallest perturbation, whatever epsilon is
MINIMUM_NORM = ('cw', 'deepfool', 'hopskipjump')


def make_attack(name, model, data, config, num_draws=1, inference=None):
    """Returns (attack, settings): attack(start, end) -> x_adv of evaluation images [start:end].

    x_adv is float32 [end - start, 32, 32, 3]. `settings` says how the examples are made, for the
    results: epsilon, the radius of the ball that every example must lie in (None: there is no
    ball), num_steps, step_size, norms and so on; and what an example costs at most: 'gradients', in
    images that pass forward and back, and 'queries'. The model is left as it is. start must be a
    multiple of eval_batch_size: the batches are those that will be classified.

    Args:
        name: a key of ATTACKS.
        data: a CIFAR10Data. config: the configuration.
        num_draws: under how many draws each batch will be classified; an attack that knows the draw
            knows them all, but for hopskipjump, which knows the first.
        inference: what a direct attack goes through, a shaping.Inference. Default: bn_shaping.

    Raises:
        ValueError: an unknown attack.
    """
    if name not in ATTACKS:
        raise ValueError(f'attack must be one of {", ".join(ATTACKS)}, got {name!r}')
    file, maker = ATTACKS[name].split('.')
    module = importlib.import_module(f'attacks.{file}')
    if name not in DIRECT:
        return getattr(module, maker)(model, data, config)
    if inference is None:
        from shaping import make_inference  # not above: it imports TensorFlow
        inference = make_inference(model, 'bn_shaping', data, config)
    return getattr(module, maker)(inference, data, config, num_draws)


def other_weights(name, config):
    """Returns the digests of other models' weights that an attack goes through, a list."""
    if name != 'transfer':
        return []
    from attacks.transfer import source_of  # not above: it imports TensorFlow
    from running.unfinished import checkpoint_digest
    return [checkpoint_digest(source_of(config))]


def num_examples(name, config):
    """Returns on how many of the evaluation examples, from the first, an attack is run."""
    n = config['num_eval_examples']
    return min(config['num_attack_examples'].get(name, n), n)


def check_names(config):
    """Raises UserError unless num_attack_examples names attacks only."""
    for name in config['num_attack_examples']:
        if name not in ATTACKS:
            raise UserError(f'num_attack_examples holds {name[:200]!r}; expected attacks: '
                            f'{", ".join(ATTACKS)}')

"""Which inference may serve several people at once: victims whose batch an attacker shares."""
import numpy as np

from attacks.apgd import loss_funcs_for
from attacks.neighbours import ANY_IMAGE, QUERIES, NeighboursAttack
from cifar10_input import eval_examples
from config import relevant
from eval import wilson_interval
from paper import formats
from paper.cells import as_digits, from_digits
from paper.published import DEFAULT, SHAPED
from paper.trainings import name_of
from running import UserError
from running.unfinished import batches
from shaping import make_inference

NUM_VICTIMS = 100
NUM_HELPERS = (1, 5, 9)  # of the QUERIES - 1 beside a victim
AT_ONCE = 10             # victims
HEADER = ['training', 'inference', 'helpers', 'their pixels', 'before', 'after', 'victims turned']
NOTE = ("A victim is turned where it was answered rightly before. Own: the victim's own pixels are "
        "the attacker's, too, within `epsilon`, and all of the batch is spent on this one image. "
        'Rows of `bn_recorded`, and of batches with one query: the helpers of all rows above that '
        "are not `own` changed not one bit of a victim's logits.")


# ---- what is measured


def shared_forms(config):
    """Returns {name: settings} of the inferences whose batches hold QUERIES queries.

    `bn`, whose batch is these queries and nothing else, is bn_shaping at 0:1.
    """
    n = config['inference_shaping_ratio']
    return bn_form(QUERIES) | {f'`bn_shaping`, {n}:1, batches of {QUERIES * (n + 1)}': {
        'shaping_batch_size': QUERIES * (n + 1)}}


def bn_form(size):
    """Returns {name: settings} of `bn` in batches of so many queries."""
    return {f'`bn`, {size} queries': {'inference_shaping_ratio': 0, 'shaping_batch_size': size}}


def separate_forms(config):
    """Returns {name: (mode, settings)} of the inferences under which a query is on its own."""
    n = config['inference_shaping_ratio']
    return {f'`bn_shaping`, {n}:1, batches of {n + 1}': ('bn_shaping',
                                                         {'shaping_batch_size': n + 1}),
            '`bn_recorded`': ('bn_recorded', {})}


def neighbours(model, data, config, kept=None):
    """Returns which victims are answered rightly before and after others move their norms.

    The victims are the first test images. Each is attacked in a batch of its own, beside the
    test images that follow it: helpers, as many as are named, then bystanders. Under `bn`, too, a
    batch has QUERIES images, so that a helper is as large a part of it whatever eval_batch_size is.

    Cost: 100 image gradients a step for each victim, number of helpers and bound on their pixels.

    Args:
        kept: as in experiments.logit_errors.

    Returns:
        {(inference, helpers, epsilon): bool [victims]}; 0 helpers, epsilon 0: before.

    Raises:
        RuntimeError: an answer depends on other queries where it must not: a defect.
    """
    images, labels = eval_examples(data, config)
    bounds = (config['epsilon'], ANY_IMAGE)
    shared = {name: make_inference(model, 'bn_shaping', data, {**config, **settings})
              for name, settings in shared_forms(config).items()}
    separate = {name: make_inference(model, mode, data, {**config, **settings})
                for name, (mode, settings) in separate_forms(config).items()}
    attacks = {(name, epsilon): NeighboursAttack(shared[name], epsilon, config['apgd_num_steps'])
               for name in shared for epsilon in bounds}
    n = min(NUM_VICTIMS, len(images))
    right = {key: np.zeros(n, bool) for key in [
        *((name, 0, 0.) for name in (*shared, *separate)),
        *((name, helpers, epsilon) for name in shared for helpers in NUM_HELPERS
          for epsilon in bounds)]}
    for start, end in batches(kept, [*right.values()], n, AT_ONCE, 'neighbours'):
        query = start // AT_ONCE
        chosen = (np.arange(start, end)[:, None] + np.arange(QUERIES)).ravel() % len(images)
        x_nat, y = images[chosen].astype(np.float32), labels[start:end]
        before = {name: of_victims(inference, x_nat, query)
                  for name, inference in (shared | separate).items()}
        for name, logits in before.items():
            right[name, 0, 0.][start:end] = np.argmax(logits, 1) == y
        for (name, helpers, epsilon), x in attacked(
                attacks, x_nat, np.repeat(y, QUERIES), config['np_random_seed'], query):
            logits = of_victims(shared[name], x, query)
            right[name, helpers, epsilon][start:end] = np.argmax(logits, 1) == y
            for other, inference in separate.items():
                if of_victims(inference, x, query).tobytes() != before[other].tobytes():
                    raise RuntimeError(f'{other}: an answer depends on the other queries')
    return right


def owners(model, data, config, kept=None):
    """Returns which victims are answered rightly where the attacker owns their pixels, too.

    First the victim's alone, then those of all other queries in its batch, too: the owner of a
    whole batch who spends it on one image. First all stay within epsilon, then the others may be
    any images: nobody asks what else is in a batch. Unlike `neighbours`, it runs on each loss that
    `adaptive` has, and under `bn` also in a batch as large as those of eval.py.

    Cost: three times as many runs as there are losses, each of apgd_num_steps + 1 gradients of a
    batch, until the victim is turned.

    Args, returns: as `neighbours`; 0 helpers, epsilon above 0: the victim's own pixels alone.
    """
    images, labels = eval_examples(data, config)
    seed, epsilon, size = (config[key] for key in ('np_random_seed', 'epsilon', 'eval_batch_size'))
    as_in_eval, attacks = bn_form(size), {}
    for name, settings in (shared_forms(config) | as_in_eval).items():
        inference = make_inference(model, 'bn_shaping', data, {**config, **settings})
        given = (config['apgd_num_steps'], size if name in as_in_eval else QUERIES,
                 loss_funcs_for(data.num_classes), epsilon)
        attacks[name] = {bound: NeighboursAttack(inference, bound, *given)
                         for bound in (epsilon, ANY_IMAGE)}
    n = min(NUM_VICTIMS, len(images))
    right = {(name, helpers, bound): np.zeros(n, bool) for name, of_form in attacks.items()
             for helpers, bound in attackers(of_form[epsilon].queries, epsilon)}
    for victim, end in batches(kept, [*right.values()], n, 1, 'owners'):
        for name, of_form in attacks.items():
            inference, queries = of_form[epsilon].inference, of_form[epsilon].queries
            x_nat = images[(victim + np.arange(queries)) % len(images)].astype(np.float32)
            y, made = np.repeat(labels[victim], queries), []
            for helpers, bound in attackers(queries, epsilon):
                made.append(of_form[bound].move_norms(x_nat, y, seed, victim, helpers, made[1:])
                            if bound else x_nat)
                logits = of_victims(inference, made[-1], victim, queries)
                right[name, helpers, bound][victim:end] = np.argmax(logits, 1) == labels[victim:end]
    return right


def attackers(queries, epsilon):
    """Returns (helpers, epsilon of their pixels) of each attacker in `owners`, the weakest first.

    The first owns nothing, the second the victim's own pixels alone.
    """
    return (0, 0.), (0, epsilon), (queries - 1, epsilon), (queries - 1, ANY_IMAGE)


def of_victims(inference, x, query, queries=QUERIES):
    """Returns the logits of the first of every `queries` images, [b / queries, classes]."""
    return inference(x, query).numpy()[::queries]


def attacked(attacks, x_nat, y, seed, query):
    """Yields ((inference, helpers, epsilon), x): what each attacker makes of some batches.

    One with more helpers, or with pixels of any value, keeps what a weaker one found if it is
    stronger.

    Args:
        attacks: {(inference, epsilon): NeighboursAttack}, the weaker ones first.
        x_nat, y, seed, query: as NeighboursAttack.move_norms takes them.
    """
    made = {}
    for helpers in NUM_HELPERS:
        for (name, epsilon), attack in attacks.items():
            weaker = [x for (other, _, bound), x in made.items()
                      if other == name and bound <= epsilon]
            x = attack.move_norms(x_nat, y, seed, query, helpers, weaker)
            made[name, helpers, epsilon] = x
            yield (name, helpers, epsilon), x


# ---- what is shown


def kept_rows(right):
    """Returns what `neighbours` measured, to be kept as JSON."""
    return {'rows': [[*key, as_digits(values)] for key, values in right.items()]}


def neighbour_rows(config, evaluations):
    """Returns the victims' accuracy before and after, and how many of the right ones are turned."""
    identity = {**relevant(config), 'apgd_num_steps': config['apgd_num_steps'],
                'num_victims': NUM_VICTIMS, 'queries': QUERIES}
    rows = []
    for training in (DEFAULT, SHAPED):
        name = name_of(training, config)
        of_training = evaluations[name]
        for measure, more, own in (
                (neighbours, {'num_helpers': NUM_HELPERS}, ''),
                (owners, {'eval_batch_size': config['eval_batch_size'],
                          'owned_by': attackers(QUERIES, config['epsilon'])}, ', own')):
            kept = of_training.if_kept(of_training.experiment, measure, identity | more, kept_rows)
            if kept:
                rows += [[f'`{name}`', *row] for row in _rows_of(kept['rows'], own, config)]
    if not rows:
        raise UserError('nothing is stored of victims whose batch an attacker shares')
    return rows


def _rows_of(kept, own, config):
    """Yields the rows of one measurement; `own` stands behind the number of helpers."""
    before = {inference: from_digits(right) for inference, _, epsilon, right in kept if not epsilon}
    for inference, helpers, epsilon, right in kept:
        if epsilon:
            pixels = 'any' if epsilon == ANY_IMAGE else f'within {epsilon:g}'
            yield [inference, f'{helpers}{own}', pixels,
                   *turned(before[inference], from_digits(right))]
    for inference in separate_forms(config):
        if inference in before:  # where the pixels are the victim's own, others were not measured
            yield [inference, f'1 to {max(NUM_HELPERS)}', 'any',
                   *turned(before[inference], before[inference])]


def turned(before, after):
    """Returns three cells: accuracy before, after, and the share of the right ones turned."""
    was_right, lost = int(before.sum()), int((before & ~after).sum())
    if not was_right:
        return ['0.0', formats.percent(after.mean()), '0 of 0']
    return [formats.percent(before.mean()), formats.percent(after.mean()),
            f'{lost} of {was_right}: '
            + formats.share(lost / was_right, wilson_interval(lost, was_right))]

"""The tables, the paper's and ours, each one record of TABLES. Tables I to IV are made here."""
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from attacks import DIRECT
from attacks.neighbours import QUERIES
from attacks.shaping import check_batch
from doubts import first_of_all
from eval import WORST, WORST_IN_BALL
from model import network_name
from paper import (binarization, checks, claims, curves, experiments, formats, gallery, headline,
                   neighbours, plots, scales, variations)
from paper.cells import (JUDGES, attacks_on, available, from_digits, result_of, right_in_draws,
                         right_of, worst_cases_of)
from paper.intervals import paired_difference
from paper.population_norms import RULES
from paper.published import (ADV_ONLY, CLAIMS, DEFAULT, IN_TRAINING, INFERENCE_RATIOS, INFERENCES,
                             MODES, NORM_SHAPING, PAPER_ADAPTIVE, PAPER_RATIOS, PAPER_TABLES,
                             SHAPED, Training)
from paper.trainings import changes_nothing, config_of, name_of
from running import UserError
from shaping import num_clean

# What to believe comes first
FIRST_ROWS = 'clean', *WORST, 'adaptive', 'apgd_eot', 'square', 'adaptive_pgd', 'apgd'
SEEDS = (0, 1)
SEED_ATTACKS = GAP_ATTACKS = ('clean', 'pgd', 'adaptive_pgd')
TRANSFER_INFERENCES = ('pn', 'bn_shaping', 'bn_recorded')
NORMS_EXAMPLES = 1000  # enough to tell one rule from another


class Table(NamedTuple):
    """A table: what it needs, what it shows, and how."""
    title: str
    trainings: tuple       # published.Training, all that its numbers need
    header: list
    rows: Callable         # (config, evaluations) -> lists of what stands below the header
    caption: str           # what the numbers are of; {n}: on how many images, {all}: of how many,
                           # {evaluated}: in which precision, where not float32,
                           # {step}, {steps}: PGD's step_size and num_steps; {xent}, {beta}: what
                           # TRADES trains on
    max_examples: int | None = None  # the most images that it takes; None: num_eval_examples
    note: str = ''         # below the table
    plots: Mapping = {}    # {file name: (config, evaluations) -> a matplotlib figure}
    checks: tuple = ()     # (config, data) -> None; UserError for what would fail after hours
    apart: bool = False    # made where it is asked for by name, not by `all`
    shows: Callable = lambda of_training: of_training.has()  # whether a training, an Evaluations,
                                                             # is in it; others are named


# ---- Tables I to IV


def main_rows(adversary, config, evaluations):
    """Returns Table I (pgd) or II (trades): the worst cases, the strongest attacks, then the rest.

    The worst cases are over the paper's attacks and ours.
    """
    rows = []
    # All are asked for before one is looked into: Ray computes side by side
    by_mode = {training.mode: attacks_on(training, config, evaluations) for training in available(
        [Training(adversary, mode) for mode in MODES], config, evaluations)}
    worst = {mode: worst_cases_of(by_attack, config) for mode, by_attack in by_mode.items()}
    all_worst = [r for of_mode in worst.values() for r in of_mode]
    for mode, by_attack in by_mode.items():
        results = [r for evaluation in by_attack.values() for r in evaluation['results']]
        results += worst[mode]
        made = {r['attack'] for r in results}
        for attack in dict.fromkeys([*(a for a in FIRST_ROWS if a in made),
                                     *(r['attack'] for r in results)]):
            found = {r['inference']: r for r in results if r['attack'] == attack}
            row = [MODES[mode], row_label(next(iter(found.values())), config['num_eval_examples'])]
            paper = PAPER_TABLES[adversary][mode].get(attack)
            for i, inference in enumerate(JUDGES):
                row.append(formats.accuracy(found[inference]) + without(found[inference], all_worst)
                           if inference in found else '')
                if inference in INFERENCES:
                    row.append(formats.percent(paper[i]) if paper else '')
            rows.append(row)
    return rows


def without(result, worst):
    """Returns ' (without A, B)': attacks in other such worst cases that this one lacks; else ''.

    Fewer attacks leave more: unsaid, that would look like an advantage.

    Args:
        worst: the worst cases beside which it stands, as worst_cases_of has them.
    """
    lacking = dict.fromkeys(
        attack for other in worst for attack in other['attacks']
        if all(other[key] == result[key] for key in ('attack', 'inference'))
        and attack not in result['attacks'])
    return f' (without {", ".join(lacking)})' if lacking else ''


def row_label(result, n):
    """Returns an attack's name, with what sets its row apart: fewer than n examples, L2 sizes."""
    notes = [f'n = {result["num_examples"]}'] if result['num_examples'] < n else []
    if result.get('median_l2') is not None:
        notes.append(f'median L2 {result["median_l2"]:.3f} of {result["num_fooled"]}')
    return result['attack'] + (f' ({", ".join(notes)})' if notes else '')


def table3_rows(config, evaluations):
    """Returns Table III: the adaptive attacks, judged by bn_shaping."""
    names = {adversary: name_of(Training(adversary, NORM_SHAPING), config)
             for adversary in PAPER_TABLES}
    found = {(attack, adversary): evaluations[name].attack(attack, ('bn_shaping',))
             for attack in PAPER_ADAPTIVE for adversary, name in names.items()}
    rows = []
    for attack, paper in PAPER_ADAPTIVE.items():
        row = [attack]
        for adversary in PAPER_TABLES:
            result = result_of(found[attack, adversary], 'bn_shaping')
            row += [formats.accuracy(result, config['num_eval_examples']),
                    formats.percent(paper[adversary])]
        rows.append(row)
    return rows


def ratio_results(config, evaluations):
    """Returns {n of n:1 in training: results in the order of INFERENCE_RATIOS}, for Table IV."""
    found = {}
    for ratio in PAPER_RATIOS:
        name = name_of(Training('pgd', NORM_SHAPING, ratio), config)
        found[ratio] = evaluations[name].attack('pgd', ('bn_shaping',), INFERENCE_RATIOS)
    return {ratio: evaluation['results'] for ratio, evaluation in found.items()}


def table4_rows(config, evaluations):
    """Returns Table IV, the paper's numbers in parentheses."""
    rows = []
    for ratio, results in ratio_results(config, evaluations).items():
        size = config_of(Training('pgd', NORM_SHAPING, ratio), config)['training_batch_size']
        label = f'{ratio}:1' + (f' (batch {size})' if size != config['training_batch_size'] else '')
        rows.append([label] + [
            f'{formats.accuracy(result, config["num_eval_examples"])} ({formats.percent(paper)})'
            for result, paper in zip(results, PAPER_RATIOS[ratio])])
    return rows


# ---- tables of ours


def summary_rows(config, evaluations):
    """Returns clean and robust accuracy of each training, and how far both are from two others'.

    Robust: the worst case in the ball over all attacks of Tables I and II that were run on all
    images; of stored ones, some may be lacking, which are named. The others, by the same adversary
    and judged by pn: adversarial-only training, the default; and shaping in training alone, the
    simple mix (see claims.NOTE).
    """
    all_attacks = {training: attacks_on(training, config, evaluations) for training in available(
        [Training(adversary, mode) for adversary in PAPER_TABLES for mode in MODES], config,
        evaluations)}
    found, judged_by_pn, rows = [], {}, []
    for training, by_attack in all_attacks.items():
        for worst in worst_cases_of(by_attack, config):
            inference, clean = worst['inference'], by_attack['clean']
            if worst['attack'] == WORST_IN_BALL:
                right = right_in_draws(clean, inference), from_digits(worst['right'][0])[None]
                found.append((training, result_of(clean, inference), worst, right))
                if inference == 'pn':
                    judged_by_pn[training.adversary, training.mode] = right
    all_worst = [worst for *_, worst, _ in found]
    for training, clean, worst, right in found:
        rows.append([f'`{name_of(training, config)}`', f'`{worst["inference"]}`',
                     formats.accuracy(clean),
                     formats.accuracy(worst) + without(worst, all_worst),
                     *(cell for mode in (ADV_ONLY, IN_TRAINING) for cell in formats.against(
                         right, judged_by_pn.get((training.adversary, mode))))])
    return rows


def seed_rows(config, evaluations):
    """Returns the two rows that the paper prints in colour, each with several seeds.

    The seeds are those of the training, of its data's order, and of the evaluation.
    """
    found = {}
    for training in (DEFAULT, SHAPED):
        for seed in SEEDS:
            of_training = evaluations[name_of(training._replace(seed=seed), config)]
            for attack in SEED_ATTACKS:
                found[training, seed, attack] = of_training.attack(attack, judging(attack))
    rows = []
    for attack in SEED_ATTACKS:
        row = [attack]
        for training in (DEFAULT, SHAPED):
            for inference in ('pn', 'bn_shaping'):
                for seed in SEEDS:
                    result = result_of(found[training, seed, attack], inference)
                    row.append(formats.accuracy(result, config['num_eval_examples']))
        rows.append(row)
    return rows


def norms_rows(config, evaluations):
    """Returns clean and PGD accuracy by each way to estimate the population norms.

    PGD goes through these population norms; its examples are then judged by them and, transferred,
    by bn_shaping, which does not use them.
    """
    rows, n = [], min(NORMS_EXAMPLES, config['num_eval_examples'])
    for training in (DEFAULT, SHAPED):
        name = name_of(training, config)
        for rule, meaning in RULES.items():
            clean, pgd = (evaluations[name].attack(attack, norms=rule, num_eval_examples=n)
                          for attack in ('clean', 'pgd'))
            rows.append([f'`{name}`', meaning, formats.accuracy(result_of(clean, 'pn'), n),
                         *formats.pn_and_shaping(pgd, n)])
    return rows


def gap_rows(config, evaluations):
    """Returns the norm-shaped model under pn and under bn_shaping.

    A direct attack that is not stored is left out: through bn_shaping, a wide network takes hours.
    """
    rows, (pn, shaped) = [], map(INFERENCES.index, ('pn', 'bn_shaping'))
    of_training = evaluations[name_of(SHAPED, config)]
    for attack in GAP_ATTACKS:
        get = (partial(of_training.if_kept, of_training.attack) if attack in DIRECT
               else of_training.attack)
        evaluation = get(attack, judging(attack))
        if evaluation is None:
            continue
        paper = PAPER_TABLES['pgd'][NORM_SHAPING].get(attack)
        rows.append([attack, *formats.pn_and_shaping(evaluation, config['num_eval_examples']),
                     f'{100 * (paper[shaped] - paper[pn]):+.1f}' if paper else ''])
    return rows


def transfer_rows(config, evaluations):
    """Returns `adaptive` beside `transfer`: the same attack, made on the model of another seed."""
    rows, n = [], config['num_eval_examples']
    for training in (DEFAULT, SHAPED):
        ours, others = (evaluations[name_of(training._replace(seed=seed), config)]
                        for seed in SEEDS)
        for inference in TRANSFER_INFERENCES:
            direct = ours.if_kept(ours.attack, 'adaptive', (inference,))
            transfer = ours.if_kept(ours.attack, 'transfer', (inference,), source=others)
            if direct is None or transfer is None:  # not stored
                continue
            both = [right_of(of, inference) for of in (transfer, direct)]
            rows.append([f'`{ours.name}`', f'`{inference}`',
                         *(formats.accuracy(result_of(of, inference), n)
                           for of in (direct, transfer)),
                         # num_attack_examples may name one of them
                         formats.difference(*paired_difference(*first_of_all(*both)))])
    if not rows:
        raise UserError('nothing is stored of `transfer` from the model of another seed')
    return rows


def judging(attack):
    """Returns the modes that judge where only pn and bn_shaping are shown.

    A direct attack's others are not made; what is made once is judged as Tables I and II ask for.
    """
    return ('pn', 'bn_shaping') if attack in DIRECT else JUDGES


# ---- what would fail after hours


def check_ratios(config, data):
    """Raises UserError unless bn_shaping's batches can be made at all ratios of Table IV."""
    for ratio in INFERENCE_RATIOS:
        try:
            num_clean(config['shaping_batch_size'], ratio)
        except UserError as error:
            raise UserError(f'shaping_batch_size is {config["shaping_batch_size"]}, and Table IV '
                            f'asks for {ratio}:1, too: {error}') from None
        check_clean_samples(config, data, ratio)


def check_clean_samples(config, data, ratio):
    """Raises UserError unless there are clean samples for bn_shaping, and as many others.

    The others are for adaptive_weak, the attack through samples that the inference does not use.
    """
    size, most = config['shaping_batch_size'], data.train_data.n // 2
    k = num_clean(size, ratio)
    if k > most:
        raise UserError(f'shaping_batch_size is {size}, {k} of them clean samples at {ratio}:1; '
                        f'expected at most {most}, half the training images')


def check_neighbours(config, data):
    """Raises UserError unless there are clean samples for a batch of QUERIES queries."""
    ratio = config['inference_shaping_ratio']
    check_clean_samples({**config, 'shaping_batch_size': QUERIES * (ratio + 1)}, data, ratio)


def check_shaping_attack(config, data):
    """Raises UserError unless eval_batch_size suits the norm shaping attack."""
    check_batch(config)


# ---- the list


def has_clean(of_training):
    """Returns whether a training is in Tables I and II: see cells.available."""
    return of_training.has('clean')


FIRST = 'the first {n} test images{evaluated}'
ACCURACY = f'{FIRST}; accuracy in %, [95% Wilson intervals]; t: transferred'
SHARED = '; s: of direct attacks on all images of a batch at once, which share norms (`neighbours`)'
DIFFERENCES = '; differences in points, [95% intervals of pairs of the same samples]'
FIRST_TRAINING = 'the first {n} training images, in whole batches{evaluated}'
MAIN_HEADER = ['training', 'attack', *(column for inference in INFERENCES
                                       for column in (f'`{inference}`', 'paper')), '`bn_recorded`']

TABLES = {
    'headline': Table(
        'Under the norms that can be deployed',
        headline.SHOWN,
        headline.HEADER, headline.headline_rows, headline.CAPTION, shows=headline.is_shown),
    'summary': Table(
        'Clean and robust accuracy',
        tuple(Training(adversary, mode) for adversary in PAPER_TABLES for mode in MODES),
        ['training', 'inference', 'clean', 'robust', 'against the default: clean', 'robust',
         'against the simple mix: clean', 'robust'],
        summary_rows, FIRST + '; accuracy in %, [95% Wilson intervals]; robust: the worst case in '
        'the ball over all attacks on all of these images; the default: adversarial-only training '
        'by the same adversary, judged by `pn`; the simple mix: shaping in training alone, likewise'
        + SHARED + DIFFERENCES,
        checks=(check_shaping_attack,), shows=has_clean),
    'table1': Table(
        'Table I: PGD-based adversarial training',
        tuple(Training('pgd', mode) for mode in MODES),
        MAIN_HEADER, partial(main_rows, 'pgd'), ACCURACY + SHARED,
        plots={'table1_tradeoff': partial(plots.tradeoff, 'pgd'), 'table1_cost': plots.cost},
        checks=(check_shaping_attack,), shows=has_clean),
    'table2': Table(
        'Table II: TRADES-based adversarial training',
        tuple(Training('trades', mode) for mode in MODES),
        MAIN_HEADER, partial(main_rows, 'trades'),
        ACCURACY + SHARED + '; trained on the cross-entropy of {xent} images, beta {beta}',
        plots={'table2_tradeoff': partial(plots.tradeoff, 'trades')},
        checks=(check_shaping_attack,), shows=has_clean),
    'table3': Table(
        'Table III: adaptive attacks, under bn_shaping',
        tuple(Training(adversary, NORM_SHAPING) for adversary in PAPER_TABLES),
        ['attack', *(column for adversary in PAPER_TABLES
                     for column in (f'{adversary} + shaping', 'paper'))],
        table3_rows, ACCURACY + SHARED),
    'table4': Table(
        'Table IV: shaping ratios in training and inference, under PGD',
        tuple(Training('pgd', NORM_SHAPING, ratio) for ratio in PAPER_RATIOS),
        ['n:1 in training', *(f'{n}:1 in inference' if n else '0:1 (no clean samples)'
                              for n in INFERENCE_RATIOS)],
        table4_rows, ACCURACY + ', (the paper); n:1 is clean : attacked or test samples, which the '
        'paper writes 1:n',
        plots={'table4_ratios': lambda config, evaluations: plots.ratios(
            ratio_results(config, evaluations))},
        checks=(check_ratios,)),
    'confoundings': Table(
        'The in-text experiments of sections IV and V',
        (DEFAULT, SHAPED),
        experiments.HEADER, experiments.excess_rows,
        FIRST_TRAINING + '; 95% bootstrap intervals over batches, whose images share norms',
        checks=(experiments.check_perturbations,)),
    'shifts': Table(
        'How far an attack moves the batch norms',
        (DEFAULT, SHAPED),
        experiments.SHIFTS_HEADER, experiments.shift_rows,
        FIRST_TRAINING + '; means in standard deviations of the clean batch, deviations relative '
        'to its own, averaged over all channels; 95% bootstrap intervals',
        checks=(experiments.check_perturbations, experiments.check_shifts)),
    'sweeps': Table(
        'Accuracy against PGD steps and against epsilon',
        checks.SWEPT,
        checks.SWEEPS_HEADER, checks.sweep_rows,
        FIRST + '; accuracy in %, [95% Wilson intervals]; num_steps with steps of {step}, epsilon '
        'with {steps} steps of a quarter of it' + SHARED, checks.MAX_EXAMPLES,
        plots={f'sweep_{key}': lambda config, evaluations, key=key: plots.sweep(
            key, config, checks.sweep_results(config, evaluations)) for key in checks.SWEEPS}),
    'seeds': Table(
        'The default PGD training and norm shaping, with two seeds',
        tuple(training._replace(seed=seed) for training in (DEFAULT, SHAPED) for seed in SEEDS),
        ['attack', *(f'{MODES[training.mode]}, `{inference}`, seed {seed + 1}'
                     for training in (DEFAULT, SHAPED) for inference in ('pn', 'bn_shaping')
                     for seed in SEEDS)],
        seed_rows, ACCURACY + SHARED),
    'norms': Table(
        'Other ways to estimate the population norms',
        (DEFAULT, SHAPED),
        ['training', 'population norms', 'clean, judged by them',
         'pgd through them, judged by them', 'the same examples, `bn_shaping`', 'difference'],
        norms_rows, ACCURACY + DIFFERENCES, NORMS_EXAMPLES),
    'gap': Table(
        'Norm shaping under `pn` and under `bn_shaping`',
        (SHAPED,),
        ['attack', '`pn`', '`bn_shaping`', 'difference', 'paper'],
        gap_rows, ACCURACY + SHARED + DIFFERENCES),
    'transfer': Table(
        'The strongest attack, made on the model of another seed',
        tuple(training._replace(seed=seed) for training in (DEFAULT, SHAPED) for seed in SEEDS),
        ['judged: training', 'inference', '`adaptive`, made on it',
         f'`transfer`, made on that of seed {SEEDS[1] + 1}', 'difference'],
        transfer_rows, ACCURACY + SHARED + DIFFERENCES),
    'neighbours': Table(
        'Victims whose batch an attacker shares',
        (DEFAULT, SHAPED),
        neighbours.HEADER, neighbours.neighbour_rows,
        f'victims: {FIRST}; accuracy in %; victims turned in %, [95% Wilson intervals]',
        neighbours.NUM_VICTIMS, neighbours.NOTE, checks=(check_neighbours,)),
    'checks': Table(
        'Checks of the attacks',
        checks.CHECKED,
        checks.CHECKS_HEADER, checks.check_rows,
        FIRST + f', {checks.FEW_EXAMPLES} of them in the rows of direct attacks below those of '
        'transferred `pgd`, which have {all}; accuracy in %' + DIFFERENCES, checks.MAX_EXAMPLES),
    'scales': Table(
        'C&W, DeepFool and FGSM with the same numbers on pixels of [0, 1] and of [0, 255]',
        checks.CHECKED,
        scales.HEADER, scales.scale_rows,
        FIRST + '; accuracy in %, [95% Wilson intervals]', scales.MAX_EXAMPLES, scales.NOTE),
    'binarization': Table(
        'The binarization test: planted adversarial examples that the attacks find',
        (DEFAULT, SHAPED),
        binarization.HEADER, binarization.binarization_rows,
        FIRST + '; share of the planted examples in %, [95% Wilson intervals]',
        max(binarization.NUM_IMAGES.values()), binarization.NOTE),
    'curves': Table(
        'The course of the trainings',
        curves.SHOWN,
        curves.HEADER, curves.curve_rows, 'accuracy in % while training', note=curves.NOTE,
        plots={'curves_plot': plots.curves}),
    'gallery': Table(
        'What attacks do to the first test images',
        (DEFAULT, SHAPED),
        gallery.HEADER, gallery.gallery_rows,
        'attacks made on a batch of the first test images', note=gallery.NOTE,
        plots={f'gallery_{training.mode}': partial(gallery.draw, training)
               for training in (DEFAULT, SHAPED)}),
    'variations': Table(
        'When does the gap open? One thing varied at a time',
        variations.TRAININGS,
        variations.HEADER, variations.variation_rows, ACCURACY + SHARED + DIFFERENCES,
        variations.MAX_EXAMPLES, variations.NOTE, plots={'variations_gap': plots.gaps},
        checks=(variations.check_steps,), apart=True, shows=variations.is_shown),
    'crossed': Table(
        "A mistake that would make numbers like the paper's",
        variations.CROSSED,
        variations.CROSSED_HEADER, variations.crossed_rows, ACCURACY, variations.MAX_EXAMPLES,
        variations.CROSSED_NOTE, checks=(check_shaping_attack,)),
    'claims': Table(
        "The paper's claims that compare two of its numbers",
        tuple(dict.fromkeys(of.training for claim in CLAIMS
                            for of in (claim.higher, claim.lower, *claim.others))),
        claims.HEADER, claims.claim_rows, FIRST + DIFFERENCES, note=claims.NOTE,
        checks=(check_shaping_attack, check_ratios)),
}


def trainings_of(tables, config):
    """Returns {name: configuration} of all trainings that some tables need."""
    return {name_of(training, config): config_of(training, config)
            for table in tables for training in table.trainings
            if not changes_nothing(training, config)}


def section(table, config, evaluations):
    """Returns a table with its title, caption and note, as Markdown.

    Args:
        evaluations: {name of a training: Evaluations}.
    """
    rows = formats.markdown(table.header, table.rows(config, evaluations))
    note = f'\n{table.note}\n' if table.note else ''
    lacking = [f'`{name}`' for name in trainings_of([table], config)
               if not table.shows(evaluations[name])]
    left_out = f' Left out, their numbers are not stored: {", ".join(lacking)}.' if lacking else ''
    return f'## {table.title}\n\n{caption(table, config)}{left_out}\n\n{rows}\n{note}'


def caption(table, config):
    """Returns what a table's numbers were made with, in words."""
    data = config['dataset']
    if config['classes']:
        data += f' ({", ".join(config["classes"])})'
    n, precision = config['num_eval_examples'], config['precision']
    evaluated = '' if precision == 'float32' else f', evaluated in {precision}'
    images = table.caption.format(n=min(n, table.max_examples or n), all=n, evaluated=evaluated,
                                  step=f'{config["step_size"]:g}', steps=config['num_steps'],
                                  xent=config['trades_xent'], beta=f'{config["trades_beta"]:g}')
    return (f'{network_name(config)}, {config["max_num_training_steps"]} steps of batch '
            f'{config["training_batch_size"]}, {data}, seed {config["tf_random_seed"]}; {images}.')

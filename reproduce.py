"""Computes the paper's Tables I to IV and its in-text experiments, beside the paper's figures.

Also checks the attacks, tries what could explain a difference, and says what is seen of each claim.

    python reproduce.py all --config configs/three_classes.json
    python reproduce.py table1 claims --stored results/three_classes    # of the cells kept there

Trains what is missing, each model in a folder of its own in model_dir, by train.py; evaluates what
is missing; writes MODEL_DIR/tables/NAME.md and figures beside them, and prints the tables. Every
figure is kept in MODEL_DIR/cells as soon as it is known, with the settings that it depends on: what
is done is never done again, so the program can be stopped and started at any time. Another setting
makes other cells beside the old ones. The finished batches of a figure that is not known yet are
kept, too, in MODEL_DIR/cells/unfinished, which may be removed at any time.
"""
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys

from absl import flags
import numpy as np

from config import (SCHEMA, config_from_flags, define_download_flag, load_config, relevant,
                    store_config)
import tensorflow as tf

from attacks import make_attack, num_examples
from attacks.random_search import RANDOM_DRAWS
from cifar10_input import eval_examples, load_data
from eval import WORST_IN_BALL, evaluate_attack, make_judges, worst_cases
from model import build_model, newest_intact
from paper.experiments import logit_errors, norm_shifts, perturbation_sizes
from paper.intervals import bootstrap, excess, paired_difference
from paper.population_norms import NUM_BATCHES, RULES, set_population_norms
from paper.published import (ADV, CLAIMS, INFERENCE_RATIOS, MAIN, PAPER_ADAPTIVE,
                             PAPER_CONFOUNDINGS, PAPER_RATIOS, PAPER_TABLES, SAME, TRAINING,
                             paper_accuracy)
from running import UserError
from running.files import replacing
from running.program import STOPPED, Terminated, run
from running.unfinished import checkpoint_digest, data_digest, path_of, remove
from running.untrusted import read_json
from shaping import INFERENCE_MODES, num_clean

TARGETS = ('table1', 'table2', 'table3', 'table4', 'confoundings', 'shifts', 'sweeps', 'seeds',
           'norms', 'gap', 'checks', 'claims')
MODES = {ADV: 'adv. only', TRAINING: 'shaping in training', MAIN: 'shaping in attack + training'}
ATTACK_ROWS = ('clean', 'pgd', 'cw', 'fgsm', 'deepfool', 'shaping')  # the paper's, in its order
OWN_ROWS = ('apgd', 'adaptive', 'apgd_eot')                           # beyond Tables I and II
FIRST_ROWS = ('clean', WORST_IN_BALL, 'apgd_eot', 'adaptive', 'apgd')  # what to believe comes first

SEEDS = 2
SEED_ROWS = GAP_ROWS = ('clean', 'pgd', 'adaptive')
SAME_POINTS = 0.02  # up to which two accuracies count as the same
NORMS_EXAMPLES = 1000  # at most; that is enough to tell one rule from another
SWEEP_EXAMPLES = 500  # at most: the sweeps are a check of the attacks, not a result
SWEEP_STEPS = (1, 2, 5, 10, 20, 50, 100)
SWEEP_EPSILONS = (0, 1, 2, 4, 8, 16, 32, 64)


# ---- what there is to train


def training(config, adversary, mode, ratio=None, seed=0):
    """Returns (name, configuration) of one of the paper's trainings, in model_dir/name.

    Args:
        seed: added to both seeds of the configuration.
        ratio: n of n:1; default: shaping_ratio. Where training_batch_size does not fit it, the next
            smaller size that does is taken (63 for 2:1; the paper does not say what it did).
    """
    name = f'{adversary}_{mode}'
    config = {**config, 'adversary': adversary, 'training_mode': mode}
    if adversary == 'pgd':
        config['trades_beta'] = 0.  # of trades alone
    if mode.startswith('shaping'):
        ratio = ratio or config['shaping_ratio']
        size = config['training_batch_size'] // (ratio + 1) * (ratio + 1)
        if size == 0:
            raise UserError(f'training_batch_size is {config["training_batch_size"]}; at least '
                            f'{ratio + 1} would fit a ratio of {ratio}:1')
        config |= {'shaping_ratio': ratio, 'training_batch_size': size}
        name += f'_{ratio}to1'
    if seed:
        name += f'_seed{seed}'
        config |= {key: config[key] + seed for key in ('tf_random_seed', 'np_random_seed')}
    return name, {**config, 'model_dir': os.path.join(config['model_dir'], name)}


def trainings_of(target, config):
    """Returns the trainings that a target needs, {name: configuration}."""
    if target in ('table1', 'table2'):
        adversary = 'pgd' if target == 'table1' else 'trades'
        return dict(training(config, adversary, mode) for mode in MODES)
    if target == 'table3':
        return dict(training(config, adversary, MAIN) for adversary in PAPER_TABLES)
    if target == 'table4':
        return dict(training(config, 'pgd', MAIN, ratio) for ratio in PAPER_RATIOS)
    if target == 'gap':
        return dict([training(config, 'pgd', MAIN)])
    if target in ('checks', 'claims'):
        tables = ('table1', 'table2', 'table4')[:2 if target == 'checks' else 3]
        needed = {name: c for t in tables for name, c in trainings_of(t, config).items()}
        return needed | dict([training(config, 'pgd', 'natural')] if target == 'claims' else [])
    seeds = range(SEEDS) if target == 'seeds' else (0,)
    return dict(training(config, 'pgd', mode, seed=s) for mode in ('adv_only', MAIN) for s in seeds)


def train(name, config, base):
    """Runs train.py, in a process of its own, unless the model is there.

    Args:
        base: the configuration that the command line gave; what differs from it is shown as --set.
    """
    model_dir, steps = config['model_dir'], config['max_num_training_steps']
    stored = os.path.join(model_dir, 'config.json')
    newest = newest_intact(model_dir)
    done = int(newest.rpartition('-')[2]) if newest else 0
    if done > steps:
        raise UserError(f'{model_dir} holds a training of {done} steps; max_num_training_steps '
                        f'is {steps}: {done} or another model_dir would fit')
    if done == steps:
        from train import check_same_run
        check_same_run(config, stored, newest)
        return
    command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')]
    if flags.FLAGS.config:
        command += ['--config', flags.FLAGS.config]
    for setting in flags.FLAGS.set:
        command += ['--set', setting]
    for key in SCHEMA:
        if config[key] != base[key]:
            command += ['--set', f'{key}={json.dumps(config[key])}']
    print(f'\nTraining {name}:\n    {shlex.join(["python", "train.py", *command[2:]])}', flush=True)
    status = run_to_a_stop(command)
    if status == STOPPED:
        print(f'reproduce.py: the training of {name} was stopped; the same command goes on from '
              'there', file=sys.stderr)
        sys.exit(STOPPED)
    if status:
        raise UserError(f'the training of {name} ended with status {status}; the same command '
                        'goes on from its newest checkpoint')


def run_to_a_stop(command):
    """Runs a command that a first signal makes save and end; returns its exit status.

    A signal that would stop this program is passed on as SIGTERM, and the command is waited for. It
    has a session of its own, so that a terminal's Ctrl-C does not reach it a second time: a second
    signal makes it leave at once, and here as well, two mean two.

    Raises:
        KeyboardInterrupt: SIGINT came. config.Terminated: SIGTERM came, or the terminal was closed.
            The command has ended.
    """
    process, told, sent, before = None, [], 0, {}

    def told_of(number, _):
        told.append(number)
        pass_on()

    def pass_on():
        nonlocal sent
        while process is not None and sent < len(told):
            sent += 1
            process.terminate()

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, a background job
                before[number] = signal.signal(number, told_of)
        process = subprocess.Popen(command, start_new_session=True)
        pass_on()  # what came before there was a process
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise KeyboardInterrupt if told[0] == signal.SIGINT else Terminated
    return status


# ---- cells: figures that are kept


class Cells:
    """The figures of one training, each computed once and kept in model_dir/cells as JSON.

    A cell is known by the configuration, by the checkpoint's index (it holds a checksum of every
    weight) and by the images. It does not know of the code: after a change to an attack, its cells
    are to be removed by hand.

    Args:
        name, config: of the training. data: a CIFAR10Data. data_digest: of its images.
        model: a model.Model, the same for all trainings. folder: where cells are kept.
    """

    def __init__(self, name, config, data, data_digest, model, folder):
        self.name, self.config, self.data, self.folder = name, config, data, folder
        self.model = model
        self.checkpoint = os.path.join(config['model_dir'],
                                       f'checkpoint-{config["max_num_training_steps"]}')
        self.digests = [checkpoint_digest(self.checkpoint), data_digest]

    def load(self):
        """Returns the model with this training's weights."""
        self.model.load_madry_checkpoint(self.checkpoint)
        return self.model

    def get(self, what, identity, compute):
        """Returns the cell `what`, a dict: the one that is kept, or compute(path) -> dict.

        Args:
            identity: what the cell depends on, beside the training's weights and the data; JSON.
            compute: keeps its finished batches in the file `path`, which also follows from the code
                and is removed in the end.
        """
        identity = json.dumps([self.name, what, *self.digests, identity], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        path = os.path.join(self.folder, f'{self.name}-{what}-{digest}.json')
        if os.path.exists(path):
            return read_json(path)
        print(f'Computing {self.name}: {what}', flush=True)
        unfinished = path_of(os.path.join(self.folder, 'unfinished'), f'{self.name}-{what}',
                             identity)
        value = {'identity': json.loads(identity), **compute(unfinished)}
        os.makedirs(self.folder, exist_ok=True)
        with replacing(path) as f:
            json.dump(value, f)
        remove([unfinished])
        return value

    def attack(self, name, modes=INFERENCE_MODES, ratios=None, norms='trained', **settings):
        """Returns one attack's cell: 'results', as eval.py has them, and who was right.

        Args:
            ratios: inference shaping ratios, one result for each; see eval.make_judges.
            norms: how the population norms are got; one of population_norms.RULES.
            settings: keys of the configuration that are changed for this attack.
        """
        config = {**self.config, **settings}
        identity = {**relevant(config, name), 'num_examples': num_examples(name, config),
                    'modes': list(modes), 'ratios': ratios}
        if norms != 'trained':
            identity['population_norms'] = [norms, NUM_BATCHES]

        def compute(unfinished):
            model, data = self.load(), self.data
            set_population_norms(model, data, config, norms)
            judges = make_judges(model, data, config, modes, ratios)
            results, right, in_ball = evaluate_attack(
                name, make_attack(name, model, data, config), data, config, judges, 1, unfinished)
            return {'results': results,
                    'right': [''.join(map(str, right[judge][0].astype(int))) for judge in judges],
                    'in_ball': ''.join(map(str, in_ball.astype(int)))}

        what = name + ('-ratios' if ratios else '') + ''.join(
            f'-{key}-{value}' for key, value in settings.items())
        if norms != 'trained':
            what += f'-norms-{norms.replace(" ", "_")}'
        return self.get(what, identity, compute)


class StoredCells(Cells):
    """The figures of one training as they lie in a folder, without weights, images or training.

    Args:
        name, config: of the training. folder: where the cells are.
    """

    def __init__(self, name, config, folder):
        self.name, self.config, self.folder, self.kept = name, config, folder, {}
        for path in glob.glob(os.path.join(glob.escape(folder), f'{name}-*.json')):
            cell = read_json(path)
            of_training, what, *_, identity = cell['identity']
            self.kept[json.dumps([of_training, what, identity], sort_keys=True)] = cell

    def get(self, what, identity, compute):
        """Returns the cell `what` that is kept, of whatever weights and images.

        Raises:
            UserError: there is none with this identity.
        """
        key = json.dumps([self.name, what, identity], sort_keys=True)
        if key not in self.kept:
            raise UserError(f'{self.folder} holds no {what} of {self.name} with its configuration')
        return self.kept[key]


# ---- the tables


def right_of(cell, i=0):
    """Returns which examples were right under a cell's judge i, bool [n]."""
    return np.array(list(cell['right'][i])) == '1'


def percent(value):
    return f'{100 * value:.1f}'


def shown(result, n=None):
    """Returns '57.1 [55.3, 58.9]': accuracy and interval in percent; and how many where not n."""
    low, high = result['interval']
    few = result['num_examples'] < (n or 0)
    return (f'{percent(result["accuracy"])} [{percent(low)}, {percent(high)}]'
            + (f' (n = {result["num_examples"]})' if few else ''))


def row_label(result, n):
    notes = [f'n = {result["num_examples"]}'] if result['num_examples'] < n else []
    if result.get('median_l2') is not None:
        notes.append(f'median L2 {result["median_l2"]:.3f} of {result["num_fooled"]}')
    return result['attack'] + (f' ({", ".join(notes)})' if notes else '')


def markdown(header, rows):
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def main_table(adversary, config, cells):
    """Returns Table I (pgd) or II (trades) as Markdown: the strongest attacks, then the rest.

    The worst cases are over the paper's attacks and ours, on the examples all were run on.
    """
    header = ['training', 'attack']
    for mode in INFERENCE_MODES:
        header += [f'`{mode}`', 'paper']
    rows = []
    for mode, label in MODES.items():
        name, _ = training(config, adversary, mode)
        of_attack = {attack: cells[name].attack(attack) for attack in ATTACK_ROWS + OWN_ROWS}
        results = [r for cell in of_attack.values() for r in cell['results']]
        judges = range(len(INFERENCE_MODES))
        right = {a: {(INFERENCE_MODES[i], None): right_of(cell, i)[None] for i in judges}
                 for a, cell in of_attack.items()}
        in_ball = {a: np.array(list(cell['in_ball'])) == '1' for a, cell in of_attack.items()}
        results += worst_cases(right, in_ball, config)
        for attack in dict.fromkeys([*FIRST_ROWS, *(r['attack'] for r in results)]):
            three = [r for r in results if r['attack'] == attack]
            row = [label, row_label(three[0], config['num_eval_examples'])]
            paper = PAPER_TABLES[adversary][mode].get(attack)
            for i, r in enumerate(three):
                row += [shown(r), percent(paper[i]) if paper else '']
            rows.append(row)
    return markdown(header, rows)


def table3(config, cells):
    """Returns Table III as Markdown: the adaptive attacks, under bn_shaping."""
    header = ['attack']
    for adversary in PAPER_TABLES:
        header += [f'{adversary} + shaping', 'paper']
    rows = []
    for attack, paper in PAPER_ADAPTIVE.items():
        row = [attack]
        for adversary in PAPER_TABLES:
            name, _ = training(config, adversary, MAIN)
            # All modes, though the table shows one: the cell serves Tables I and II, too
            result = cells[name].attack(attack)['results'][-1]
            row += [shown(result, config['num_eval_examples']), percent(paper[adversary])]
        rows.append(row)
    return markdown(header, rows)


def ratio_results(config, cells):
    """Returns {training ratio: results in the order of INFERENCE_RATIOS}, Table IV's figures."""
    found = {}
    for ratio in PAPER_RATIOS:
        name, _ = training(config, 'pgd', MAIN, ratio)
        found[ratio] = cells[name].attack('pgd', ('bn_shaping',), INFERENCE_RATIOS)['results']
    return found


def table4(config, cells):
    """Returns Table IV as Markdown, the paper's figures in parentheses."""
    rows = []
    for ratio, results in ratio_results(config, cells).items():
        size = training(config, 'pgd', MAIN, ratio)[1]['training_batch_size']
        label = f'1:{ratio}' + (f' (batch {size})' if size != config['training_batch_size'] else '')
        rows.append([label] + [f'{shown(r, config["num_eval_examples"])} ({percent(paper)})'
                               for r, paper in zip(results, PAPER_RATIOS[ratio])])
    return markdown(['adv:clean in training', *(f'1:{n} in inference' if n else '1:0 (none)'
                                                for n in INFERENCE_RATIOS)], rows)


def confounding_rows(config, cells):
    """Returns the three in-text experiments as (what, model, {excess, interval, n}, paper's)."""
    part = relevant(config)
    names = [training(config, 'pgd', mode)[0] for mode in ('adv_only', MAIN)]

    def get(name, what, measure, pairs):
        def compute(unfinished):
            sizes = measure(cells[name].load(), cells[name].data, cells[name].config, unfinished)
            result = {}
            for label, (a, b) in pairs.items():
                value, interval = excess(sizes[a], sizes[b])
                result[label] = {'excess': value, 'interval': interval, 'n': len(sizes[a]),
                                 'means': [float(sizes[a].mean()), float(sizes[b].mean())]}
            return result
        return cells[name].get(what, part, compute)

    rows = []
    errors = {'the same norms': ('clean norms', 'adversarial norms'),
              'its own batch\'s norms': ('clean norms', 'adversarial norms, clean logits')}
    sizes = {'pn': ('pn', 'bn'), 'shaping': ('shaping', 'bn')}
    found = get(names[0], 'logit_errors', logit_errors, errors)
    for label in errors:
        rows.append((f'logit errors of FGSM examples, clean over adversarial batch norms; the '
                     f'clean version under {label}', names[0], found[label],
                     PAPER_CONFOUNDINGS[0]))
    for name in names:
        found = get(name, 'perturbation_sizes', perturbation_sizes, sizes)
        rows.append(('size of PGD\'s perturbations, population norms over batch norms', name,
                     found['pn'], PAPER_CONFOUNDINGS[1] if name == names[0] else None))
        rows.append(('size of PGD\'s perturbations, norm shaping over batch norms', name,
                     found['shaping'], PAPER_CONFOUNDINGS[2]))
    return rows


def confoundings_table(config, cells):
    rows = []
    for what, name, r, paper in confounding_rows(config, cells):
        low, high = r['interval']
        rows.append([what, f'`{name}`', f'{100 * r["excess"]:+.1f}% [{100 * low:+.1f}, '
                     f'{100 * high:+.1f}]', f'{r["means"][0]:.4f} / {r["means"][1]:.4f}',
                     f'{100 * paper:+.0f}%' if paper else '',
                     verdict(paper, r['interval']) if paper else ''])
    return markdown(['how much larger on average', 'model', 'ours', 'the two means', 'paper',
                     'at this scale'], rows)


def shifts_table(config, cells):
    """Returns how far an attack moves the batch norms as Markdown; see confoundings.norm_shifts."""
    rows = []
    for mode in (ADV, MAIN):
        name, _ = training(config, 'pgd', mode)

        def compute(unfinished, of_training=cells[name]):
            found = norm_shifts(of_training.load(), of_training.data, of_training.config,
                                unfinished)
            return {what: bootstrap(lambda chosen, values=values: values[chosen].mean(),
                                    len(values)) for what, values in found.items()}

        found = cells[name].get('norm_shifts', relevant(config), compute)
        for what, label in (('all', 'PGD on all samples'), ('tail', 'PGD on the tail'),
                            ('another', 'none, but another clean batch')):
            row = [f'`{name}`', label]
            for part in ('', ' deviations'):
                value, (low, high) = found[what + part]
                row.append(f'{value:.4f} [{low:.4f}, {high:.4f}]')
            rows.append(row)
    return markdown(['training', 'attack', 'the means move by', 'the deviations by'], rows)


def sweep_results(config, cells):
    """Returns {(training, 'num_steps' or 'epsilon', value): {label: result}}.

    PGD made with population norms, judged by them and by bn_shaping; over epsilon also `adaptive`,
    judged by bn_shaping. Over epsilon the step is a quarter of it. Last, in PGD's place, the
    strongest of many random perturbations.
    """
    found = {}
    for mode in (ADV, MAIN):
        of_training = cells[training(config, 'pgd', mode)[0]]
        for key, values in (('num_steps', SWEEP_STEPS), ('epsilon', SWEEP_EPSILONS)):
            for value in values:
                results = swept(of_training, 'pgd', config, key, value)['results']
                found[of_training.name, key, value] = of_value = {
                    'pgd, pn': results[0], 'pgd, bn_shaping': results[1]}
                if key == 'epsilon':
                    of_value['adaptive, bn_shaping'] = swept(
                        of_training, 'adaptive', config, key, value)['results'][0]
        results = swept(of_training, 'random', config)['results']
        found[of_training.name, 'random perturbations', results[0]['random_draws']] = {
            'pgd, pn': results[0], 'pgd, bn_shaping': results[1]}
    return found


def swept(of_training, attack, config, key=None, value=None):
    """Returns the cell of an attack at one value of `key`, on the samples of the sweeps."""
    settings = {'num_eval_examples': min(SWEEP_EXAMPLES, config['num_eval_examples'])}
    if key is not None:
        settings[key] = value
    if key == 'epsilon':
        settings |= {'epsilon': float(value), 'step_size': value / 4}
    modes = ('bn_shaping',) if attack == 'adaptive' else ('pn', 'bn_shaping')
    return of_training.attack(attack, modes, **settings)


def sweeps_table(config, cells):
    found, rows = sweep_results(config, cells), []
    for (name, key, value), results in found.items():
        rows.append([f'`{name}`', f'{key} {value}'] + [
            shown(results[label], min(SWEEP_EXAMPLES, config['num_eval_examples']))
            if label in results else ''
            for label in ('pgd, pn', 'pgd, bn_shaping', 'adaptive, bn_shaping')])
    return markdown(['training', 'pgd with', 'under `pn`', 'under `bn_shaping`',
                     'adaptive, under `bn_shaping`'], rows)


def checks_table(config, cells):
    """Returns what must be so if the attacks are sound, as Markdown: figures, and whether it is.

    That a stronger attack leaves no more accuracy than a weaker one is checked in pairs of the same
    samples: it fails where all of the difference's interval is above zero. Of a sweep's values, the
    two are shown for which this is closest.
    """
    rows = []

    def add(name, what, figures, value=None, interval=None, holds=None):
        holds = interval[0] <= 0 if holds is None else holds
        rows.append([f'`{name}`', what, figures, difference(value, interval) if interval else '',
                     'holds' if holds else '**fails**'])

    def compare(name, what, strong, weak, i=0, least=False):
        """strong, weak: cells; i: which judge's. least: there must be a difference."""
        a, b = right_of(strong, i), right_of(weak, i)
        value, interval = paired_difference(a, b)
        add(name, what, f'{percent(a.mean())} / {percent(b.mean())}', value, interval,
            interval[1] < 0 if least else None)

    for mode in (ADV, MAIN):
        name, _ = training(config, 'pgd', mode)
        for attack, i, inference in (('pgd', 0, 'pn'), ('pgd', 1, 'bn_shaping'),
                                     ('adaptive', 0, 'bn_shaping')):
            label = f'`{attack}` under `{inference}`'
            for key, values in (('num_steps', SWEEP_STEPS), ('epsilon', SWEEP_EPSILONS)):
                if attack == 'adaptive' and key == 'num_steps':
                    continue
                of_value = [swept(cells[name], attack, config, key, v) for v in values]
                pairs = itertools.combinations(zip(values, of_value), 2)
                (less, weak), (more, strong) = max(pairs, key=lambda pair: paired_difference(
                    right_of(pair[1][1], i), right_of(pair[0][1], i))[1][0])
                compare(name, f'{label}: more {key} never help; at worst {more} over {less}',
                        strong, weak, i)
                if key == 'epsilon':
                    left = right_of(of_value[-1], i).mean()
                    add(name, f'{label}: nothing is left at {key} {values[-1]}', percent(left),
                        holds=left == 0)
        compare(name, f'`pgd` is stronger than {RANDOM_DRAWS:,} random perturbations, `pn`',
                swept(cells[name], 'pgd', config, 'num_steps', config['num_steps']),
                swept(cells[name], 'random', config), least=True)
    shaped = INFERENCE_MODES.index('bn_shaping')
    for adversary in PAPER_TABLES:
        for mode in MODES:
            name, _ = training(config, adversary, mode)
            compare(name, '`adaptive` under `bn_shaping` is as strong as `pgd`, transferred',
                    cells[name].attack('adaptive'), cells[name].attack('pgd'), shaped)
    return markdown(['training', 'what must hold', 'accuracy', 'difference', ''], rows)


def seeds_table(config, cells):
    """Returns the two rows that the paper prints in colour as Markdown, each with SEEDS seeds.

    The seeds are of the training, its data's order, and the evaluation's draws and starts.
    """
    header, columns = ['attack'], []
    for mode, inference in (('adv_only', 'pn'), ('adv_only', 'bn_shaping'), (MAIN, 'pn'),
                            (MAIN, 'bn_shaping')):
        for seed in range(SEEDS):
            name, _ = training(config, 'pgd', mode, seed=seed)
            header.append(f'{MODES[mode]}, `{inference}`, seed {seed + 1}')
            columns.append((name, INFERENCE_MODES.index(inference)))
    rows = [[attack] + [shown(cells[name].attack(attack)['results'][i], config['num_eval_examples'])
                        for name, i in columns] for attack in SEED_ROWS]
    return markdown(header, rows)


def difference(value, interval):
    """Returns '+7.1 [+5.3, +8.9]': a difference of accuracies and its interval, in points."""
    low, high = interval
    return f'{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]'


def norms_table(config, cells):
    """Returns clean and PGD accuracy by each way to get the population norms, as Markdown.

    PGD goes through these population norms; its examples are then judged by them and, transferred,
    by bn_shaping, which they are no part of.
    """
    n = min(NORMS_EXAMPLES, config['num_eval_examples'])
    rows, pn, shaped = [], INFERENCE_MODES.index('pn'), INFERENCE_MODES.index('bn_shaping')
    for mode in (ADV, MAIN):
        name, _ = training(config, 'pgd', mode)
        for rule, meaning in RULES.items():
            clean, pgd = (cells[name].attack(attack, norms=rule, num_eval_examples=n)
                          for attack in ('clean', 'pgd'))
            gain = paired_difference(right_of(pgd, shaped), right_of(pgd, pn))
            rows.append([f'`{name}`', meaning, shown(clean['results'][pn]),
                         *(shown(pgd['results'][i]) for i in (pn, shaped)), difference(*gain)])
    return markdown(['training', 'population norms', 'clean, judged by them',
                     'pgd through them, judged by them', 'the same examples, `bn_shaping`',
                     'difference'], rows)


def gap_table(config, cells):
    """Returns the norm-shaped model under `pn` and under `bn_shaping` as Markdown."""
    name, _ = training(config, 'pgd', MAIN)
    rows, pn, shaped = [], INFERENCE_MODES.index('pn'), INFERENCE_MODES.index('bn_shaping')
    for attack in GAP_ROWS:
        cell = cells[name].attack(attack)
        rows.append([attack, *(shown(cell['results'][i]) for i in (pn, shaped)), difference(
            *paired_difference(right_of(cell, shaped), right_of(cell, pn)))])
        paper = PAPER_TABLES['pgd'][MAIN].get(attack)
        rows[-1].append(f'{100 * (paper[shaped] - paper[pn]):+.1f}' if paper else '')
    return markdown(['attack', '`pn`', '`bn_shaping`', 'difference', 'paper'], rows)


def right_in(of, config, cells):
    """Returns which examples were right in what a claim names, bool [n]; see paper.py."""
    if of[-1] == 'clean':
        name, _ = (training(config, 'pgd', 'natural') if of[0] == 'natural' else
                   training(config, 'pgd', MAIN, of[0]))
        inference = 'pn' if of[0] == 'natural' else 'bn_shaping'
        return right_of(cells[name].attack('clean'), INFERENCE_MODES.index(inference))
    if len(of) == 2:
        name, _ = training(config, 'pgd', MAIN, of[0])
        cell = cells[name].attack('pgd', ('bn_shaping',), INFERENCE_RATIOS)
        return right_of(cell, INFERENCE_RATIOS.index(of[1]))
    adversary, mode, attack, inference = of
    cell = cells[training(config, adversary, mode)[0]].attack(attack)
    return right_of(cell, INFERENCE_MODES.index(inference))


def verdict(paper, interval, same=False):
    """Returns what our difference's interval says of a claim, in a word or two.

    Args:
        paper: the paper's difference, the accuracy that is claimed to be higher less the other one.
        interval: ours. same: the claim is that there is none: SAME_POINTS at most.
    """
    low, high = interval
    if same:
        return ('seen' if -SAME_POINTS <= low and high <= SAME_POINTS else
                'contradicted' if low > SAME_POINTS or high < -SAME_POINTS else 'open')
    if high < 0:
        return 'contradicted'
    if low > 0:
        return 'seen, smaller' if high < paper else 'seen, larger' if low > paper else 'seen'
    return 'not seen' if high < paper else 'open'


CLAIMS_NOTE = """

Norm shaping is the model with shaping in attack and training, judged by `bn_shaping`; the default
is adversarial-only training, judged by `pn`; unless said otherwise. `pgd`, `fgsm`, `cw` and
`deepfool` are made with `pn`: judged by `bn_shaping` or `bn`, they are transferred.

Seen: all of the interval is on the side of zero that is claimed (smaller, larger: and the paper's
figure outside). Contradicted: all is on the other side. Not seen: zero is in it, the paper's figure
beyond it. Open: both are in it, the samples are too few. Where no difference is claimed,
{points:g} points at most: seen, all of the interval is within; contradicted, all is outside; open
otherwise.

The intervals are over test images alone: each model is one training, and another seed's may differ
by more (see the table of seeds). Of {rows} intervals of 95%, {missed} are expected to miss by
chance."""


def claims_table(config, cells):
    """Returns the paper's claims as Markdown: its difference, ours on the same samples, verdict.

    Of an attack that was run on fewer samples, these.
    """
    rows = []
    for where, words, more, *same, less in CLAIMS:
        a, b = (right_in(of, config, cells) for of in (more, less))
        n = min(len(a), len(b))
        value, interval = paired_difference(a[:n], b[:n])
        paper = paper_accuracy(more) - paper_accuracy(less)
        few = f' (n = {n})' if n < config['num_eval_examples'] else ''
        said = verdict(paper, interval, same == [SAME])
        if not same and paper <= 0:
            said += '; the paper\'s own figures do not show it'
        rows.append([where, words, f'{100 * paper:+.1f}', difference(value, interval) + few, said])
    table = markdown(['section', 'claim', 'paper', 'ours', 'at this scale'], rows)
    return table + CLAIMS_NOTE.format(points=100 * SAME_POINTS, rows=len(rows),
                                      missed=round(len(rows) / 20))


TABLES = {
    'table1': ('Table I: PGD-based adversarial training',
               lambda config, cells: main_table('pgd', config, cells)),
    'table2': ('Table II: TRADES-based adversarial training',
               lambda config, cells: main_table('trades', config, cells)),
    'table3': ('Table III: adaptive attacks, under bn_shaping', table3),
    'table4': ('Table IV: shaping ratios in training and inference, under PGD', table4),
    'confoundings': ('The in-text experiments of sections IV and V', confoundings_table),
    'shifts': ('How far an attack moves the batch norms', shifts_table),
    'sweeps': ('Accuracy against PGD steps and against epsilon', sweeps_table),
    'seeds': ('The default PGD training and norm shaping, with two seeds', seeds_table),
    'norms': ('Population norms got in other ways', norms_table),
    'gap': ('Norm shaping under `pn` and under `bn_shaping`', gap_table),
    'checks': ('Checks of the attacks', checks_table),
    'claims': ('The paper\'s claims that are differences between its figures', claims_table)}


def caption(target, config):
    """Returns what a table's figures were made with, in words."""
    depth, data = 6 * config['num_residual_units'] + 2, config['dataset']
    if config['classes']:
        data += f' ({", ".join(config["classes"])})'
    n = config['num_eval_examples']
    what = f'the first {min(n, NORMS_EXAMPLES) if target == "norms" else n} test images'
    if target == 'confoundings':
        what = f'the first {n} training images, in whole batches; 95% bootstrap intervals'
    elif target == 'shifts':
        what = (f'the first {n} training images, in whole batches; means in standard deviations of '
                'the clean batch, deviations relative to its own, averaged over all channels; 95% '
                'bootstrap intervals')
    elif target == 'sweeps':
        what = f'the first {min(n, SWEEP_EXAMPLES)} test images; 95% Wilson intervals'
    elif target == 'checks':
        what = (f'the first {min(n, SWEEP_EXAMPLES)} test images, {n} in the last six rows; '
                'accuracy in %')
    elif target != 'claims':
        what += '; accuracy in %, [95% Wilson intervals]'
    if target in ('norms', 'gap', 'checks', 'claims'):
        what += '; differences in points, [95% intervals of pairs of the same samples]'
    return (f'w{depth}-{config["width_factor"]}, {config["max_num_training_steps"]} steps of batch '
            f'{config["training_batch_size"]}, {data}, seed {config["tf_random_seed"]}; {what}.')


def section(target, config, cells):
    """Returns a target's table with its title and caption, as Markdown."""
    title, make = TABLES[target]
    return f'## {title}\n\n{caption(target, config)}\n\n{make(config, cells)}\n'


# ---- the figures


def draw_figures(targets, config, cells, folder):
    """Draws the figures that the computed targets have, as PNG files; prints their paths."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    def save(figure, name):
        path = os.path.join(folder, f'{name}.png')
        with replacing(path, 'wb') as f:
            figure.savefig(f, format='png', dpi=150, bbox_inches='tight')
        pyplot.close(figure)
        print(f'Drawn: {path}')

    for target, adversary in (('table1', 'pgd'), ('table2', 'trades')):
        if target in targets:
            save(tradeoff_figure(pyplot, adversary, config, cells), f'{target}_tradeoff')
    if 'table4' in targets:
        save(ratios_figure(pyplot, config, cells), 'table4_ratios')
    if 'sweeps' in targets:
        for key in ('num_steps', 'epsilon'):
            save(sweep_figure(pyplot, key, config, cells), f'sweep_{key}')


def tradeoff_figure(pyplot, adversary, config, cells):
    """Draws clean accuracy against accuracy under PGD for each training and inference mode."""
    figure, axes = pyplot.subplots(figsize=(6, 5))
    for colour, (mode, label) in zip(('tab:blue', 'tab:orange', 'tab:red'), MODES.items()):
        of_training = cells[training(config, adversary, mode)[0]]
        clean, pgd = (of_training.attack(attack)['results'] for attack in ('clean', 'pgd'))
        paper = PAPER_TABLES[adversary][mode]
        for i, (inference, marker) in enumerate(zip(INFERENCE_MODES, 'os^')):
            errors = [[[100 * abs(bound - r['accuracy'])] for bound in r['interval']]
                      for r in (clean[i], pgd[i])]
            axes.errorbar(100 * clean[i]['accuracy'], 100 * pgd[i]['accuracy'], xerr=errors[0],
                          yerr=errors[1], color=colour, marker=marker, linestyle='', capsize=2,
                          label=f'{label}, {inference}')
            axes.plot(100 * paper['clean'][i], 100 * paper['pgd'][i], color=colour, marker=marker,
                      linestyle='', markerfacecolor='none', alpha=0.6)
    axes.set(xlabel='accuracy on clean images, %', ylabel='accuracy under PGD (made with PN), %',
             title=f'{adversary} training; hollow: the paper (w32-10)')
    axes.legend(fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    return figure


def ratios_figure(pyplot, config, cells):
    """Draws Table IV as two heat maps, ours and the paper's."""
    figure, both = pyplot.subplots(1, 2, figsize=(11, 3.2), sharey=True)
    ours = [[r['accuracy'] for r in results] for results in ratio_results(config, cells).values()]
    for axes, values, title in zip(both, (ours, list(PAPER_RATIOS.values())),
                                   ('ours', 'the paper (w32-10)')):
        image = axes.imshow(100 * np.array(values), vmin=0, vmax=100, cmap='viridis', aspect='auto')
        for (row, column), value in np.ndenumerate(np.array(values)):
            axes.text(column, row, percent(value), ha='center', va='center',
                      color='white' if value < 0.6 else 'black')
        axes.set(title=title, xlabel='adv:clean in inference',
                 xticks=range(len(INFERENCE_RATIOS)), xticklabels=[f'1:{n}' for n in
                                                                   INFERENCE_RATIOS],
                 yticks=range(len(PAPER_RATIOS)), yticklabels=[f'1:{n}' for n in PAPER_RATIOS])
    both[0].set_ylabel('adv:clean in training')
    figure.colorbar(image, ax=both, label='accuracy under PGD, %')
    return figure


def sweep_figure(pyplot, key, config, cells):
    """Draws accuracy against PGD's steps or epsilon, with intervals."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    found = {k: v for k, v in sweep_results(config, cells).items() if k[1] == key}
    styles = {'pgd, pn': '-', 'pgd, bn_shaping': '--', 'adaptive, bn_shaping': ':'}
    for colour, mode in zip(('tab:blue', 'tab:red'), ('adv_only', MAIN)):
        name, _ = training(config, 'pgd', mode)
        for label, style in styles.items():
            points = [(value, results[label]) for (n, _, value), results in found.items()
                      if n == name and label in results]
            if points:
                accuracy = [100 * r['accuracy'] for _, r in points]
                axes.plot([value for value, _ in points], accuracy, style, color=colour,
                          marker='.', label=f'{MODES[mode]}; {label}')
                axes.fill_between([value for value, _ in points],
                                  *(100 * np.array([r['interval'][i] for _, r in points])
                                    for i in (0, 1)), color=colour, alpha=0.08)
    axes.set_xscale('symlog' if key == 'epsilon' else 'log', base=2)
    x_labels = {
        'num_steps': f'PGD steps of {config["step_size"]:g}, epsilon {config["epsilon"]:g}',
        'epsilon': f'epsilon in pixels, {config["num_steps"]} steps of a quarter of it'}
    axes.set(xlabel=x_labels[key], ylabel='accuracy, %', ylim=(0, 100))
    axes.legend(fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    return figure


def check(targets, config, data):
    """Raises UserError where a target would fail after hours, for what can be seen at once."""
    eval_examples(data, config)
    for package in ('foolbox', 'matplotlib'):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is missing: pip install -r requirements.txt would fit')
    ratios = (INFERENCE_RATIOS if {'table4', 'claims'} & set(targets) else
              (config['inference_shaping_ratio'],))
    for ratio in ratios:
        try:
            k = num_clean(config['shaping_batch_size'], ratio)
        except ValueError as error:
            raise UserError(f'shaping_batch_size is {config["shaping_batch_size"]}, and Table IV '
                            f'asks for {ratio}:1, too: {error}') from None
        if 2 * k > data.train_data.n:
            raise UserError(f'shaping_batch_size is {config["shaping_batch_size"]}; at most the '
                            f'number of training images, {data.train_data.n}, would fit')
    if {'table1', 'table2', 'claims', 'seeds'} & set(targets):
        try:
            num_clean(config['eval_batch_size'], config['shaping_ratio'])
        except ValueError as error:
            raise UserError(f'eval_batch_size is {config["eval_batch_size"]}, shaping_ratio '
                            f'{config["shaping_ratio"]}: {error}') from None
    if 'shifts' in targets and data.train_data.n < 2 * config['training_batch_size']:
        raise UserError(f'training_batch_size is {config["training_batch_size"]}; at most half the '
                        f'number of training images, {data.train_data.n // 2}, would fit')
    if {'confoundings', 'shifts'} & set(targets):
        for key in ('epsilon', 'step_size'):
            if config[key] == 0:
                raise UserError(f'{key} is 0: no perturbation to compare; a number above 0 would '
                                'fit')
        if config['num_eval_examples'] < config['training_batch_size']:
            raise UserError(f'num_eval_examples is {config["num_eval_examples"]}; at least '
                            f'training_batch_size, {config["training_batch_size"]}, would fit')


def main(words):
    if not words:
        raise UserError(f'nothing to reproduce; one or more of {", ".join(TARGETS)}, or all, would '
                        'fit')
    targets = [target for target in TARGETS if target in words or 'all' in words]
    stored = flags.FLAGS.stored
    if stored and (flags.FLAGS.config or flags.FLAGS.set):
        raise UserError('--stored has a configuration of its own; neither --config nor --set fits')
    config = load_config(os.path.join(stored, 'config.json')) if stored else config_from_flags()
    if config['training_mode'] != MAIN or config['adversary'] != 'pgd':
        raise UserError('training_mode and adversary are what the tables vary; the configuration '
                        f'must leave them at {MAIN} and pgd')
    needed = {}
    for target in targets:
        needed |= trainings_of(target, config)
    if stored:
        folder = stored
        cells = {name: StoredCells(name, of_training, os.path.join(stored, 'cells'))
                 for name, of_training in needed.items()}
    else:
        folder = os.path.join(config['model_dir'], 'tables')
        cells = train_and_load(targets, needed, config, folder)

    # Evaluate what is missing; print and draw
    for target in targets:
        text = section(target, config, cells)
        path = os.path.join(folder, f'{target}.md')
        with replacing(path) as f:
            f.write(text)
        print(f'\n{text}\nWritten to {path}', flush=True)
    draw_figures(targets, config, cells, folder)


def train_and_load(targets, needed, config, folder):
    """Trains what is missing; returns {name: Cells} of the trainings that are needed.

    Args:
        needed: {name: configuration}. folder: of the tables; the configuration is stored there.
    """
    if config['eval_on_cpu']:
        tf.config.set_visible_devices([], 'GPU')
    data = load_data(config, flags.FLAGS.download)
    check(targets, config, data)  # rather told now than after the trainings
    for name, of_training in needed.items():  # before this process takes a GPU for the evaluation
        train(name, of_training, config)
    os.makedirs(folder, exist_ok=True)
    store_config(config, os.path.join(folder, 'config.json'))
    model, digest = build_model(config, data.num_classes), data_digest(data)
    return {name: Cells(name, of_training, data, digest, model,
                        os.path.join(config['model_dir'], 'cells'))
            for name, of_training in needed.items()}


if __name__ == '__main__':
    define_download_flag()
    flags.DEFINE_string('stored', None, 'Folder with config.json and cells/, as results/ has them: '
                        'makes tables and figures of these alone, in that folder.')
    run(main, (*TARGETS, 'all'))

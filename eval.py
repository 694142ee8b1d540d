"""Evaluates a checkpoint: each attack's examples, classified under each inference mode.

    python eval.py --inference bn_shaping               # the newest checkpoint in model_dir
    python eval.py --model_dir DIR --attack all         # with the configuration stored in DIR
    python eval.py --num_draws 10                       # bn_shaping and bn_recorded, ten draws each
    python eval.py --checkpoint PREFIX --inference pn   # of the original, with config.json
    python eval.py --select best                        # the best checkpoint by validation images
    python eval.py --watch                              # each checkpoint of a training as it comes
    python eval.py --pictures samples.png               # with pictures of the first test images
    python eval.py --compare DIR1 DIR2                  # results that are there, side by side

Prints a table and adds its rows to MODEL_DIR/eval/results.json (or --output PATH), where a row
replaces its own former self only. TensorBoard summaries are written beside it. Stopped and started
again with the same command, it resumes after the last finished batch; until the rows are written,
such batches are kept in MODEL_DIR/eval/unfinished, which may be removed at any time. With --output
PATH they are in PATH.unfinished, and there are no summaries.
"""
from datetime import datetime
import os
import sys
from timeit import default_timer as timer
from typing import NamedTuple

from absl import flags
import numpy as np

from attacks import (ATTACKS, DIRECT, MINIMUM_NORM, check_names, make_attack, num_examples,
                     other_weights)
from config import (INFERENCE_MODES, SCHEMA, begin, choice, config_from_flags, define_model_flags,
                    parse_setting, relevant)
from running.program import ANY, run

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    define_model_flags()
    flags.DEFINE_string('inference', 'all',
                        f'Comma-separated: {", ".join(INFERENCE_MODES)}, or all.')
    flags.DEFINE_string('attack', 'clean,pgd', f'Comma-separated: {", ".join(ATTACKS)}, or all.')
    flags.DEFINE_integer('num_draws', 1, 'Independent draws, of clean samples or of recordings, '
                         'under which bn_shaping and bn_recorded classify each example; the mean, '
                         'the spread and the share right under all of them are reported.')
    flags.DEFINE_boolean('check', False, 'Run the direct attacks by gradients again on the first '
                         'batch, with twice the steps, then the restarts, then the draws, and flag '
                         'what leaves less.')
    flags.DEFINE_boolean('watch', False, 'Evaluate each checkpoint of a training as it comes, '
                         'until its last step.')
    flags.DEFINE_string('output', None, 'File to which the results are added. Default: '
                        'MODEL_DIR/eval/results.json. Nothing is then written in MODEL_DIR.')
    flags.DEFINE_string('pictures', None, 'Draw the first test images in this .png file: clean, '
                        'adversarial, their difference, and what each inference answers.')
    flags.DEFINE_boolean('compare', False, 'Print the results in the folders or files that are '
                         'named, side by side; evaluate nothing.')
    begin(__doc__, takes_words=True, attack=ATTACKS, inference=INFERENCE_MODES)

import running.quiet  # noqa: F401
import tensorflow as tf

from cifar10_input import eval_examples, load_data
import doubts
from model import build_model, checkpoints, damage, find_checkpoint
from pgd_attack import finite, perturbation_fault
from report import Outputs, print_comparison, print_table
from running import UserError
from running.arriving import arriving
from running.devices import leave_gpus
from running.unfinished import batches, checkpoint_digest, data_digest, path_of
from running.untrusted import read_json
from shaping import FORMS, Unfit, form_of, make_inference, queries_of

WORST_IN_BALL = 'worst in ball'  # over the attacks that were run on all images
WORST_DIRECT, WORST_TRANSFERRED = 'worst in ball, direct', 'worst in ball, transferred'
WORST_OF_SLOW = 'worst in ball, slow too'  # over all attacks, on the images that all were run on
WORST_CASE = 'worst case'  # the same, in the ball or not
WORST = WORST_IN_BALL, WORST_DIRECT, WORST_TRANSFERRED, WORST_OF_SLOW, WORST_CASE
NUM_SAMPLES = 8  # the first examples of each attack, for pictures


class Request(NamedTuple):
    """What is evaluated: keys of ATTACKS, names in INFERENCE_MODES, and draws of clean samples."""
    attacks: list
    modes: list
    num_draws: int = 1
    check: bool = False  # whether attacks are run again with more steps, restarts and draws


class Removed(UserError):
    """A checkpoint was removed, as a training removes old ones, before its weights were read."""


def main(words):
    if flags.FLAGS.compare:
        return compare(words)
    if words:
        raise UserError(f'{words[0]!r} is not an option; eval.py --help lists them')

    tf.get_logger().setLevel('ERROR')  # that --watch makes its graphs anew, at length

    # Global constants
    config = config_from_flags()
    request = request_from_flags(config)
    leave_gpus(config)

    # The checkpoints and the outputs: fail now, not after the evaluation
    for name in request.attacks:
        other_weights(name, config)
    outputs = Outputs(config, flags.FLAGS.output, flags.FLAGS.pictures)
    if not flags.FLAGS.watch:
        checkpoint = find_checkpoint(config, flags.FLAGS.checkpoint, flags.FLAGS.select)

    # The data and the model
    data = load_data(config, flags.FLAGS.download)
    eval_examples(data, config)
    model = build_model(config, data.num_classes)

    # Evaluate the checkpoint, or each one as it comes (the original's infinite eval loop)
    model_dir = config['model_dir']
    for filename in (arriving(model_dir, checkpoints, damage, lambda: plan_of(model_dir))
                     if flags.FLAGS.watch else [checkpoint]):
        try:
            evaluate_checkpoint(filename, model, data, config, request, outputs)
        except Removed as error:
            if not flags.FLAGS.watch:
                raise
            print(error, flush=True)


# A function for evaluating a single checkpoint
def evaluate_checkpoint(filename, model, data, config, request, outputs):
    """Evaluates a single checkpoint: prints its table, writes its rows and summaries."""
    # Restore the checkpoint
    try:
        filename = find_checkpoint(config, filename)
        of_weights, of_data = checkpoint_digest(filename), data_digest(data)
        step = model.load_madry_checkpoint(filename)
    except (UserError, FileNotFoundError):
        if os.path.exists(f'{filename}.index') or os.path.isfile(filename):
            raise
        raise Removed(f'{filename} was removed before it could be evaluated') from None
    print(f'Checkpoint {filename}, step {step}   ({datetime.now()})', flush=True)

    # Attack and classify, batch by batch
    attacks, modes, num_draws, check = request
    kept, samples = kept_files(outputs.unfinished, of_weights, of_data, config, attacks, modes,
                               num_draws), {}
    results = evaluate(model, data, config, attacks, modes, num_draws, kept, samples, check)

    # Print and write
    print_table(results, modes)
    origin = {'checkpoint': filename, 'step': step, 'checkpoint_digest': of_weights[:16],
              'data': of_data[:16]}
    outputs.write(config, origin, results, samples, data, kept.values())


def plan_of(model_dir):
    """Returns (num_checkpoint_steps, max_num_training_steps) as a training stored them, or Nones.

    No other key is looked at: the training may be of another version of this project.
    """
    try:
        config = read_json(os.path.join(model_dir, 'config.json'))
    except UserError:  # none yet
        config = {}
    values = [(key, config.get(key)) for key in ('num_checkpoint_steps', 'max_num_training_steps')]
    return [value if SCHEMA[key].check(value) else None for key, value in values]


# ---- the evaluation


def evaluate(model, data, config, attacks, modes, num_draws=1, kept=None, samples=None,
             check=False):
    """Returns a list of results: the worst cases, then one for each attack and inference mode.

    A direct attack goes through the inference that judges it: it is made anew for each mode. All
    others are made once, and judged by all. Each result says in `flags` what makes it doubtful, see
    doubts.py.

    Args:
        model: a model.Model. data: a CIFAR10Data. config: the configuration.
        attacks, modes: keys of ATTACKS, and names in INFERENCE_MODES.
        num_draws: see evaluate_attack. kept: what kept_files returns, or None.
        samples: a dict that gets, under each attack's label, the first adversarial examples, what
            each judge answers, under the first draw, and with which probability: (float32 [k, 32,
            32, 3], {judge: labels [k]}, {judge: float [k]}).
        check: run the direct attacks by gradients again, on the first batch, with more steps,
            restarts and draws.

    Raises:
        UserError: no attack can go through the inference modes.
        RuntimeError: an adversarial batch left its ball or [0, 255]: a defect, nothing is counted.
    """
    judges = make_judges(model, data, config, modes)
    rounds, skipped = [], []  # all are made before the first is run: fail now
    for label, name, judging in rounds_of(attacks, modes):
        chosen = {judge: judges[judge] for judge in judges if judge[0] in judging}
        through = next(iter(chosen.values())) if name in DIRECT else None
        try:
            attack = make_attack(name, model, data, config, num_draws, through)
        except Unfit as error:
            skipped.append(f'{label} is skipped: {error}')
            continue
        rounds.append((label, name, attack, chosen))
    if not rounds:
        raise UserError(skipped[0])
    for line in skipped:
        print(line, file=sys.stderr, flush=True)

    results, judged = [], {judge: {} for judge in judges}
    for label, name, attack, chosen in rounds:
        of_attack, found = evaluate_attack(name, attack, data, config, chosen, num_draws,
                                           kept and kept[label], label)
        results += of_attack
        for judge in chosen:
            judged[judge][name] = Judged(found.right[judge], found.in_ball, attack[1])
        if samples is not None:
            samples[label] = found.examples, found.answers, found.sure

    for mode in modes:
        judge = next(judge for judge in judges if judge[0] == mode)
        right = {name: of_attack.right | ~of_attack.in_ball
                 for name, of_attack in judged[judge].items()}
        add_flags([r for r in results if r['inference'] == mode], model, data, config, judge,
                  judges[judge], right, num_draws, check)
    worst = worst_cases(judged, config)
    return [row | doubts.of_worst(row, results) for row in worst] + results


def add_flags(results, model, data, config, judge, inference, right, num_draws, check):
    """Adds to the results of one inference mode what makes them doubtful, see doubts.py.

    Args:
        judge: (mode, inference shaping ratio or None). inference: what it is.
        right: {attack: bool [draws, n]}, see doubts.flags_of. check: see evaluate.
    """
    images, labels = eval_examples(data, config)
    transferred = [r['attack'] for r in results if doubts.is_transferred(r['attack'], r, judge[0])]
    first = slice(0, config['eval_batch_size'])
    probe = doubts.Probe(inference, images[first], labels[first])
    for result in results:
        name = result['attack']
        seen = doubts.flags_of(result, probe, right, transferred)
        if check and name in doubts.BY_GRADIENTS and doubts.is_direct(name, result, judge[0]):
            seen |= check_attack(name, model, data, config, judge, inference, right[name],
                                 num_draws)
        result |= doubts.flagged(seen)


def check_attack(name, model, data, config, judge, inference, right, num_draws):
    """Returns {flag: whether it is seen} of those for which a direct attack is run again.

    It is run on the first batch.

    Args:
        judge: (mode, inference shaping ratio or None). inference: what it is.
        right: bool [draws, n], which examples of the attack are right.
    """
    n = min(config['eval_batch_size'], right.shape[1])
    few, right = {**config, 'num_eval_examples': n}, right[:, :n]

    def again(changed):
        return run_direct(name, model, data, {**few, **changed}, judge, inference, num_draws)

    seen = {flag: doubts.fewer(again(changed), right)
            for flag, changed in doubts.doubled(name, config, inference.is_random)}
    if name in doubts.LAST_ITERATE:
        seen['lost iterates'] = bool(np.any(lost_iterates(again, right, config)))
    return seen


def run_direct(name, model, data, config, judge, inference, num_draws=1):
    """Returns which examples of a direct attack are right, bool [draws, n]."""
    attack = make_attack(name, model, data, config, num_draws, inference)
    return evaluate_attack(name, attack, data, config, {judge: inference}, num_draws,
                           label=f'{name} through {judge[0]}, checked')[1].right[judge]


def lost_iterates(again, right, config):
    """Returns which images PGD had fooled at some step, but not at the last one, bool [n].

    Args:
        again: f(changed keys of the configuration) -> bool [draws, n], which are right then. The
            ends of shorter runs are the iterates of the whole one.
        right: bool [draws, n], after the whole run. Of several draws, the first counts.
    """
    fooled = np.zeros_like(right[0])
    for steps in range(1, config['num_steps']):
        fooled |= ~again({'num_steps': steps})[0]
    return fooled & right[0]


def rounds_of(attacks, modes):
    """Yields (label, attack, modes that judge it): a direct attack has a round for each mode."""
    for name in attacks:
        if name in DIRECT:
            for mode in modes:
                yield f'{name} through {mode}', name, [mode]
        else:
            yield name, name, modes


def make_judges(model, data, config, modes, ratios=None):
    """Returns {(mode, inference shaping ratio or None): f(images, query) -> logits}.

    Args:
        ratios: those of bn_shaping, one judge for each. Default: the configuration's alone.
    """
    judges = {}
    for mode in modes:
        if mode != 'bn_shaping':
            judges[mode, None] = make_inference(model, mode, data, config)
            continue
        for ratio in ratios or [config['inference_shaping_ratio']]:
            judges[mode, ratio] = make_inference(
                model, mode, data, {**config, 'inference_shaping_ratio': ratio})
    return judges


def evaluate_attack(name, attack, data, config, judges, num_draws=1, kept=None, label=None,
                    shard=None):
    """Makes one attack's examples, once, and has each judge classify them.

    Every batch is verified to lie in its ball and in [0, 255] before it is counted. What an
    inference draws is the same for each attack (drawn by the batch's number), so that the attacks
    are compared on equal terms. (Under `bn`, one on fewer images may have a smaller last batch.)

    Args:
        name, attack: an attack's name and what make_attack returned for it.
        judges: as make_judges returns them.
        num_draws: under how many independent draws an inference that draws classifies each
            example. Its accuracy is then the mean over the draws.
        kept: path of a file for this attack alone, in which each batch that is finished is kept; if
            it is there, the attack resumes after the last one. The file's name must say what the
            results depend on (unfinished.path_of). None: nothing is kept.
        label: the name that the progress shows. Default: the attack's.
        shard: (first, last) examples of whole batches: these alone are done, for `kept`, and what
            is returned is of no use; see unfinished.batches.

    Returns:
        (a list of results, one a judge; the Found behind them)
    """
    images, labels = eval_examples(data, config)
    batch_size, n = config['eval_batch_size'], num_examples(name, config)
    perturb, settings = attack
    label = label or name
    found = Found(judges, n, batch_size, num_draws)
    for start, end in batches(kept, found.arrays(), n, batch_size, label, shard):
        x_nat, y = images[start:end].astype(np.float32), labels[start:end]
        begin = timer()
        x_adv = finite(perturb(start, end), f'pixels by {name}').astype(np.float32, copy=False)
        found.seconds += timer() - begin
        fault = perturbation_fault(x_nat, x_adv, settings['epsilon'])
        if fault:
            raise RuntimeError(f'{label}, samples {start} to {end - 1}: {fault}')
        found.measure(start, x_nat, x_adv, config['epsilon'])
        found.num_queries[start:end] = getattr(perturb, 'num_queries', 0)
        for judge, classify in judges.items():
            found.judge(judge, classify, start, start // batch_size, x_adv, y)
    return found.results(name, settings, config), found


class Found:
    """What the examples of one attack show, in arrays that `batches` fills again on a resume.

    `right`, {judge: bool [draws, n]}: which are right. `in_ball`, bool [n]: which lie within
    epsilon of their image.

    Args:
        judges: as make_judges returns them. n: how many examples there are.
        batch_size, num_draws: see evaluate_attack.
    """

    def __init__(self, judges, n, batch_size, num_draws):
        k = min(NUM_SAMPLES, n)
        self.right = {judge: np.zeros([num_draws if judge[0] in FORMS else 1, n], bool)
                      for judge in judges}
        self.xent = {judge: np.zeros(-(-n // batch_size)) for judge in judges}  # a sum a batch
        self.in_ball, self.l2, self.num_queries = np.zeros(n, bool), np.zeros(n), np.zeros(n)
        self.seconds = np.zeros([])
        self.examples = np.zeros([k, 32, 32, 3], np.float32)          # the first k, and under the
        self.answers = {judge: np.zeros(k, int) for judge in judges}  # first draw what is answered,
        self.sure = {judge: np.zeros(k) for judge in judges}          # with which probability

    def arrays(self):
        return [*self.right.values(), *self.xent.values(), self.in_ball, self.l2,
                self.num_queries, self.seconds, self.examples, *self.answers.values(),
                *self.sure.values()]

    def measure(self, start, x_nat, x_adv, epsilon):
        """Measures the perturbations of the examples x_adv [b, 32, 32, 3], from `start` on."""
        end, change = start + len(x_adv), np.abs(x_adv - x_nat).reshape(len(x_adv), -1)
        self.in_ball[start:end] = change.max(axis=1) <= epsilon + 1e-4
        self.l2[start:end] = np.linalg.norm(change / 255, axis=1)
        keep_first(self.examples, start, x_adv)

    def judge(self, judge, classify, start, batch, x_adv, y):
        """Has a judge, f(images, query) -> logits, classify the examples from `start` on."""
        right = self.right[judge]
        for draw, query in enumerate(queries_of(batch, len(right))):
            logits = finite(classify(x_adv, query), f'logits under {judge[0]}')
            predicted = np.argmax(logits, 1)
            right[draw, start:start + len(y)] = predicted == y
            self.xent[judge][batch] += float(tf.reduce_sum(
                tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)))
            if draw == 0:
                keep_first(self.answers[judge], start, predicted)
                keep_first(self.sure[judge], start, tf.reduce_max(tf.nn.softmax(logits), axis=1))

    def results(self, name, settings, config):
        """Returns a list of results, one a judge, of the attack's name and settings."""
        settings = {**settings, 'seconds': round(float(self.seconds), 3)}
        if name in MINIMUM_NORM:
            fooled = self.l2[self.l2 > 0]
            settings |= {'num_fooled': len(fooled),
                         'median_l2': float(np.median(fooled)) if len(fooled) else None}
        if self.num_queries.any():
            settings['queries'] = round(float(self.num_queries.mean()))
        return [cell(name, judge, right, config, {
            'xent': float(self.xent[judge].sum()) / right.size, **settings})
            for judge, right in self.right.items()]


def keep_first(kept, start, values):
    """Puts into kept [k] those of the values, from `start` on, that are among the first k."""
    kept[start:start + len(values)] = values[:max(0, len(kept) - start)]


def kept_files(folder, of_weights, of_data, config, attacks, modes, num_draws=1):
    """Returns {label: path in folder} of where `evaluate` is to keep its finished batches.

    The labels are those of rounds_of.

    Args:
        of_weights, of_data: unfinished.checkpoint_digest and data_digest.
        config, attacks, modes, num_draws: as `evaluate` will get them.
    """
    of_all = [of_weights, of_data, num_draws]
    return {label: path_of(folder, label.replace(' ', '_'), [
        *of_all, list(judging), name, num_examples(name, config), relevant(config, name),
        *other_weights(name, config)])
        for label, name, judging in rounds_of(attacks, modes)}


class Judged(NamedTuple):
    """An attack's examples, as one inference mode judges them."""
    right: np.ndarray    # bool [draws, n]
    in_ball: np.ndarray  # bool [n], within epsilon of their image
    settings: dict       # what make_attack says of them


def worst_cases(judged, config):
    """Returns the results of the worst cases: which test samples survive several attacks.

    First over the attacks that were run on all images, and of these over the direct ones and over
    the transferred ones, where of both some stay within epsilon; then over all attacks, on the
    images that all were run on. Under each judge over the attacks that it judged; `clean` alone
    makes no row. "In ball": only the examples within epsilon count, so not FGSM's at 16 nor what
    C&W and DeepFool find farther off. None where there is a single attack.

    Args:
        judged: {judge: {attack: Judged}}.
    """
    sizes = {name: len(of_attack.in_ball) for of_judge in judged.values()
             for name, of_attack in of_judge.items()}
    if len(sizes) < 2:
        return []
    results = [result for judge, of_judge in judged.items() for result in worst_under(
        judge, of_judge, max(sizes.values()), min(sizes.values()), config)]
    return sorted(results, key=lambda result: WORST.index(result['attack']))


def worst_under(judge, judged, most, fewest, config):
    """Yields the results of the worst cases under one judge, see worst_cases.

    Args:
        judged: {attack: Judged}. most, fewest: on how many images the attacks were run.
    """
    on_all = [name for name in judged if len(judged[name].in_ball) == most]
    direct = [name for name in on_all if doubts.is_direct(name, judged[name].settings, judge[0])]
    transferred = [name for name in on_all
                   if doubts.is_transferred(name, judged[name].settings, judge[0])]
    rows = [(WORST_IN_BALL, on_all, most), (WORST_CASE, [*judged], fewest)]
    # `clean` is neither, and in both: what is wrong stays wrong
    if any_within(direct, judged, config) and any_within(transferred, judged, config):
        rows += [(WORST_DIRECT, [name for name in on_all if name not in transferred], most),
                 (WORST_TRANSFERRED, [name for name in on_all if name not in direct], most)]
    if fewest < most:
        rows.append((WORST_OF_SLOW, [*judged], fewest))
    for worst, names, n in rows:
        if not set(names) - {'clean'}:
            continue
        ball = {} if worst == WORST_CASE else {'epsilon': config['epsilon']}
        survive = [judged[name].right[:, :n] | (bool(ball) & ~judged[name].in_ball[:n])
                   for name in names]
        settings = {name: {key: value for key, value in judged[name].settings.items()
                           if key != 'library'} for name in names}
        yield cell(worst, judge, np.all(survive, axis=0), config,
                   {'attacks': names, **ball, 'attack_settings': settings})


def any_within(names, judged, config):
    """Returns whether one of the attacks stays within epsilon with all of its examples."""
    return any(doubts.within(judged[name].settings, config['epsilon']) for name in names)


def cell(name, judge, right, config, settings):
    """Returns the result of one attack under one inference mode.

    Args:
        judge: (mode, inference shaping ratio or None). right: bool [draws, n].
        settings: what else the result says.
    """
    (draws, n), (mode, ratio) = right.shape, judge
    accuracies = right.mean(axis=1)
    result = {'attack': name, 'inference': mode, 'accuracy': float(accuracies.mean()),
              'interval': [*wilson_interval(float(accuracies.mean()) * n, n)], 'num_examples': n,
              'right': [as_digits(of_draw) for of_draw in right], **settings,
              'eval_batch_size': config['eval_batch_size'],
              **form_of(mode, config), 'number_forward_passes': (ratio or 0) + 1}
    if ratio is not None:
        result['inference_shaping_ratio'] = ratio
    if draws > 1:
        in_all = int(right.all(axis=0).sum())
        result |= {'num_draws': draws, 'spread': float(accuracies.std(ddof=1)),
                   'range': [float(accuracies.min()), float(accuracies.max())],
                   'accuracy_all_draws': in_all / n,
                   'interval_all_draws': [*wilson_interval(in_all, n)]}
    return result


def as_digits(flags):
    """Returns bool [n] as text, a digit each, as results keep which samples survived."""
    return ''.join(map(str, flags.astype(int)))


def wilson_interval(num_correct, n):
    """Returns the 95% Wilson score interval (low, high) of a share of num_correct in n."""
    share, z = num_correct / n, 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0., centre - half), min(1., centre + half)


# ---- the command line


def request_from_flags(config):
    """Returns the Request of the command line. Raises UserError: flags that cannot work together.

    A flag that would have no effect is refused, or told on stderr.
    """
    num_draws = flags.FLAGS.num_draws
    attacks = attacks_of(flags.FLAGS.attack, config, num_draws)
    modes = choice('inference', flags.FLAGS.inference, INFERENCE_MODES)
    if not 1 <= num_draws <= 1000:
        raise UserError(f'--num_draws must be an integer, 1 to 1000, got {num_draws}')
    if flags.FLAGS['num_draws'].present and not set(FORMS) & set(modes):
        raise UserError(f'--num_draws is {num_draws}, but --inference {",".join(modes)} draws '
                        f'nothing; expected {" or ".join(FORMS)} among --inference')
    if flags.FLAGS.watch and (flags.FLAGS.checkpoint or flags.FLAGS.select == 'best'):
        raise UserError('--watch waits for new checkpoints, --checkpoint and --select best name '
                        'one; expected one of them')
    if flags.FLAGS.check and not any(
            name in doubts.BY_GRADIENTS and (name in DIRECT or 'pn' in modes) for name in attacks):
        raise UserError(f'--check runs direct attacks by gradients again, and --attack '
                        f'{",".join(attacks)} --inference {",".join(modes)} has none; expected '
                        'adaptive, say, or pgd under pn')
    check_names(config)
    for key in [parse_setting(setting)[0] for setting in flags.FLAGS.set]:
        if SCHEMA[key].attacks and not set(SCHEMA[key].attacks) & set(attacks):
            print(f'--set {key} has no effect: it is of the attack '
                  f'{" and ".join(SCHEMA[key].attacks)}', file=sys.stderr, flush=True)
    return Request(attacks, modes, num_draws, flags.FLAGS.check)


def attacks_of(value, config, num_draws=1):
    """Returns the attacks that --attack names: all leaves out what lacks a model, or draws."""
    attacks = choice('attack', value, ATTACKS)
    if 'transfer' in attacks and 'transfer' not in value and not config['transfer_from']:
        attacks.remove('transfer')
        print('transfer is left out: transfer_from names no other model', flush=True)
    if 'retry' in attacks and 'retry' not in value and num_draws < 2:
        attacks.remove('retry')
        print('retry is left out: it needs --num_draws 2 or more', flush=True)
    return attacks


def compare(paths):
    """Prints stored results side by side. Raises UserError: an option of evaluations is given."""
    for name in ('model_dir', 'checkpoint', 'select', 'config', 'set', 'attack', 'inference',
                 'num_draws', 'check', 'watch', 'output', 'pictures', 'download'):
        if flags.FLAGS[name].present:
            raise UserError(f'--compare reads stored results and evaluates nothing; expected it '
                            f'without --{name}')
    print_comparison(paths)


if __name__ == '__main__':
    run(main, ANY)

"""Evaluates a checkpoint: each attack's examples, classified under each inference mode.

    python eval.py --inference bn_shaping               # the newest checkpoint in model_dir
    python eval.py --model_dir DIR --attack all         # with the configuration stored in DIR
    python eval.py --num_draws 10                       # bn_shaping under ten draws
    python eval.py --checkpoint models/secret/checkpoint-70000 --inference pn
    python eval.py --watch                              # each new checkpoint as it comes

Prints a table and writes MODEL_DIR/eval/results.json, which holds this run's numbers alone, and
TensorBoard summaries beside it. Stopped and started again with the same command, it resumes after
the last finished batch; until results.json is written, such batches are kept in
MODEL_DIR/eval/unfinished, which may be removed at any time.
"""
from datetime import datetime
import json
import os
import time
from timeit import default_timer as timer

from absl import flags
import numpy as np

from config import config_from_flags, define_model_flags, relevant
import tensorflow as tf

from attacks import ATTACKS, MINIMUM_NORM, check_names, make_attack, num_examples
from cifar10_input import eval_examples, load_data
from model import build_model, checkpoints, find_checkpoint, newest_intact
from pgd_attack import perturbation_fault
from running import UserError
from running.files import replacing
from running.program import run
from running.unfinished import batches, checkpoint_digest, data_digest, path_of, remove
from shaping import INFERENCE_MODES, make_inference, queries_of

WORST_CASE = 'worst case'
WORST_IN_BALL = 'worst in ball'


def main():
    # What is evaluated
    config = config_from_flags()
    attacks = choice('attack', flags.FLAGS.attack, ATTACKS)
    modes = choice('inference', flags.FLAGS.inference, INFERENCE_MODES)
    num_draws = flags.FLAGS.num_draws
    if not 1 <= num_draws <= 1000:
        raise UserError(f'--num_draws must be an integer, 1 to 1000, got {num_draws}')
    if flags.FLAGS.watch and flags.FLAGS.checkpoint:
        raise UserError('--watch waits for new checkpoints, --checkpoint names one; expected one '
                        'of them')
    check_names(config)
    if config['eval_on_cpu']:
        tf.config.set_visible_devices([], 'GPU')

    # The data and the model
    data = load_data(config)
    eval_examples(data, config)
    model = build_model(config, data.num_classes)
    if not flags.FLAGS.watch:
        checkpoint = find_checkpoint(config, flags.FLAGS.checkpoint)

    # The TensorBoard outputs
    eval_dir = os.path.join(config['model_dir'], 'eval')
    os.makedirs(eval_dir, exist_ok=True)
    summary_writer = tf.summary.create_file_writer(eval_dir)

    def evaluate_one(filename):
        evaluate_checkpoint(filename, model, data, config, attacks, modes, num_draws,
                            summary_writer, eval_dir)

    if flags.FLAGS.watch:
        watch(config['model_dir'], evaluate_one)
    else:
        evaluate_one(checkpoint)


def evaluate_checkpoint(filename, model, data, config, attacks, modes, num_draws, summary_writer,
                        eval_dir):
    """Evaluates a single checkpoint: prints its table, writes results.json and summaries."""
    # Restore the checkpoint
    step = model.load_madry_checkpoint(filename)
    print(f'Checkpoint {filename}, step {step}   ({datetime.now()})', flush=True)

    # Attack and classify, batch by batch
    kept = kept_files(os.path.join(eval_dir, 'unfinished'), filename, data_digest(data), config,
                      attacks, modes, num_draws)
    results = evaluate(model, data, config, attacks, modes, num_draws, kept)

    # Print and write
    print_table(results, modes)
    path = os.path.join(eval_dir, 'results.json')
    write_results(path, filename, step, config, results)
    remove(kept.values())
    with summary_writer.as_default():
        write_summaries(results, step)
    summary_writer.flush()
    print(f'Written to {path}', flush=True)


def watch(model_dir, evaluate_one):
    """Evaluates each new checkpoint as it comes, for ever, as the original does."""
    last, seen = None, []
    print('Waiting for a checkpoint', end='', flush=True)
    while True:
        there = checkpoints(model_dir)
        checkpoint = newest_intact(model_dir) if there != seen else last
        seen = there
        if checkpoint and checkpoint != last:
            print()
            evaluate_one(checkpoint)
            last = checkpoint
            print('Waiting for the next checkpoint', end='', flush=True)
        else:
            print('.', end='', flush=True)
        time.sleep(10)


# ---- the evaluation


def evaluate(model, data, config, attacks, modes, num_draws=1, kept=None):
    """Returns a list of results, one for each attack and inference mode, then the worst cases.

    Args:
        model: a model.Model. data: a CIFAR10Data. config: the configuration.
        attacks, modes: keys of ATTACKS, and names in INFERENCE_MODES.
        num_draws: see evaluate_attack. kept: {attack: path of a file} for evaluate_attack, or None.

    Raises:
        RuntimeError: an adversarial batch left its ball or [0, 255]: a defect, nothing is counted.
    """
    judges = make_judges(model, data, config, modes)
    made = {name: make_attack(name, model, data, config, num_draws) for name in attacks}
    results, right, in_ball = [], {}, {}
    for name, attack in made.items():
        of_attack, right[name], in_ball[name] = evaluate_attack(
            name, attack, data, config, judges, num_draws, kept and kept[name])
        results += of_attack
    return results + worst_cases(right, in_ball, config)


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


def evaluate_attack(name, attack, data, config, judges, num_draws=1, kept=None):
    """Makes one attack's examples, once, and has each judge classify them.

    Every batch is verified to lie in its ball and in [0, 255] before it is counted. The clean
    samples of bn_shaping are the same for each attack (drawn by the batch's number), so that the
    attacks are compared on equal terms.

    Args:
        name, attack: an attack's name and what make_attack returned for it.
        judges: as make_judges returns them.
        num_draws: under how many independent draws of clean samples bn_shaping classifies each
            example. Its accuracy is then the mean over the draws.
        kept: path of a file for this attack alone, in which each batch that is finished is kept; if
            it is there, the attack resumes after the last one. The file's name must say what the
            results depend on (unfinished.path_of). None: nothing is kept.

    Returns:
        (a list of results, one a judge; {judge: bool [draws, n], which were right}; bool [n], which
        examples lie within epsilon of their image)
    """
    images, labels = eval_examples(data, config)
    batch_size, n = config['eval_batch_size'], num_examples(name, config)
    perturb, settings = attack
    queries = {judge: num_draws if judge[0] == 'bn_shaping' else 1 for judge in judges}
    right = {judge: np.zeros([draws, n], bool) for judge, draws in queries.items()}
    xent, in_ball, l2 = {judge: np.zeros([]) for judge in judges}, np.zeros(n, bool), np.zeros(n)
    seconds = np.zeros([])
    found = [*right.values(), *xent.values(), in_ball, l2, seconds]
    for start, end in batches(kept, found, n, batch_size, name):
        x_nat, y = images[start:end].astype(np.float32), labels[start:end]
        begin = timer()
        x_adv = np.asarray(perturb(start, end), np.float32)
        seconds += timer() - begin
        fault = perturbation_fault(x_nat, x_adv, settings['epsilon'])
        if fault:
            raise RuntimeError(f'{name}, samples {start} to {end - 1}: {fault}')
        change = np.abs(x_adv - x_nat).reshape(end - start, -1)
        in_ball[start:end] = change.max(axis=1) <= config['epsilon'] + 1e-4
        l2[start:end] = np.linalg.norm(change / 255, axis=1)
        for judge, classify in judges.items():
            for draw, query in enumerate(queries_of(start // batch_size, queries[judge])):
                logits = classify(x_adv, query)
                right[judge][draw, start:end] = np.argmax(logits, 1) == y
                xent[judge] += float(tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(
                    y, logits))) / (queries[judge] * n)
    settings = {**settings, 'seconds': round(float(seconds), 3)}
    if name in MINIMUM_NORM:
        fooled = l2[l2 > 0]
        settings |= {'num_fooled': len(fooled),
                     'median_l2': float(np.median(fooled)) if len(fooled) else None}
    results = [cell(name, judge, right[judge], config, {'xent': float(xent[judge]), **settings})
               for judge in judges]
    return results, right, in_ball


def kept_files(folder, checkpoint, of_data, config, attacks, modes, num_draws=1):
    """Returns {attack: path in folder} of where `evaluate` is to keep its finished batches.

    Args:
        checkpoint: its prefix. of_data: unfinished.data_digest of the data.
        config, attacks, modes, num_draws: as `evaluate` will get them.
    """
    of_all = [checkpoint_digest(checkpoint), of_data, list(modes), num_draws]
    return {name: path_of(folder, name, [*of_all, name, num_examples(name, config),
                                         relevant(config, name)]) for name in attacks}


def worst_cases(right, in_ball, config):
    """Returns the results of the worst cases, none where there is a single attack.

    They are over the examples that all attacks were run on. 'worst case' counts the test samples
    that survive every attack that was run; 'worst in ball' lets only those examples count that lie
    within epsilon, so not FGSM's at 16 nor what C&W and DeepFool find farther off.

    Args:
        right, in_ball: {attack: what evaluate_attack returned}.
    """
    if len(right) < 2:
        return []
    n = min(len(v) for v in in_ball.values())
    results = []
    for name in (WORST_CASE, WORST_IN_BALL):
        settings = {'attacks': list(right)}
        if name == WORST_IN_BALL:
            settings['epsilon'] = config['epsilon']
        for judge in next(iter(right.values())):
            survive = [right[a][judge][:, :n] | (False if name == WORST_CASE else ~in_ball[a][:n])
                       for a in right]
            results.append(cell(name, judge, np.all(survive, axis=0), config, settings))
    return results


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
              **settings, 'eval_batch_size': min(config['eval_batch_size'], n)}
    if mode == 'bn_shaping':
        result |= {'inference_shaping_ratio': ratio,
                   'shaping_batch_size': config['shaping_batch_size']}
    if draws > 1:
        in_all = int(right.all(axis=0).sum())
        result |= {'num_draws': draws, 'spread': float(accuracies.std(ddof=1)),
                   'range': [float(accuracies.min()), float(accuracies.max())],
                   'accuracy_all_draws': in_all / n,
                   'interval_all_draws': [*wilson_interval(in_all, n)]}
    return result


def wilson_interval(num_correct, n, z=1.959964):
    """Returns the 95% Wilson score interval (low, high) of a share of num_correct in n."""
    share = num_correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0., centre - half), min(1., centre + half)


# ---- what is printed and written


def print_table(results, modes):
    """Prints accuracies in percent with their 95% Wilson intervals: attacks down, modes across."""
    most = max(r['num_examples'] for r in results)
    print(f'Accuracy in %, [95% Wilson interval], n = {most}')
    print(f'{"attack":<22}' + ''.join(f'{mode:>22}' for mode in modes))
    cells = {(r['attack'], r['inference']): r for r in results}
    notes = []
    for attack in dict.fromkeys(r['attack'] for r in results):
        r = cells[attack, modes[0]]
        row = attack + (f' (n = {r["num_examples"]})' if r['num_examples'] < most else '')
        row = f'{row:<22}'
        for mode in modes:
            accuracy, (low, high) = (cells[attack, mode][key] for key in ('accuracy', 'interval'))
            row += f'{100 * accuracy:>8.2f} [{100 * low:5.2f}, {100 * high:5.2f}]'
        print(row, flush=True)
        if r.get('median_l2') is not None:
            notes.append(f'{attack}: median L2 of the {r["num_fooled"]} perturbations that fool '
                         f'population norms {r["median_l2"]:.4f}, pixels in [0, 1]')
    draws = [r for r in results if 'num_draws' in r]
    if draws:
        print(f'bn_shaping under {draws[0]["num_draws"]} draws of clean samples: mean, standard '
              'deviation between draws, [least, greatest], right under all')
        for r in draws:
            low, high = r['range']
            print(f'{r["attack"]:<22}{100 * r["accuracy"]:>8.2f} {100 * r["spread"]:6.2f} '
                  f'[{100 * low:5.2f}, {100 * high:5.2f}] {100 * r["accuracy_all_draws"]:8.2f}')
    for note in notes:
        print(note)


def write_results(path, checkpoint, step, config, results):
    """Writes results.json, replacing the file at once."""
    with replacing(path) as f:
        json.dump({'checkpoint': checkpoint, 'step': step, 'config': config, 'results': results},
                  f, indent=1)


def write_summaries(results, step):
    """Writes TensorBoard scalars: each cell, and under the original's tags PN's clean and PGD's."""
    for r in results:
        tf.summary.scalar(f'accuracy {r["attack"]} {r["inference"]}', r['accuracy'], step)
        if 'xent' in r:
            tf.summary.scalar(f'xent {r["attack"]} {r["inference"]}', r['xent'], step)
        if r['inference'] == 'pn' and r['attack'] in ('clean', 'pgd'):
            for tag in ('{} nat',) if r['attack'] == 'clean' else ('{} adv', '{} adv eval'):
                tf.summary.scalar(tag.format('accuracy'), r['accuracy'], step)
                tf.summary.scalar(tag.format('xent'), r['xent'], step)


def choice(flag, value, known):
    """Returns the names in a comma-separated flag, 'all' being all of them, in the order known."""
    names = [name.strip() for name in value.split(',')]
    for name in names:
        if name != 'all' and name not in known:
            raise UserError(f'--{flag} is {name!r}; expected {", ".join(known)} or all')
    return [name for name in known if name in names or 'all' in names]


if __name__ == '__main__':
    define_model_flags()
    flags.DEFINE_string('inference', 'all',
                        f'Comma-separated: {", ".join(INFERENCE_MODES)}, or all.')
    flags.DEFINE_string('attack', 'clean,pgd', f'Comma-separated: {", ".join(ATTACKS)}, or all.')
    flags.DEFINE_integer('num_draws', 1, 'Independent draws of clean samples under which '
                         'bn_shaping classifies each example; the mean, the spread and the share '
                         'right under all of them are reported.')
    flags.DEFINE_boolean('watch', False, 'Evaluate each new checkpoint as it comes.')
    run(main)

"""Evaluates a checkpoint: each attack's examples, classified under each inference mode.

    python eval.py --inference bn_shaping               # the newest checkpoint in model_dir
    python eval.py --model_dir DIR --attack all         # with the configuration stored in DIR
    python eval.py --checkpoint models/secret/checkpoint-70000 --inference pn
    python eval.py --watch                              # each new checkpoint as it comes

Prints a table and writes MODEL_DIR/eval/results.json, which holds this run's figures alone, and
TensorBoard summaries beside it.
"""
from datetime import datetime
import json
import os
import sys
import time

from absl import flags
import numpy as np

from config import UserError, config_from_flags, define_model_flags, run
import tensorflow as tf
from tqdm import tqdm

from attacks import ATTACKS, make_attack, perturbation_fault
from cifar10_input import eval_examples, load_data
from model import build_model, find_checkpoint
from shaping import INFERENCE_MODES, make_inference


def wilson_interval(num_correct, n, z=1.959964):
    """Returns the 95% Wilson score interval (low, high) of a share of num_correct in n."""
    share = num_correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0., centre - half), min(1., centre + half)


def evaluate(model, data, config, attacks, modes):
    """Returns a list of results, one for each attack and inference mode.

    Every batch of adversarial examples is made once, is verified to lie in its ball and in
    [0, 255], and is then classified under each mode. The clean samples of bn_shaping are the same
    for each attack (drawn by the batch's number), so that the attacks are compared on equal terms.

    Raises:
        RuntimeError: an adversarial batch left its ball or [0, 255]: a defect, nothing is counted.
    """
    images, labels = eval_examples(data, config)
    n, batch_size = len(images), config['eval_batch_size']
    classify = {mode: make_inference(model, mode, data, config) for mode in modes}
    made = {name: make_attack(name, model, images, labels, config) for name in attacks}
    results = []
    for name, (attack, settings) in made.items():
        correct, xent = dict.fromkeys(modes, 0), dict.fromkeys(modes, 0.)
        for start in tqdm(range(0, n, batch_size), desc=name, unit='batch', leave=False,
                          disable=not sys.stderr.isatty()):
            end = min(start + batch_size, n)
            x_adv, y = attack(start, end), labels[start:end]
            fault = perturbation_fault(images[start:end], x_adv, settings['epsilon'])
            if fault:
                raise RuntimeError(f'{name}, samples {start} to {end - 1}: {fault}')
            for mode in modes:
                logits = classify[mode](x_adv, start // batch_size)
                correct[mode] += int(np.sum(np.argmax(logits, 1) == y))
                xent[mode] += float(tf.reduce_sum(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)))
        for mode in modes:
            shaping = {k: config[k] for k in ('inference_shaping_ratio', 'shaping_batch_size')}
            results.append({
                'attack': name, 'inference': mode, 'accuracy': correct[mode] / n,
                'interval': wilson_interval(correct[mode], n), 'num_examples': n,
                'xent': xent[mode] / n, **settings, 'eval_batch_size': batch_size,
                **(shaping if mode == 'bn_shaping' else {})})
    return results


def print_table(results, attacks, modes):
    """Prints accuracies in percent with their 95% Wilson intervals: attacks down, modes across."""
    n = results[0]['num_examples']
    print(f'Accuracy in %, [95% Wilson interval], n = {n}')
    print(f'{"attack":<10}' + ''.join(f'{mode:>22}' for mode in modes))
    cells = {(r['attack'], r['inference']): r for r in results}
    for attack in attacks:
        row = f'{attack:<10}'
        for mode in modes:
            accuracy, (low, high) = (cells[attack, mode][key] for key in ('accuracy', 'interval'))
            row += f'{100 * accuracy:>8.2f} [{100 * low:5.2f}, {100 * high:5.2f}]'
        print(row, flush=True)


def write_results(path, checkpoint, step, config, results):
    """Writes results.json, replacing the file at once."""
    with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
        json.dump({'checkpoint': checkpoint, 'step': step, 'config': config, 'results': results},
                  f, indent=1)
    os.replace(f'{path}.tmp', path)


def write_summaries(results, step):
    """Writes TensorBoard scalars: each cell, and under the original's tags PN's clean and PGD's."""
    for r in results:
        tf.summary.scalar(f'accuracy {r["attack"]} {r["inference"]}', r['accuracy'], step)
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
            raise UserError(f'--{flag} is {name!r}; {", ".join(known)} or all would fit')
    return [name for name in known if name in names or 'all' in names]


def main():
    config = config_from_flags()
    attacks = choice('attack', flags.FLAGS.attack, ATTACKS)
    modes = choice('inference', flags.FLAGS.inference, INFERENCE_MODES)
    if flags.FLAGS.watch and flags.FLAGS.checkpoint:
        raise UserError('--watch waits for new checkpoints, --checkpoint names one; one would fit')
    if config['eval_on_cpu']:
        tf.config.set_visible_devices([], 'GPU')

    # Set up the data, the model and the outputs
    data = load_data(config)
    eval_examples(data, config)
    model = build_model(config, data.num_classes)
    if not flags.FLAGS.watch:
        checkpoint = find_checkpoint(config, flags.FLAGS.checkpoint)
    eval_dir = os.path.join(config['model_dir'], 'eval')
    os.makedirs(eval_dir, exist_ok=True)
    summary_writer = tf.summary.create_file_writer(eval_dir)

    def evaluate_checkpoint(checkpoint):
        step = model.load_madry_checkpoint(checkpoint)
        print(f'Checkpoint {checkpoint}, step {step}   ({datetime.now()})', flush=True)
        results = evaluate(model, data, config, attacks, modes)
        print_table(results, attacks, modes)
        path = os.path.join(eval_dir, 'results.json')
        write_results(path, checkpoint, step, config, results)
        with summary_writer.as_default():
            write_summaries(results, step)
        summary_writer.flush()
        print(f'Written to {path}', flush=True)

    if not flags.FLAGS.watch:
        evaluate_checkpoint(checkpoint)
        return

    # Evaluate new checkpoints for ever, as the original does
    last = None
    print('Waiting for a checkpoint', end='', flush=True)
    while True:
        checkpoint = tf.train.latest_checkpoint(config['model_dir'])
        if checkpoint and checkpoint != last:
            print()
            evaluate_checkpoint(checkpoint)
            last = checkpoint
            print('Waiting for the next checkpoint', end='', flush=True)
        else:
            print('.', end='', flush=True)
        time.sleep(10)


if __name__ == '__main__':
    define_model_flags()
    flags.DEFINE_string('inference', 'all',
                        f'Comma-separated: {", ".join(INFERENCE_MODES)}, or all.')
    flags.DEFINE_string('attack', 'clean,pgd', f'Comma-separated: {", ".join(ATTACKS)}, or all.')
    flags.DEFINE_boolean('watch', False, 'Evaluate each new checkpoint as it comes.')
    run(main)

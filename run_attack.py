"""Evaluates a model against the examples in store_adv_path, a .npy file (the original's file).

    python run_attack.py --inference pn

Refuses a file that is not what it must be, prints the accuracy and saves the predicted labels to
pred.npy. .npy files are never unpickled, and nothing is allocated by what their header claims.
"""
from absl import flags
import numpy as np

from config import INFERENCE_MODES, begin, choice, config_from_flags, define_model_flags
from running.program import run

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    define_model_flags()
    flags.DEFINE_string('inference', 'pn', f'One of {", ".join(INFERENCE_MODES)}.')
    begin(__doc__, inference=INFERENCE_MODES)

import running.quiet  # noqa: F401

from cifar10_input import eval_examples, load_data
from eval import wilson_interval
from model import build_model, find_checkpoint
from pgd_attack import finite, perturbation_fault
from running import UserError, brief
from running.devices import leave_gpus
from running.files import replacing
from running.results import check_writable
from running.untrusted import map_array
from shaping import make_inference

PREDICTIONS = 'pred.npy'


def run_attack(checkpoint, x_adv, data, config, mode):
    """Classifies the examples under an inference mode; prints the accuracy, saves pred.npy.

    Args:
        checkpoint: its prefix. x_adv: [n, 32, 32, 3] of the first n evaluation images.
    """
    _, labels = eval_examples(data, config)
    model = build_model(config, data.num_classes)
    model.load_madry_checkpoint(checkpoint)
    classify = make_inference(model, mode, data, config)

    # Classify the examples, batch by batch
    eval_batch_size = config['eval_batch_size']
    y_pred = []  # label accumulator
    for ibatch, bstart in enumerate(range(0, len(x_adv), eval_batch_size)):
        logits = finite(classify(x_adv[bstart:bstart + eval_batch_size], ibatch),
                        f'logits under {mode}')
        y_pred.append(np.argmax(logits, axis=1))
    y_pred = np.concatenate(y_pred)

    num_correct = int(np.sum(y_pred == labels))
    low, high = wilson_interval(num_correct, len(labels))
    print(f'{checkpoint}, {mode}')
    print(f'Accuracy: {100 * num_correct / len(labels):.2f}% '
          f'[{100 * low:.2f}, {100 * high:.2f}], n = {len(labels)}')
    with replacing(PREDICTIONS, 'wb') as f:
        np.save(f, y_pred)
    print(f'Output saved at {PREDICTIONS}')


def load_examples(path, x_nat, epsilon):
    """Returns the adversarial examples in a .npy file, float32 [n, 32, 32, 3].

    Args:
        x_nat: the natural images that they belong to, in [0, 255]. epsilon: in pixels.

    Raises:
        UserError: the file cannot be read, or the shape, type, range or perturbation is wrong.
    """
    x_adv = map_array(path)
    if x_adv.dtype not in (np.uint8, np.float32, np.float64):
        raise UserError(f'{path} holds {brief(x_adv.dtype)}; expected float32, '
                        'float64 or uint8')
    if x_adv.shape != x_nat.shape:
        raise UserError(f'{path} has shape {list(x_adv.shape)}; expected '
                        f'{list(x_nat.shape)} (num_eval_examples images)')
    fault = perturbation_fault(x_nat, x_adv, epsilon)
    if fault:
        raise UserError(f'{path}: {fault}')
    return np.asarray(x_adv, np.float32)


def main():
    config = config_from_flags()
    mode, *more = choice('inference', flags.FLAGS.inference, INFERENCE_MODES)
    if more:
        raise UserError('--inference: expected one mode at a time, as pred.npy holds one answer')
    check_writable(PREDICTIONS, 'a working folder that can be written')
    leave_gpus(config)
    checkpoint = find_checkpoint(config, flags.FLAGS.checkpoint, flags.FLAGS.select)
    data = load_data(config, flags.FLAGS.download)
    x_nat, _ = eval_examples(data, config)
    x_adv = load_examples(config['store_adv_path'], x_nat, config['epsilon'])
    run_attack(checkpoint, x_adv, data, config, mode)


if __name__ == '__main__':
    run(main)

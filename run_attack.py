"""Evaluates a model against the examples in store_adv_path, a .npy file (the original's file).

    python run_attack.py --inference pn

Refuses a file that is not what it must be, prints the accuracy and saves the predicted labels to
pred.npy. .npy files are never unpickled, and nothing is allocated by what their header claims.
"""
import warnings

from absl import flags
import numpy as np

from config import UserError, brief, check_plain, config_from_flags, define_model_flags, run
import tensorflow as tf

from attacks import perturbation_fault
from cifar10_input import eval_examples, load_data
from eval import choice, wilson_interval
from files import replacing
from model import build_model, find_checkpoint
from shaping import INFERENCE_MODES, make_inference


MAX_HEADER = 10000  # bytes of a .npy file's header; NumPy's own limit, and its files have 128


def _map_array(path):
    """Returns the array in a .npy file, mapped into memory."""
    check_plain(path)  # of any size: what is mapped is not read
    try:
        with open(path, 'rb') as f:
            head = f.read(12)
        # NumPy makes room for all that the header claims, 4 GB, before it looks at its own limit
        if head[6:7] > b'\1' and int.from_bytes(head[8:], 'little') > MAX_HEADER:
            raise ValueError('its header is too long')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a header that is odd Python: lines of them
            return np.lib.format.open_memmap(path, mode='r')
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or brief(error)}') from None
    except Exception as error:  # a damaged header raises nearly anything
        raise UserError(f'{path} is not a .npy file of numbers: {brief(error)}') from None


def load_examples(path, x_nat, epsilon):
    """Returns the adversarial examples in a .npy file, float32 [n, 32, 32, 3].

    Args:
        x_nat: the natural images that they belong to, in [0, 255]. epsilon: in pixels.

    Raises:
        UserError: the file cannot be read, or the shape, type, range or perturbation is wrong.
    """
    x_adv = _map_array(path)
    if x_adv.dtype not in (np.uint8, np.float32, np.float64):
        raise UserError(f'{path} holds {brief(x_adv.dtype)}; float32, float64 or uint8 would fit')
    if x_adv.shape != x_nat.shape:
        raise UserError(f'{path} has shape {list(x_adv.shape)}; {list(x_nat.shape)} would fit '
                        '(num_eval_examples images)')
    fault = perturbation_fault(x_nat, x_adv, epsilon)
    if fault:
        raise UserError(f'{path}: {fault}')
    return np.asarray(x_adv, np.float32)


def main():
    config = config_from_flags()
    mode, *more = choice('inference', flags.FLAGS.inference, INFERENCE_MODES)
    if more:
        raise UserError('--inference: one mode at a time would fit, as pred.npy holds one answer')
    if config['eval_on_cpu']:
        tf.config.set_visible_devices([], 'GPU')
    data = load_data(config)
    x_nat, y = eval_examples(data, config)
    x_adv = load_examples(config['store_adv_path'], x_nat, config['epsilon'])
    model = build_model(config, data.num_classes)
    checkpoint = find_checkpoint(config, flags.FLAGS.checkpoint)
    model.load_madry_checkpoint(checkpoint)

    # Iterate over the samples batch by batch
    classify = make_inference(model, mode, data, config)
    batch_size = config['eval_batch_size']
    y_pred = np.concatenate([
        np.argmax(classify(x_adv[start:start + batch_size], start // batch_size), axis=1)
        for start in range(0, len(x_adv), batch_size)])

    num_correct = int(np.sum(y_pred == y))
    low, high = wilson_interval(num_correct, len(y))
    print(f'{checkpoint}, {mode}')
    print(f'Accuracy: {100 * num_correct / len(y):.2f}% '
          f'[{100 * low:.2f}, {100 * high:.2f}], n = {len(y)}')
    with replacing('pred.npy', 'wb') as f:
        np.save(f, y_pred)
    print('Output saved at pred.npy')


if __name__ == '__main__':
    define_model_flags()
    flags.DEFINE_string('inference', 'pn', f'One of {", ".join(INFERENCE_MODES)}.')
    run(main)

"""PN-attacked accuracy of a trained model: our PGD beside foolbox's, same samples and budget.

    python tests/second_opinion.py --model_dir models/three_classes --set num_eval_examples=1000

Both start at random points of the ball, so single samples differ; the accuracies should not.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags  # noqa: E402
import foolbox  # noqa: E402
import numpy as np  # noqa: E402

from config import config_from_flags, define_model_flags, run  # noqa: E402
import tensorflow as tf  # noqa: E402

from attacks import make_attack, perturbation_fault  # noqa: E402
from cifar10_input import eval_examples, load_data  # noqa: E402
from eval import wilson_interval  # noqa: E402
from model import build_model, find_checkpoint  # noqa: E402


def main():
    config = config_from_flags()
    data = load_data(config)
    images, labels = eval_examples(data, config)
    model = build_model(config, data.num_classes)
    model.load_madry_checkpoint(find_checkpoint(config, flags.FLAGS.checkpoint))
    classify = tf.function(lambda x: model(x, training=False))

    ours, settings = make_attack('pgd', model, data, config)
    library = foolbox.attacks.LinfPGD(abs_stepsize=settings['step_size'],
                                      steps=settings['num_steps'],
                                      random_start=settings['random_start'])
    fmodel = foolbox.TensorFlowModel(classify, bounds=(0, 255), device='/CPU:0')

    def theirs(start, end):
        x, y = tf.cast(images[start:end], tf.float32), tf.constant(labels[start:end])
        return library(fmodel, x, y, epsilons=settings['epsilon'])[1]

    for name, attack in (('ours', ours), ('foolbox', theirs)):
        correct = 0
        for start in range(0, len(images), config['eval_batch_size']):
            end = min(start + config['eval_batch_size'], len(images))
            x_adv = attack(start, end)
            fault = perturbation_fault(images[start:end], x_adv, settings['epsilon'])
            if fault:
                raise RuntimeError(f'{name}: {fault}')
            correct += int(np.sum(np.argmax(classify(x_adv), 1) == labels[start:end]))
        low, high = wilson_interval(correct, len(images))
        print(f'{name:<10}{100 * correct / len(images):6.2f}% [{100 * low:.2f}, {100 * high:.2f}], '
              f'n = {len(images)}', flush=True)


if __name__ == '__main__':
    define_model_flags()
    run(main)

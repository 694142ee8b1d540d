"""Draws docs/batches.png: what norm shaping puts into a batch, in training and at inference.

    python docs/draw_batches.py                    # some 15 seconds on two cores
    python docs/draw_batches.py --output FILE.png

The images are from the embedded set. The attacked ones are made by LinfPGDAttack, on the smallest
network after a short natural training. The second row shows what the attack added.
"""
import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'  # the same pixels everywhere, or nearly

import running.quiet  # noqa: E402, F401
from config import load_config  # noqa: E402
import keras  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from cifar10_input import load_data  # noqa: E402
from model import build_model  # noqa: E402
from pgd_attack import LinfPGDAttack  # noqa: E402
from shaping import num_clean, tail_mask  # noqa: E402
from train import make_optimizer, make_train_step  # noqa: E402

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402
from PIL import Image  # noqa: E402

TRAINING_STEPS = 40
BATCH_SIZE = 16       # m; 64 in the paper, at the same ratio
MAGNIFIED = 12        # how much larger the perturbation is drawn

CLEAN, ATTACKED, QUERY, INK = '#5b7083', '#d1495b', '#00798c', '#22303c'
IMAGE, GAP = 64, 8    # pixels: an image is drawn at twice its size
LEFT, WIDTH, HEIGHT = 24, 1192, 424


def trained_model(data, config):
    """Returns the network of a configuration after a short natural training."""
    config = {**config, 'training_mode': 'natural'}
    keras.utils.set_random_seed(config['tf_random_seed'])
    model = build_model(config, data.num_classes)
    train_step = make_train_step(model, make_optimizer(config), config)
    for step in range(TRAINING_STEPS):
        images, labels = data.train_data.get_batch(step, config['training_batch_size'])
        train_step(tf.constant(images), tf.constant(labels), tf.constant(step, tf.int64))
    return model


def training_batch(model, config, data):
    """Returns (x_nat, x) of a training batch before and after the attack on its tail, uint8."""
    x_nat, y = data.train_data.xs[:BATCH_SIZE], data.train_data.ys[:BATCH_SIZE]
    attack = LinfPGDAttack(model, config['epsilon'], config['num_steps'], config['step_size'],
                           config['random_start'], config['loss_func'])
    x = attack.perturb(x_nat, y, 0, tail_mask(BATCH_SIZE, config['shaping_ratio']))
    return x_nat, np.rint(x).astype(np.uint8)


def place(i):
    """Returns where the image number i of a row begins, in pixels from the left."""
    return LEFT + i * (IMAGE + GAP)


class Page:
    """A figure that is drawn on in pixels from its upper left corner."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)

    def image(self, pixels, x, y, colour):
        """Draws an image [32, 32, 3] at (x, y) in a frame."""
        axes = self.figure.add_axes((x / self.width, 1 - (y + IMAGE) / self.height,
                                     IMAGE / self.width, IMAGE / self.height))
        axes.imshow(pixels, interpolation='nearest')
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=2.5)

    def text(self, x, y, text, colour=INK, **more):
        more = {'fontsize': 11, 'va': 'center', **more}
        self.figure.text(x / self.width, 1 - y / self.height, text, color=colour, **more)

    def line(self, xs, ys, colour, linewidth=1.5):
        self.figure.add_artist(plt.Line2D([x / self.width for x in xs],
                                          [1 - y / self.height for y in ys],
                                          color=colour, linewidth=linewidth))

    def bracket(self, x, end, y, text, colour):
        """Draws a bracket from x to end under a row of images, with a text under it."""
        self.line((x, x, end, end), (y, y + 7, y + 7, y), colour)
        self.text((x + end) / 2, y + 22, text, colour, ha='center')

    def arrow(self, start, end):
        (x, y), (x2, y2) = start, end
        self.figure.add_artist(matplotlib.patches.FancyArrowPatch(
            (x / self.width, 1 - y / self.height), (x2 / self.width, 1 - y2 / self.height),
            transform=self.figure.transFigure, arrowstyle='-|>', mutation_scale=14, color=INK,
            linewidth=1.5))

    def box(self, x, y, width, height, text):
        self.figure.add_artist(matplotlib.patches.FancyBboxPatch(
            (x / self.width, 1 - (y + height) / self.height), width / self.width,
            height / self.height, boxstyle='round,pad=0,rounding_size=0.008',
            transform=self.figure.transFigure, facecolor='#f2f5f7', edgecolor=INK, linewidth=1.2))
        self.text(x + width / 2, y + height / 2, text, ha='center', linespacing=1.4)


def draw(x_nat, x, inference, config):
    """Returns the figure of a training batch and an inference batch.

    Args:
        x_nat, x: the training batch before and after the attack, uint8 [m, 32, 32, 3].
        inference: the clean images of an inference batch, then the query, uint8.
    """
    page = Page(WIDTH, HEIGHT)
    n, m, k = config['shaping_ratio'], len(x), num_clean(len(x), config['shaping_ratio'])
    page.text(LEFT, 24, f'Training batch, {n}:1', fontsize=15, weight='bold')
    for i in range(m):
        page.image(x[i], place(i), 46, CLEAN if i < k else ATTACKED)
    page.bracket(place(0), place(k) - GAP, 116, f'{k} clean images: never changed', CLEAN)
    page.bracket(place(k), place(m) - GAP, 116, f'{m - k} attacked: the adversarial tail', ATTACKED)
    page.box(LEFT, 168, 424, 64, 'network, in each attack step and in the weight\n'
             f'update normalized by the statistics of all {m}')
    for i in range(k, m):
        change = 128 + MAGNIFIED * (x[i].astype(float) - x_nat[i])
        page.image(np.clip(change, 0, 255).astype(np.uint8), place(i), 168, ATTACKED)
    page.text(place(k) - 14, 200, f'what {config["num_steps"]} PGD steps added: at most\n'
              f'{config["epsilon"]:g} of 255, drawn {MAGNIFIED} times larger', ATTACKED, ha='right')

    n, m = config['inference_shaping_ratio'], len(inference)
    page.line((LEFT, WIDTH - LEFT), (258, 258), '#d5dce2', 1)
    page.text(LEFT, 288, f'Inference batch, {n}:1', fontsize=15, weight='bold')
    for i in range(m):
        page.image(inference[i], place(i), 310, CLEAN if i < n else QUERY)
    page.bracket(place(0), place(n) - GAP, 380, f'{n} clean training images, drawn for the query',
                 CLEAN)
    page.bracket(place(n), place(m) - GAP, 380, 'the query', QUERY)
    page.arrow((place(m), 342), (place(m) + 36, 342))
    page.box(place(m) + 40, 310, 240, 64, f'network, normalized by\nthe statistics of all {m}')
    page.arrow((place(m) + 284, 342), (place(m) + 320, 342))
    page.text(place(m) + 326, 342, "the query's\nlogits alone", QUERY)
    return page.figure


def save(figure, path):
    """Writes a figure as a PNG without transparency, which a third of the file is for."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', default=os.path.join(ROOT, 'docs', 'batches.png'))
    output = parser.parse_args().output
    if not os.path.isdir(os.path.dirname(os.path.abspath(output))):
        parser.error(f'--output {output} is in no folder that exists')
    config = load_config(None, ['dataset=synthetic', 'num_residual_units=1', 'width_factor=1',
                                'step_size_schedule=[[0, 0.1]]'])
    data = load_data(config)
    x_nat, x = training_batch(trained_model(data, config), config, data)
    n = config['inference_shaping_ratio']
    inference = np.concatenate([data.train_data.xs[-n:], data.eval_data.xs[:1]])
    save(draw(x_nat, x, inference, config), output)
    print(f'Drawn: {output}')


if __name__ == '__main__':
    main()

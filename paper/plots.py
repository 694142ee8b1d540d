"""The plots beside the tables. Each function returns a matplotlib figure."""
import os

import numpy as np

from paper import formats
from paper.cells import result_of
from paper.published import (ADV_ONLY, INFERENCE_RATIOS, INFERENCES, MODES, NORM_SHAPING,
                             PAPER_RATIOS, PAPER_TABLES, Training)
from paper.trainings import name_of
from running import optional
from running.files import replacing

COLOURS = ('tab:blue', 'tab:orange', 'tab:red')


def make_pyplot():
    """Returns matplotlib.pyplot, which draws into files.

    Raises:
        UserError: matplotlib is not installed.
    """
    matplotlib = optional('matplotlib', 'matplotlib is missing', '-r requirements.txt')
    matplotlib.use('Agg')
    from matplotlib import pyplot
    return pyplot


def save(figure, folder, name):
    """Writes a figure to folder/NAME.png and closes it; returns the path."""
    path = os.path.join(folder, f'{name}.png')
    with replacing(path, 'wb') as f:
        figure.savefig(f, format='png', dpi=150, bbox_inches='tight')
    make_pyplot().close(figure)
    return path


def tradeoff(adversary, config, evaluations):
    """Plots clean accuracy against accuracy under PGD, for each training and inference mode."""
    figure, axes = make_pyplot().subplots(figsize=(6, 5))
    for colour, (mode, label) in zip(COLOURS, MODES.items()):
        of_training = evaluations[name_of(Training(adversary, mode), config)]
        clean, pgd = (of_training.attack(attack) for attack in ('clean', 'pgd'))
        paper = PAPER_TABLES[adversary][mode]
        for i, (inference, marker) in enumerate(zip(INFERENCES, 'os^')):
            x, y = (result_of(evaluation, inference) for evaluation in (clean, pgd))
            x_error, y_error = ([[100 * abs(bound - r['accuracy'])] for bound in r['interval']]
                                for r in (x, y))
            axes.errorbar(100 * x['accuracy'], 100 * y['accuracy'], xerr=x_error, yerr=y_error,
                          color=colour, marker=marker, linestyle='', capsize=2,
                          label=f'{label}, {inference}')
            axes.plot(100 * paper['clean'][i], 100 * paper['pgd'][i], color=colour, marker=marker,
                      linestyle='', markerfacecolor='none', alpha=0.6)
    axes.set(xlabel='accuracy on clean images, %', ylabel='accuracy under PGD (made with PN), %',
             title=f'{adversary} training; hollow: the paper (w32-10)')
    place_legend(axes)
    return figure


def ratios(ours):
    """Plots Table IV as two heat maps, ours and the paper's.

    Args:
        ours: {n of n:1 in training: results in the order of INFERENCE_RATIOS}.
    """
    figure, both = make_pyplot().subplots(1, 2, figsize=(11, 3.2), sharey=True)
    ours = [[r['accuracy'] for r in results] for results in ours.values()]
    for axes, values, title in zip(both, (ours, list(PAPER_RATIOS.values())),
                                   ('ours', 'the paper (w32-10)')):
        image = axes.imshow(100 * np.array(values), vmin=0, vmax=100, cmap='viridis', aspect='auto')
        for (row, column), value in np.ndenumerate(np.array(values)):
            axes.text(column, row, formats.percent(value), ha='center', va='center',
                      color='white' if value < 0.6 else 'black')
        axes.set(title=title, xlabel='clean samples : test samples, in inference',
                 xticks=range(len(INFERENCE_RATIOS)),
                 xticklabels=[f'{n}:1' for n in INFERENCE_RATIOS],
                 yticks=range(len(PAPER_RATIOS)), yticklabels=[f'{n}:1' for n in PAPER_RATIOS])
    both[0].set_ylabel('clean : attacked, in training')
    figure.colorbar(image, ax=both, label='accuracy under PGD, %')
    return figure


def sweep(key, config, points):
    """Plots accuracy against PGD's steps or epsilon, with intervals.

    Args:
        key: 'num_steps' or 'epsilon'. points: what checks.sweep_results returns.
    """
    figure, axes = make_pyplot().subplots(figsize=(6, 4))
    styles = {'pn': ('pgd, pn', '-'), 'bn_shaping': ('pgd, bn_shaping', '--'),
              'adaptive': ('adaptive_pgd, bn_shaping', ':')}
    for colour, mode in zip(('tab:blue', 'tab:red'), (ADV_ONLY, NORM_SHAPING)):
        name = name_of(Training('pgd', mode), config)
        for field, (label, style) in styles.items():
            line = {point.value: getattr(results, field) for point, results in points.items()
                    if (point.training, point.key) == (name, key) and getattr(results, field)}
            if line:
                draw_line(axes, line, style, colour, f'{MODES[mode]}; {label}')
    axes.set_xscale('symlog' if key == 'epsilon' else 'log', base=2)
    x_labels = {
        'num_steps': f'PGD steps of {config["step_size"]:g}, epsilon {config["epsilon"]:g}',
        'epsilon': f'epsilon in pixels, {config["num_steps"]} steps of a quarter of it'}
    axes.set(xlabel=x_labels[key], ylabel='accuracy, %', ylim=(0, 100))
    place_legend(axes)
    return figure


def draw_line(axes, line, style, colour, label):
    """Draws {x: result} as a line with its intervals around it."""
    low, high = (100 * np.array([r['interval'][i] for r in line.values()]) for i in (0, 1))
    axes.plot(list(line), [100 * r['accuracy'] for r in line.values()], style, color=colour,
              marker='.', label=label)
    axes.fill_between(list(line), low, high, color=colour, alpha=0.08)


def place_legend(axes):
    axes.legend(fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)

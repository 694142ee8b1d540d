"""The plots beside the tables. Each function returns a matplotlib figure."""
import numpy as np

from doubts import is_transferred
from eval import WORST_IN_BALL
from paper import formats
from paper.cells import JUDGES, attacks_on, available, worst_cases_of
from paper.curves import VALUES, courses
from paper.published import (DEFAULT, INFERENCE_RATIOS, INFERENCES, MODES, PAPER_RATIOS,
                             PAPER_TABLES, SHAPED, Training)
from paper.trainings import name_of
from paper.variations import differences
from report import pyplot

COLOURS = dict(zip(MODES, ('tab:blue', 'tab:orange', 'tab:red')))


def tradeoff(adversary, config, evaluations):
    """Plots clean accuracy against robust accuracy, for each training and inference mode.

    Filled: the worst case in the ball on all images. Pale: PGD made with population norms, as in
    the paper, whose numbers are hollow.
    """
    figure, axes = pyplot().subplots(figsize=(6, 5))
    markers, shown = dict(zip(JUDGES, 'os^D')), set()
    for training in available([Training(adversary, mode) for mode in MODES], config, evaluations):
        mode, colour = training.mode, COLOURS[training.mode]
        axes.plot([], [], color=colour, linewidth=4, label=MODES[mode])
        by_attack = attacks_on(training, config, evaluations)
        worst = [r for r in worst_cases_of(by_attack, config) if r['attack'] == WORST_IN_BALL]
        paper = PAPER_TABLES[adversary][mode]
        for inference, marker in markers.items():
            style = {'color': colour, 'marker': marker, 'linestyle': ''}
            found = [r for attack in ('clean', 'pgd') if attack in by_attack
                     for r in by_attack[attack]['results'] if r['inference'] == inference]
            if len(found) < 2:  # not stored
                continue
            clean, pgd = found
            robust = [r for r in worst if r['inference'] == inference]
            for result in robust:
                errors = [[[100 * abs(bound - r['accuracy'])] for bound in r['interval']]
                          for r in (clean, result)]
                axes.errorbar(100 * clean['accuracy'], 100 * result['accuracy'], errors[1],
                              errors[0], capsize=2, **style)
            shown.add(inference)
            axes.plot(100 * clean['accuracy'], 100 * pgd['accuracy'], alpha=0.25, **style)
            if inference in INFERENCES:
                i = INFERENCES.index(inference)
                axes.plot(100 * paper['clean'][i], 100 * paper['pgd'][i], alpha=0.6,
                          markerfacecolor='none', **style)
    for inference, marker in markers.items():
        if inference in shown:
            axes.plot([], [], color='gray', marker=marker, linestyle='', label=inference)
    axes.set(xlabel='accuracy on clean images, %', ylabel='robust accuracy, %',
             title=f'{adversary} training, {config["num_eval_examples"]} test images; filled: '
                   f'{WORST_IN_BALL};\npale: PGD made with PN; hollow: the paper under PGD '
                   '(w32-10)')
    place_legend(axes)
    return figure


def cost(config, evaluations):
    """Plots the accuracy that each direct attack leaves against the gradients that it may take."""
    figure, axes = pyplot().subplots(figsize=(6, 4))
    for training in (DEFAULT, SHAPED):
        if not evaluations[name_of(training, config)].has('clean'):  # not stored
            continue
        by_attack = attacks_on(training, config, evaluations)
        for inference, style in (('pn', '-'), ('bn_recorded', '--'), ('bn_shaping', ':')):
            found = [r for evaluation in by_attack.values() for r in evaluation['results']
                     if r['inference'] == inference and r.get('gradients')
                     and not is_transferred(r['attack'], r, inference)
                     and r['num_examples'] == config['num_eval_examples']
                     and r['epsilon'] == config['epsilon']]
            line = {r['gradients']: r for r in sorted(found, key=lambda r: -r['accuracy'])}
            if line:
                draw_line(axes, dict(sorted(line.items())), style, COLOURS[training.mode],
                          f'{MODES[training.mode]}; {inference}')
    axes.set_xscale('log')
    axes.set(xlabel='gradients spent on an image, at most', ylabel='accuracy, %', ylim=(0, 100),
             title='Direct attacks within the ball, on all images')
    place_legend(axes)
    return figure


def curves(config, evaluations):
    """Plots the accuracy of each training along its steps."""
    found = courses(config, evaluations)
    figure, all_axes = pyplot().subplots(1, max(len(found), 1), figsize=(4 * max(
        len(found), 1), 3.2), sharey=True, squeeze=False)
    for axes, (name, course) in zip(all_axes[0], found.items()):
        for (key, label), style, colour in zip(VALUES.items(), ('.', '-', 's:', 's--'), (
                'lightblue', 'lightsalmon', 'tab:blue', 'tab:red')):
            if course[key]:
                steps, values = np.array(course[key]).T
                axes.plot(steps, 100 * values, style, color=colour, markersize=3, linewidth=1,
                          label=label)
        axes.set_title(name, fontsize=8)
        axes.set(xlabel='step', ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    all_axes[0][0].set_ylabel('accuracy, %')
    return figure


def gaps(config, evaluations):
    """Plots by how much bn_shaping exceeds pn under PGD made with pn, for each variation."""
    found = differences(config, evaluations)
    figure, axes = pyplot().subplots(figsize=(6, 0.6 + 0.3 * len(found)))
    for y, (value, interval) in enumerate(found.values()):
        axes.errorbar(100 * value, y, xerr=[[100 * abs(end - value)] for end in interval],
                      marker='o', color='tab:blue', capsize=2)
    axes.axvline(0, color='black', linewidth=0.5)
    axes.set_yticks(range(len(found)), [f'{varied}: {value}' for varied, value in found],
                    fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel='accuracy by bn_shaping less that by pn, in points',
             title='PGD made with pn (the paper: +78.6)')
    axes.grid(alpha=0.3)
    return figure


def ratios(ours):
    """Plots Table IV as two heat maps, ours and the paper's.

    Args:
        ours: {n of n:1 in training: results in the order of INFERENCE_RATIOS}.
    """
    figure, both = pyplot().subplots(1, 2, figsize=(11, 3.2), sharey=True)
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
    figure, axes = pyplot().subplots(figsize=(6, 4))
    styles = {'pn': ('pgd, pn', '-'), 'bn_shaping': ('pgd, bn_shaping', '--'),
              'adaptive': ('adaptive_pgd, bn_shaping', ':')}
    for training in (DEFAULT, SHAPED):
        name = name_of(training, config)
        for field, (label, style) in styles.items():
            line = {point.value: getattr(results, field) for point, results in points.items()
                    if (point.training, point.key) == (name, key) and getattr(results, field)}
            if line:
                draw_line(axes, line, style, COLOURS[training.mode],
                          f'{MODES[training.mode]}; {label}')
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

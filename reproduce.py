"""Computes the paper's Tables I to IV and its in-text experiments, beside the paper's numbers.

Also checks the attacks, tries what could explain a difference, and says what is seen of each claim.

    python reproduce.py all --config configs/three_classes.json
    python reproduce.py table1 claims --stored results/three_classes    # from stored numbers

Targets: headline, summary, table1, table2, table3, table4, confoundings, shifts, sweeps, seeds,
norms, gap, transfer, neighbours, checks, scales, binarization, curves, gallery, variations,
crossed, claims, or all: all but variations, whose trainings take many hours. docs/evaluation.md
says what each is.

Trains what is missing by train.py, each model in a folder of its own in model_dir; evaluates what
is missing; prints the tables, and writes MODEL_DIR/tables/NAME.md with plots beside them. Every
number is kept in MODEL_DIR/cells as soon as it is known, with the settings that it depends on.
Models and numbers that exist are not computed again, so the program can be stopped and started at
any time. With other settings, other numbers are kept beside the old ones. Finished batches of a
number that is not known yet are kept in MODEL_DIR/cells/unfinished, which may be removed at any
time.
"""
import importlib.util
import os
import sys

from absl import flags

from config import (begin, config_from_flags, define_download_flag, load_config,
                    store_config)
from running.program import run

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    define_download_flag()
    flags.DEFINE_string('stored', None, 'Folder with config.json and cells/, as results/ has them: '
                        'makes tables and plots from these alone, in that folder.')
    flags.DEFINE_string('ray', None, 'local, or the address of a Ray cluster: trainings and cells '
                        'become its tasks, side by side. All machines must see model_dir and '
                        'data_path. Needs requirements-cluster.txt.')
    flags.DEFINE_float('task_cpus', 1, 'With --ray: CPUs of a task.', 0)
    flags.DEFINE_float('task_gpus', 0, 'With --ray: GPUs of a task.', 0)
    begin(__doc__, takes_words=True)

import running.quiet  # noqa: F401

from attacks import check_names
from cifar10_input import eval_examples, load_data
from paper.cells import Evaluations, StoredEvaluations, networks
from paper.published import NORM_SHAPING
from paper.tables import TABLES, check_clean_samples, section, trainings_of
from paper.trainings import train_if_missing
from report import save_figure
from running import UserError
from running.devices import leave_gpus
from running.files import replacing
from running.unfinished import data_digest
from train import trained_on_others


def main(words):
    # What is asked for
    if not words:
        raise UserError(f'nothing to reproduce; expected one or more of {", ".join(TABLES)}, or '
                        'all')
    tables = {name: table for name, table in TABLES.items()
              if name in words or 'all' in words and not table.apart}
    stored = flags.FLAGS.stored
    if stored and flags.FLAGS.ray:
        raise UserError('--stored computes nothing; expected no --ray beside it')
    if not flags.FLAGS.ray and (flags.FLAGS.task_cpus, flags.FLAGS.task_gpus) != (1, 0):
        raise UserError('--task_cpus and --task_gpus are of the tasks of --ray; expected --ray '
                        'beside them')
    config = read_config(stored)
    trainings = trainings_of(tables.values(), config)

    # Load the numbers that are stored, or train what is missing
    if stored:
        folder = stored
        evaluations = {name: StoredEvaluations(name, of_training, os.path.join(stored, 'cells'))
                       for name, of_training in trainings.items()}
        check_same_images(evaluations.values(), stored)
    else:
        folder = os.path.join(config['model_dir'], 'tables')
        evaluations = train_and_load(tables, trainings, config, folder)

    # Evaluate what is missing; print and draw
    for name, table in tables.items():
        try:
            show(name, table, config, evaluations, folder)
        except UserError as error:
            if not stored or name in words:
                raise
            print(f'{name} is left out: {error}', file=sys.stderr)  # of all that there are
            if os.path.exists(os.path.join(folder, f'{name}.md')):
                print(f'{name}.md in {folder} is an older one', file=sys.stderr)


def show(name, table, config, evaluations, folder):
    """Makes a table and its plots, prints it, and writes them to a folder."""
    text = section(table, config, evaluations)
    path = os.path.join(folder, f'{name}.md')
    with replacing(path) as f:
        f.write(text)
    print(f'\n{text}\nWritten to {path}', flush=True)
    for plot, draw in table.plots.items():
        path = os.path.join(folder, f'{plot}.png')
        save_figure(draw(config, evaluations), path)
        print(f'Drawn: {path}', flush=True)


def read_config(stored):
    """Returns the configuration that the trainings vary: the stored one, or the command line's."""
    if stored and (flags.FLAGS.config or flags.FLAGS.set):
        raise UserError('--stored names a folder with a configuration; expected neither --config '
                        'nor --set beside it')
    config = load_config(os.path.join(stored, 'config.json')) if stored else config_from_flags()
    if config['training_mode'] != NORM_SHAPING or config['adversary'] != 'pgd':
        raise UserError(f'training_mode must be {NORM_SHAPING} and adversary pgd, as the tables '
                        f'vary them, got {config["training_mode"]} and {config["adversary"]}')
    check_names(config)
    return config


def train_and_load(tables, trainings, config, folder):
    """Trains what is missing; returns {name: Evaluations} of all trainings.

    Args:
        tables: {name: Table}. trainings: {name: configuration}, what the tables need.
        folder: of the tables; the configuration is stored there.
    """
    leave_gpus(config)
    data = load_data(config, flags.FLAGS.download)
    check(tables, config, data)

    # In processes of their own, before this one takes a GPU for the evaluation
    options = ['--config', flags.FLAGS.config] if flags.FLAGS.config else []
    for setting in flags.FLAGS.set:
        options += ['--set', setting]
    if flags.FLAGS.ray:
        from paper import cluster  # optional
        cluster.compute(tables, trainings, config, options, data, flags.FLAGS.ray, {
            'num_cpus': flags.FLAGS.task_cpus, 'num_gpus': flags.FLAGS.task_gpus})
    for name, of_training in trainings.items():
        train_if_missing(name, of_training, config, options)

    os.makedirs(folder, exist_ok=True)
    store_config(config, os.path.join(folder, 'config.json'))
    model_of, digest = networks(data.num_classes), data_digest(data)
    evaluations = {name: Evaluations(name, of_training, data, digest, model_of(of_training),
                                     os.path.join(config['model_dir'], 'cells'))
                   for name, of_training in trainings.items()}
    for name, of_training in evaluations.items():
        if trained_on_others(of_training.checkpoint, digest):
            print(f'{name} was trained on other images or labels than data_path '
                  f'{config["data_path"]} holds; what is missing is evaluated on these', flush=True)
    return evaluations


def check_same_images(evaluations, stored):
    """Raises UserError where stored evaluations are of different images: they are compared."""
    of_images = {}
    for evaluation in evaluations:
        for digest in evaluation.digests[1:2]:  # none where nothing is stored of a training
            of_images[digest] = evaluation.name
    if len(of_images) > 1:
        raise UserError(f'{stored} holds evaluations of {" and ".join(of_images.values())} on '
                        'different images; expected them on the same')


def check(tables, config, data):
    """Raises UserError for what would fail later: fail now, not after the trainings."""
    eval_examples(data, config)
    for package in ('foolbox', 'matplotlib'):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is missing: pip install -r requirements.txt')
    check_clean_samples(config, data, config['inference_shaping_ratio'])
    for table in tables.values():
        for check_table in table.checks:
            check_table(config, data)


if __name__ == '__main__':
    run(main, (*TABLES, 'all'))

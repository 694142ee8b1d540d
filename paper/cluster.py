"""The trainings and cells of the tables as tasks of Ray, side by side on one machine or on many.

reproduce.py goes through the tables again and again. What a table lacks becomes a task: a training,
or a cell, in shards where it is large. When a task is done, its model or its file is in model_dir,
which all machines must see, and the tables come further. In the end nothing is missing.

A task goes through its table, too, and computes the one cell that it was sent for. So what it
computes is what the serial program computes. Where a worker is lost, Ray gives its task to another
one, which goes on from the training's checkpoint, or from the batches that are kept.
"""
import fcntl
import functools
import json
import os
import socket
import time

import running.quiet  # noqa: F401

from cifar10_input import load_data
from paper.cells import Evaluations, networks
from paper.tables import TABLES, section, trainings_of
from paper.trainings import is_trained, train_if_missing
from running import UserError, brief, optional
from running.devices import leave_gpus
from running.unfinished import data_digest, shard_path

SHARD = 1000  # images of an attack in one task, about
RETRIES = 5   # of a task whose worker is lost


class NotYet(Exception):
    """A table cannot be made further: it looked into what is missing."""


class Done(Exception):
    """What a task was sent for is computed and kept."""


class Missing:
    """Stands for an evaluation that is not kept yet, until someone looks into it."""

    def __getitem__(self, key):
        raise NotYet


class Asked(Evaluations):
    """The evaluations of one training, of which at most one is computed here: `wanted`.

    What else is missing is noted: `asked` is {path: its shards, [] where it is small}.
    """

    wanted = None  # or (path of the evaluation to compute, shard or None)

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = {}

    def attack(self, *args, **settings):
        try:
            return super().attack(*args, **settings)
        except NotYet:
            return Missing()

    def missing(self, what, identity, path, compute):
        if not self.wanted or self.wanted[0] != path:
            self.asked[path] = shards(json.loads(identity)[-1], self.config['eval_batch_size'])
            return Missing()
        self.shard = self.wanted[1]
        if self.shard:
            compute(shard_path(self.unfinished(what, identity), *self.shard))
        else:
            super().missing(what, identity, path, compute)
        raise Done


def shards(identity, batch_size):
    """Returns the shards [(first, last)] of an evaluation by its identity; [] where one will do.

    Only attacks have shards. They are of whole batches.
    """
    n = identity.get('num_examples', 0) if isinstance(identity, dict) else 0
    size = max(SHARD // batch_size, 1) * batch_size
    return [(first, min(first + size, n)) for first in range(0, n, size)] if n > size else []


class Trained(dict):
    """{name: Asked} of the trainings that are done; of another one, nothing can be made yet."""

    def __missing__(self, name):
        raise NotYet


# ---- the tasks, in Ray's workers


def train_task(folder, name, of_training, config, options):
    """Trains a model, unless it is there; returns what is wrong, a text, or None."""
    os.chdir(folder)
    try:
        wait_for_lock(of_training['model_dir'])
        train_if_missing(name, of_training, config, options)
    except SystemExit:
        return f'the training of {name} was stopped'
    except (UserError, OSError) as error:
        return str(error)


def wait_for_lock(model_dir, seconds=300):
    """Waits while the training of a lost worker, which got SIGTERM, saves its last step."""
    path = os.path.join(model_dir, 'lock')
    for _ in range(seconds):
        try:
            with open(path, 'r+b') as f:  # NFS locks what can be written alone
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            time.sleep(1)


def cell_task(folder, table, config, path, shard):
    """Computes one cell of a table, or a shard of it; returns what is wrong, a text, or None."""
    os.chdir(folder)
    try:
        data, digest, model_of = loaded(json.dumps(config))
        evaluations = Trained()
        for name, of_training in trainings_of([TABLES[table]], config).items():
            if is_trained(of_training):
                evaluations[name] = Asked(name, of_training, data, digest, model_of(of_training),
                                          os.path.join(config['model_dir'], 'cells'))
                evaluations[name].wanted = path, shard
        section(TABLES[table], config, evaluations)
    except Done:
        return None
    except (UserError, OSError) as error:
        return str(error)
    except NotYet:
        return f'{table} asks no more for {path}: was a file of {config["model_dir"]} removed?'


@functools.lru_cache(1)
def loaded(config):
    """Returns (data, digest, networks' f) of a configuration, the same to each task of a worker."""
    config = json.loads(config)
    leave_gpus(config)
    data = load_data(config, False)
    return data, data_digest(data), networks(data.num_classes)


# ---- the plan


def compute(tables, trainings, config, options, data, address, resources):
    """Trains and evaluates all that some tables lack, by Ray.

    Args:
        tables: {name: Table}. trainings: {name: configuration}, what the tables need.
        config, options: as train_if_missing takes them. data: a CIFAR10Data.
        address: 'local', which starts Ray on this machine, or that of a cluster that runs.
        resources: of a task, {'num_cpus': ..., 'num_gpus': ...}.

    Raises:
        UserError: Ray is not installed or not there; a task failed, or its workers were lost
            RETRIES times.
    """
    ray = connect(address, resources)
    tasks, of_data = Tasks(ray, resources), (data, data_digest(data))
    evaluations, tables = Trained(), dict(tables)
    try:
        while True:
            begin_trainings(tasks, trainings, evaluations, config, options, of_data)
            begin_cells(tasks, tables, evaluations, config)
            if not tasks.running:
                return
            tasks.wait()
    finally:
        ray.shutdown()


class Tasks:
    """Ray's tasks by their labels: those begun, those that run, those that ended.

    Args:
        ray: the package, connected. resources: of a task.
    """

    def __init__(self, ray, resources):
        self.ray, self.resources, self.folder = ray, resources, os.getcwd()
        self.running, self.begun, self.ended = {}, set(), set()  # {Ray's reference: label}; labels

    def begin(self, label, task, *args):
        """Begins a task, unless it was begun before."""
        if label not in self.begun:
            self.begun.add(label)
            remote = self.ray.remote(max_retries=RETRIES, **self.resources)(task)
            self.running[remote.remote(self.folder, *args)] = label

    def wait(self):
        """Waits until one has ended. Raises UserError: it failed, or its workers were lost."""
        (done, *_), _ = self.ray.wait(list(self.running))
        label = self.running.pop(done)
        try:
            fault = self.ray.get(done)
        except self.ray.exceptions.RayError as error:
            fault = f'{brief(error)}; the same command goes on from what is kept'
        if fault:
            raise UserError(f'{label}: {fault}')
        self.ended.add(label)
        print(f'{len(self.ended)} of {len(self.begun)} tasks that are known so far are done: '
              f'{label}', flush=True)


def begin_trainings(tasks, trainings, evaluations, config, options, of_data):
    """Begins the trainings that are missing; adds those that are done to the evaluations.

    Args:
        of_data: (data, its digest).
    """
    for name, of_training in trainings.items():
        if name in evaluations or f'training {name}' in tasks.begun - tasks.ended:
            continue
        if is_trained(of_training):
            evaluations[name] = Asked(name, of_training, *of_data, None,
                                      os.path.join(config['model_dir'], 'cells'))
        else:
            tasks.begin(f'training {name}', train_task, name, of_training, config, options)


def begin_cells(tasks, tables, evaluations, config):
    """Begins the cells that are missing: their shards first; when these are done, the whole."""
    for path, (table, parts) in lacking(tables, config, evaluations).items():
        if all(label_of(path, shard) in tasks.ended for shard in parts):
            parts = [None]
        for shard in parts:
            tasks.begin(label_of(path, shard), cell_task, table, config, path, shard)


def connect(address, resources):
    """Returns the package Ray, connected. Raises UserError: it is not there, or has too little."""
    ray = optional('ray', '--ray needs Ray', '-r requirements-cluster.txt')
    check_address(address)
    os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')  # Ray asks for a choice
    try:
        ray.init(address=address, include_dashboard=False, logging_level='warning')
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f'--ray {address}: {brief(error)}') from None
    there = ray.cluster_resources()
    for flag, name in (('task_cpus', 'CPU'), ('task_gpus', 'GPU')):  # or tasks wait forever
        asked, most = resources[f'num_{name.lower()}s'], there.get(name, 0)
        if asked > most:
            raise UserError(f'--{flag} must be at most {most:g}, what Ray has, got {asked:g}')
    return ray


def check_address(address):
    """Raises UserError where HOST:PORT is asked for and nothing answers: Ray waits for minutes."""
    host, colon, port = address.removeprefix('ray://').rpartition(':')
    if not colon:  # 'local', 'auto': Ray knows
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f'--ray must be local, or HOST:PORT of a cluster that runs; '
                        f'{address[:200]}: {brief(error)}') from None


def label_of(path, shard):
    """Returns what the task of a cell, or of a shard of it, is called."""
    name = os.path.basename(path).removesuffix('.json')
    return name + (f' [{shard[0]}:{shard[1]}]' if shard else '')


def lacking(tables, config, evaluations):
    """Returns {path of a cell that can be computed now: (table, its shards)}.

    Args:
        tables: {name: Table}; those that lack nothing are removed.
        evaluations: {name: Asked} of the trainings that are done.
    """
    found = {}
    for name in list(tables):
        for of_training in evaluations.values():
            of_training.asked = {}
        try:
            section(tables[name], config, evaluations)
            del tables[name]
        except NotYet:
            for of_training in evaluations.values():
                for path, parts in of_training.asked.items():
                    found.setdefault(path, (name, parts))
    return found

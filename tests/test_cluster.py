"""reproduce.py --ray: what its tasks compute is what the serial program computes."""
import contextlib
import json
import os
from pathlib import Path
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from cifar10_input import load_data
from config import store_config
from conftest import ROOT
from model import build_model
from paper import cluster
from paper.cells import Evaluations
from paper.published import SHAPED
from paper.tables import TABLES
from paper.trainings import config_of, name_of
from running import UserError
from running.unfinished import batches, data_digest, shard_path, shards_of
from test_programs import program, weights

SETTINGS = ['dataset=synthetic', 'num_residual_units=1', 'width_factor=1', 'num_steps=1',
            'training_batch_size=16', 'step_size_schedule=[[0, 0.1]]', 'eval_batch_size=20',
            'max_num_training_steps=200', 'num_checkpoint_steps=20']


def test_shards_are_one_loop(tmp_path):
    path = str(tmp_path / 'loop.part')

    def run(path, shard=None):
        squares, total, odd = np.zeros(10, int), np.zeros([]), np.zeros(10, bool)
        done = []
        for start, end in batches(path, [squares, total, odd], 10, 2, 'squares', shard):
            squares[start:end] = np.arange(start, end) ** 2
            total += squares[start:end].sum()
            odd[start:end] = np.arange(start, end) % 2
            done.append(start)
        return squares.tolist(), float(total), odd.tolist(), done

    *whole, done = run(None)
    assert done == [0, 2, 4, 6, 8]
    assert run(shard_path(path, 4, 8), (4, 8))[-1] == [4, 6]
    assert run(path)[-1] == done  # not all shards are there
    os.remove(path)
    assert run(shard_path(path, 0, 4), (0, 4))[-1] == [0, 2]
    assert run(shard_path(path, 8, 10), (8, 10))[-1] == [8]
    assert run(shard_path(path, 8, 10), (8, 10))[-1] == []  # done before
    assert list(shards_of(path)) == [(0, 4), (4, 8), (8, 10)]
    *joined, done = run(path)
    assert joined == whole and done == []
    spoiled = Path(shard_path(path, 4, 8))
    spoiled.write_bytes(spoiled.read_bytes()[:-1] + b'?')
    *again, done = run(path)
    assert again == whole and done == [0, 2, 4, 6, 8]


def test_shards_are_whole_batches(monkeypatch):
    monkeypatch.setattr(cluster, 'SHARD', 50)
    assert cluster.shards({'num_examples': 100}, 20) == [(0, 40), (40, 80), (80, 100)]
    assert cluster.shards({'num_examples': 40}, 20) == []
    assert cluster.shards({'num_examples': 250}, 100) == [(0, 100), (100, 200), (200, 250)]
    assert cluster.shards(['an experiment'], 20) == []


def test_a_task_computes_what_the_serial_program_does(tmp_path, small_config, small_model,
                                                      monkeypatch):
    """A table's cells, one by one, some in shards; without Ray."""
    monkeypatch.setattr(cluster, 'SHARD', 20)
    config = small_config(model_dir=str(tmp_path), max_num_training_steps=7,
                          training_batch_size=64)
    of_training = config_of(SHAPED, config)
    small_model.save_madry_checkpoint(Path(of_training['model_dir']) / 'checkpoint-7',
                                      global_step=7)
    store_config(of_training, os.path.join(of_training['model_dir'], 'config.json'))
    data, name = load_data(config), name_of(SHAPED, config)

    def evaluations(kind, folder):
        return kind(name, of_training, data, data_digest(data), build_model(config, 10),
                    str(tmp_path / folder))

    serial = evaluations(Evaluations, 'serial')
    rows = TABLES['gap'].rows(config, {name: serial})
    asked, gap, shards = cluster.Trained({name: evaluations(cluster.Asked, 'cells')}), {}, []
    while True:
        found = cluster.lacking(gap := {'gap': TABLES['gap']}, config, asked)
        if not found:
            break
        for path, (table, parts) in found.items():
            shards += parts
            for shard in [*parts, None]:
                assert cluster.cell_task(os.getcwd(), table, config, path, shard) is None
            assert os.path.exists(path)
    assert gap == {} and shards == [(0, 20), (20, 40), (40, 50)] * (len(shards) // 3) and shards
    assert TABLES['gap'].rows(config, asked) == rows
    assert numbers(tmp_path / 'cells') == numbers(tmp_path / 'serial')
    assert os.listdir(tmp_path / 'cells') and not os.path.exists(tmp_path / 'cells' / 'unfinished')


def numbers(folder):
    """Returns {name: what a cell says}, all but how long it took and when."""
    found = {}
    for path in Path(folder).glob('*.json'):
        cell = json.loads(path.read_text())
        del cell['provenance']
        for result in cell.get('results', []):
            del result['seconds']
        found[path.name] = cell
    return found


def test_mistakes_are_told_in_one_line(tmp_path):
    for arguments, fault in (
            (['gap', '--ray', 'local', '--stored', 'results/three_classes'],
             '--stored computes nothing; expected no --ray beside it'),
            (['gap', '--task_gpus', '1'], '--task_cpus and --task_gpus are of the tasks of --ray'),
            (['gap', '--ray', 'local', '--task_cpus', '-1'], '--task_cpus must be')):
        status, _, errors = program('reproduce.py', *arguments)
        assert status == 2 and len(errors) == 1 and fault in errors[0]


@pytest.mark.slow
def test_lost_workers_cost_no_number(tmp_path):
    """Two workers of a local Ray: one is killed in a training, one in a cell."""
    pytest.importorskip('ray')
    settings = [*SETTINGS, 'num_eval_examples=200']
    command = [sys.executable, os.path.join(ROOT, 'reproduce.py'), 'table3', '--ray', 'local',
               *[f'--set={setting}' for setting in [*settings, f'model_dir={tmp_path}/ray']]]
    log = tmp_path / 'log'
    with log.open('w') as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
        try:
            kill_a_worker(process, 'train_task',
                          lambda: [*tmp_path.glob('ray/*/checkpoint-20.index')])
            kill_a_worker(process, 'cell_task', lambda: [*tmp_path.glob('ray/cells/unfinished/*')])
            assert process.wait(timeout=900) == 0, log.read_text()
        finally:
            process.terminate()
    assert 'resuming after' in log.read_text()
    status, _, errors = program('reproduce.py', 'table3', settings=[
        *settings, f'model_dir={tmp_path}/serial'])
    assert status == 0, errors
    for folder in ('serial/pgd_shaping_in_attack_and_training_3to1',
                   'serial/trades_shaping_in_attack_and_training_3to1'):
        ours, theirs = (weights(tmp_path / of, 200) for of in (
            folder, folder.replace('serial', 'ray')))
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert numbers(tmp_path / 'ray' / 'cells') == numbers(tmp_path / 'serial' / 'cells')


def kill_a_worker(process, task, begun):
    """Kills the first of Ray's workers that is at a task, once begun() says that it has begun."""
    for _ in range(3000):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if f'ray::{task}' in ' '.join(child.cmdline()) and begun():
                    child.kill()
                    return
        assert process.poll() is None, 'it ended before'
        time.sleep(0.1)
    pytest.fail(f'no worker began a {task}')


@pytest.mark.parametrize('address', ['127.0.0.1:1', '127.0.0.1:none', 'ray://127.0.0.1:1',
                                     '127.0.0.1:99999'])
def test_an_address_where_nothing_answers_is_told_at_once(address):
    with pytest.raises(UserError, match=f'--ray must be local, or HOST:PORT .*; {address}: '):
        cluster.check_address(address)
    cluster.check_address('local')

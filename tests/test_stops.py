"""Programs that are stopped and started: what is kept, what is not taken for it, what is shown."""
import contextlib
import glob
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest

from paper import cells, experiments, trainings
from running import progress
from running import unfinished
from attacks import make_attack
from cifar10_input import load_data
from config import load_config, store_config
from running import UserError
from running.program import Terminated
from conftest import ROOT
from eval import evaluate, evaluate_attack, kept_files, make_judges
from model import Model
from shaping import INFERENCE_MODES


def without_seconds(results):
    """Returns results without what two runs differ in, or eval.py adds: where they come from."""
    other = ('seconds', 'checkpoint', 'step', 'checkpoint_digest', 'data', 'np_random_seed',
             'precision', 'provenance')
    return [{key: value for key, value in r.items() if key not in other} for r in results]


# ---- small results


@pytest.mark.parametrize('name, num_draws', [('pgd', 2), ('apgd_eot', 1)])
def test_an_evaluation_stopped_in_every_batch_ends_as_one_that_never_was(
        small_model, small_config, data, tmp_path, name, num_draws, capsys):
    config = small_config(apgd_num_steps=2, inference_shaping_ratio=3, shaping_batch_size=8,
                          eval_batch_size=8, num_eval_examples=20)
    judges = make_judges(small_model, data, config, INFERENCE_MODES)
    perturb, settings = make_attack(name, small_model, data, config, num_draws)
    kept = str(tmp_path / 'unfinished' / 'attack.part')
    attacked = []

    def run(path=None, stop_attack=None, stop_judge=None):
        def attack(start, end):
            if start == stop_attack:
                raise KeyboardInterrupt
            attacked.append(start)
            return perturb(start, end)

        def judged(mode):
            def classify(x, query):
                if mode[0] == 'bn_shaping' and query % 10 ** 6 == stop_judge:
                    raise KeyboardInterrupt  # when 'bn' and 'pn' have counted theirs already
                return judges[mode](x, query)
            return classify

        return evaluate_attack(name, (attack, settings), data, config,
                               {mode: judged(mode) for mode in judges}, num_draws, path)

    whole = run()
    attacked.clear()
    for stop in ({'stop_attack': 0}, {'stop_judge': 0}, {'stop_attack': 8}, {'stop_judge': 1},
                 {'stop_attack': 16}, {'stop_judge': 2}):
        with pytest.raises(KeyboardInterrupt):
            run(kept, **stop)
    again = run(kept)
    assert attacked == [0, 0, 8, 8, 16, 16]  # twice: a batch that was stopped is done anew
    assert f'{name}: resuming after 16 of 20 examples' in capsys.readouterr().out
    assert without_seconds(again[0]) == without_seconds(whole[0])
    assert all((again[1].right[judge] == whole[1].right[judge]).all() for judge in judges)
    assert (again[1].in_ball == whole[1].in_ball).all()
    done = run(kept)  # as eval.py passes over an attack when a later one was stopped
    assert done[0] == again[0] and len(attacked) == 6


def filled(path, n=10, size=4, stop=None):
    """Returns two arrays that `batches` filled, and where each batch that it yielded began."""
    squares, even, began = np.zeros([2, n]), np.zeros(n, bool), []
    for start, end in unfinished.batches(path, [squares, even], n, size, 'squares'):
        if start == stop:
            break
        began.append(start)
        squares[:, start:end] = np.arange(start, end) ** 2
        even[start:end] = np.arange(start, end) % 2 == 0
    return squares, even, began


class Pickled:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_damaged_file_counts_for_nothing(tmp_path):
    path = str(tmp_path / 'a.part')
    assert filled(path, stop=8)[2] == [0, 4]
    with open(path, 'rb') as f:
        good = f.read()
    objects = io.BytesIO()
    np.save(objects, np.array([Pickled(str(tmp_path / 'unpickled'))], object), allow_pickle=True)
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, {'descr': '<f8', 'fortran_order': False,
                                                 'shape': (10 ** 12, 1000)})
    damaged = [good[:n] for n in (0, 1, 31, 32, 33, 40, len(good) - 1)]
    damaged += [good + b'\0', good * 2, bytes(len(good)), objects.getvalue(), claim.getvalue(),
                pickle.dumps(Pickled(str(tmp_path / 'unpickled'))).ljust(len(good), b'.')]
    for place in range(0, len(good), 7):
        damaged.append(good[:place] + bytes([good[place] ^ 16]) + good[place + 1:])
    for contents in damaged:
        with open(path, 'wb') as f:
            f.write(contents)
        squares, even, began = filled(path)
        assert began == [0, 4, 8], contents
        assert (squares == np.arange(10) ** 2).all() and even.tolist() == [True, False] * 5
    assert not os.path.exists(tmp_path / 'unpickled')
    with open(path, 'wb') as f:
        f.write(good)
    assert filled(path)[2] == [8]
    for other in ({'size': 5}, {'n': 20}):  # 4 of 5 to a batch, other shapes
        with open(path, 'wb') as f:
            f.write(good)
        assert filled(path, **other)[2][0] == 0


def test_a_folder_that_is_removed_in_the_meantime_stops_nothing(tmp_path):
    path = str(tmp_path / 'folder' / 'a.part')
    for start, _ in unfinished.batches(path, [np.zeros(8)], 8, 4, 'a'):
        if start == 4:
            shutil.rmtree(tmp_path / 'folder')
    assert os.path.exists(path)
    unfinished.remove([path])
    assert os.listdir(tmp_path) == []


def test_a_second_program_at_the_same_work_stops_nothing(tmp_path, monkeypatch):
    """It may move the file that both write into its place just before the first one does."""
    path, replace = str(tmp_path / 'a.part'), os.replace
    monkeypatch.setattr(os, 'replace', lambda a, b: replace(a, b) or replace(a, b))
    assert filled(path, stop=8)[2] == [0, 4]
    assert filled(path)[2] == [8]


def test_other_weights_settings_images_or_code_are_other_files(
        small_model, small_config, data, tmp_path, monkeypatch):
    """And what does not change a number does not."""
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(unfinished, 'ROOT', str(tmp_path))
    prefix = str(tmp_path / 'checkpoint-7')
    small_model.save_madry_checkpoint(prefix, global_step=7)
    names = ['clean', 'pgd', 'apgd']

    def files(modes=INFERENCE_MODES, num_draws=1, **settings):
        unfinished.code.cache_clear()
        digests = unfinished.checkpoint_digest(prefix), unfinished.data_digest(data)
        return kept_files('eval', *digests, small_config(**settings), names, modes, num_draws)

    try:
        first = files()
        assert len(set(first.values())) == 3
        assert files(model_dir='moved', num_output_steps=7, num_attack_examples={'cw': 3}) == first
        for other in (files(['pn']), files(num_draws=2), files(eval_batch_size=10),
                      files(epsilon=9.), files(np_random_seed=1), files(num_eval_examples=40)):
            assert not set(first.values()) & set(other.values())
        of_apgd = files(apgd_num_steps=9)
        assert [of_apgd[name] == first[name] for name in names] == [True, True, False]
        fewer = files(num_attack_examples={'pgd': 3})
        assert [fewer[name] == first[name] for name in names] == [True, False, True]
        data.eval_data.xs[0, 0, 0, 0] ^= 1
        assert not set(first.values()) & set(files().values())
        data.eval_data.xs[0, 0, 0, 0] ^= 1
        assert files() == first
        small_model.variables_by_name['logit/biases'].assign_add(np.eye(10)[3])
        small_model.save_madry_checkpoint(prefix, global_step=7)
        second = files()
        assert not set(first.values()) & set(second.values())
        with open(tmp_path / 'train.py', 'a') as f:
            f.write('# changed\n')
        assert not set(second.values()) & set(files().values())
    finally:
        unfinished.code.cache_clear()


@pytest.mark.parametrize('measure', [experiments.logit_errors, experiments.perturbation_sizes])
def test_the_in_text_experiments_resume_where_they_were_stopped(
        small_model, small_config, data, tmp_path, measure, monkeypatch):
    config = small_config(num_eval_examples=48, num_steps=1)
    whole = measure(small_model, data, config)
    kept, original, began = str(tmp_path / 'a.part'), experiments.batches, []

    def stopped(*args):
        for start, end in original(*args):
            if start == 32 and not began.count(32):
                began.append(start)
                raise KeyboardInterrupt
            began.append(start)
            yield start, end

    monkeypatch.setattr(experiments, 'batches', stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(small_model, data, config, kept)
    again = measure(small_model, data, config, kept)
    assert began == [0, 16, 32, 32]
    assert all((again[name] == whole[name]).all() for name in whole)


def test_an_evaluation_that_was_stopped_resumes_and_leaves_nothing_else(
        small_model, small_config, data, tmp_path, monkeypatch):
    config = small_config(model_dir=str(tmp_path), max_num_training_steps=7)
    small_model.save_madry_checkpoint(tmp_path / 'checkpoint-7', global_step=7)

    def evaluation(folder):
        return cells.Evaluations('pgd_adv_only', config, data, unfinished.data_digest(data),
                                 small_model, str(tmp_path / folder)).attack('pgd')

    whole, began, original = evaluation('whole'), [], cells.make_attack

    def stoppable(*args):
        perturb, settings = original(*args)

        def attack(start, end):
            began.append(start)
            if began == [0, 20]:
                raise KeyboardInterrupt
            return perturb(start, end)
        return attack, settings

    monkeypatch.setattr(cells, 'make_attack', stoppable)
    with pytest.raises(KeyboardInterrupt):
        evaluation('stopped')
    assert os.listdir(tmp_path / 'stopped') == ['unfinished']
    again = evaluation('stopped')
    assert began == [0, 20, 20, 40]
    names = os.listdir(tmp_path / 'stopped')
    assert names == os.listdir(tmp_path / 'whole') and len(names) == 1  # the result, no more
    assert without_seconds(again.pop('results')) == without_seconds(whole.pop('results'))
    for cell in (again, whole):
        assert cell.pop('provenance')['code'] == unfinished.code()[0][:16]
    assert again == whole


# ---- large results


def stored(path, what='this', stop=None, n=10, size=4):
    """Fills and finishes a .npy file by `appended`; returns where each batch that it did began."""
    array, began = np.empty([n, 3], np.float32), []
    for start, end in unfinished.appended(path, array, size, what, 'numbers'):
        if start == stop:
            return began
        began.append(start)
        array[start:end] = np.arange(3 * start, 3 * end).reshape(-1, 3) / 7
    unfinished.finish(path)
    return began


@pytest.fixture
def numbers(tmp_path):
    """(path to store at, f(): asserts that the file there is what np.save writes, byte for byte)"""
    path, expected = str(tmp_path / 'a.npy'), io.BytesIO()
    np.save(expected, (np.arange(30).reshape(10, 3) / 7).astype(np.float32))

    def check():
        with open(path, 'rb') as f:
            assert f.read() == expected.getvalue()
        assert os.listdir(tmp_path) == ['a.npy']
        os.remove(path)
    return path, check


def test_a_stored_array_goes_on_after_the_last_batch_that_is_whole(numbers):
    path, check = numbers
    assert stored(path) == [0, 4, 8]
    check()
    assert [stored(path, stop=stop) for stop in (0, 4, 8)] == [[], [0], [4]]
    assert stored(path) == [8]
    check()


def test_a_damaged_or_other_part_counts_as_far_as_it_is_right(numbers):
    path, check = numbers
    stored(path, stop=8)
    files = {}
    for name in (f'{path}.part', f'{path}.part.json'):
        with open(name, 'rb') as f:
            files[name] = f.read()
    part, sidecar = files.values()
    header, batch = len(part) - 2 * 48, 48
    first = bytearray(part)
    first[header + 5] ^= 1
    second = bytearray(part)
    second[header + batch + 5] ^= 1
    claims = json.loads(sidecar)
    claims['digests'] *= 9
    cases = [(part, sidecar, 8), (part[:-1], sidecar, 4), (part[:header + batch], sidecar, 4),
             (part[:header], sidecar, 0), (part[:7], sidecar, 0), (b'', sidecar, 0),
             (bytes(first), sidecar, 0), (bytes(second), sidecar, 4),
             (part + b'cut off', sidecar, 8), (part + bytes(9999), sidecar, 8),
             (part[:20] + b'9' + part[21:], sidecar, 0),
             (part, b'', 0), (part, sidecar[:-9], 0), (part, b'[]', 0), (part, b'{"what": 1}', 0),
             (part, sidecar.replace(b'"this"', b'"that"'), 0),
             (part, json.dumps({**json.loads(sidecar), 'digests': 3}).encode(), 0),
             (part, json.dumps({**json.loads(sidecar), 'digests': [[], {}]}).encode(), 0),
             (part, json.dumps(claims).encode(), 8)]
    for part, sidecar, goes_on in cases:
        for name, contents in zip(files, (part, sidecar)):
            with open(name, 'wb') as f:
                f.write(contents)
        assert stored(path)[0] == goes_on, (part, sidecar)
        check()


def test_what_another_program_wrote_into_the_part_is_not_taken(tmp_path):
    path, array = str(tmp_path / 'a.npy'), np.zeros([8, 3], np.float32)
    with pytest.raises(UserError, match='another program has written to .*a.npy.part'):
        for start, _ in unfinished.appended(path, array, 4, 'this', 'numbers'):
            if start == 4:
                with open(f'{path}.part', 'r+b') as f:
                    f.seek(130)
                    f.write(b'other')


def test_a_full_disk_is_named_and_keeps_what_is_finished(tmp_path):
    """A limit on the size of files stands in for the disk: it takes three batches and a half."""
    path, array = str(tmp_path / 'a.npy'), np.zeros([6, 2 ** 18], np.float32)

    def fill():
        for start, end in unfinished.appended(path, array, 1, 'this', 'numbers'):
            array[start:end] = start
            yield start

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7 * 2 ** 19, before[1]))
    try:
        with pytest.raises(OSError) as error:
            list(fill())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == f'{path}.part' and error.value.strerror == 'File too large'
    assert list(fill()) == [3, 4, 5]
    unfinished.finish(path)
    assert (np.load(path) == np.arange(6)[:, None]).all()


# ---- programs, killed


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a checkpoint of an untrained network and its configuration."""
    folder = tmp_path_factory.mktemp('model')
    keras.utils.set_random_seed(0)
    Model(1, 1).save_madry_checkpoint(folder / 'checkpoint-7', global_step=7)
    store_config(load_config(None, [
        'dataset=synthetic', 'num_residual_units=1', 'width_factor=1', 'training_batch_size=16',
        'num_eval_examples=110', 'eval_batch_size=20', 'num_steps=20', 'shaping_batch_size=20',
        f'model_dir={folder}']), str(folder / 'config.json'))
    return folder


@pytest.fixture
def never_stopped(folder):
    """(model, data, configuration) of that folder, to compute here what a program is to find."""
    config = load_config(str(folder / 'config.json'))
    model = Model(1, 1)
    model.load_madry_checkpoint(str(folder / 'checkpoint-7'))
    return model, load_data(config), config


def start(name, folder, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, os.path.join(ROOT, name), '--model_dir', str(folder), '--checkpoint',
         str(folder / 'checkpoint-7'), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, text=True, **options)


def ended(process):
    stdout, stderr = process.communicate(timeout=120)
    assert 'Traceback' not in stderr, stderr
    return process.returncode, stdout, stderr


def kill_after(process, moment):
    """Kills a process with SIGKILL, at a random moment soon after moment() is true."""
    until = time.monotonic() + 100
    while not moment():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it was not through yet
    process.communicate()


def test_eval_goes_on_after_a_kill(folder, never_stopped):
    options = ['--attack', 'fgsm,pgd', '--inference', 'pn,bn_shaping', '--num_draws', '2']
    kill_after(start('eval.py', folder, *options),
               lambda: glob.glob(f'{folder}/eval/unfinished/pgd-*.part'))
    assert not os.path.exists(folder / 'eval' / 'results.json')
    status, stdout, stderr = ended(start('eval.py', folder, *options))
    assert status == 0, stderr
    assert 'fgsm: resuming after 110 of 110 examples' in stdout
    assert 'pgd: resuming after ' in stdout
    with open(folder / 'eval' / 'results.json') as f:
        results = json.load(f)['results']
    expected = evaluate(*never_stopped, ['fgsm', 'pgd'], ['pn', 'bn_shaping'], 2)
    assert without_seconds(results) == without_seconds(expected) and len(results) == 8
    assert not os.path.exists(folder / 'eval' / 'unfinished')


def test_pgd_attack_goes_on_after_a_kill(folder, tmp_path, never_stopped):
    option = f'--set=store_adv_path={tmp_path}/a.npy'
    kill_after(start('pgd_attack.py', folder, option),
               lambda: os.path.exists(tmp_path / 'a.npy.part.json'))
    assert not os.path.exists(tmp_path / 'a.npy')
    status, stdout, stderr = ended(start('pgd_attack.py', folder, option))
    assert status == 0, stderr
    assert 'pgd: resuming after ' in stdout and os.listdir(tmp_path) == ['a.npy']
    attack, expected = make_attack('pgd', *never_stopped)[0], io.BytesIO()
    np.save(expected, np.concatenate([attack(i, min(i + 20, 110)) for i in range(0, 110, 20)]))
    with open(tmp_path / 'a.npy', 'rb') as f:
        assert f.read() == expected.getvalue()


# ---- a training that reproduce.py stops

CHILD = '''
import os, signal, sys, time
def told(number, _):
    global left
    print(signal.Signals(number).name, file=out, flush=True)
    left = min(left, time.monotonic() + 0.5)
left = time.monotonic() + 30
out = open(sys.argv[1], 'w')
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, told)
print('ready', file=out, flush=True)
while time.monotonic() < left:
    time.sleep(0.02)
print('saved', file=out, flush=True)
sys.exit(75)
'''
DRIVER = f'''
import sys
sys.path.insert(0, {ROOT!r})
from running.program import run
from paper.trainings import run_to_its_end
run(lambda: run_to_its_end([sys.executable, '-c', {CHILD!r}, 'out']))
'''


def wait_until_ready(path):
    until = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize('number, stop', [
    (signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)])
def test_a_training_is_told_once_to_stop_and_waited_for(number, stop, tmp_path):
    def signalled():
        wait_until_ready(tmp_path / 'out')
        os.kill(os.getpid(), number)

    before = signal.signal(number, lambda *_: None)  # where ours fails, these tests go on
    try:
        thread = threading.Thread(target=signalled)
        thread.start()
        with pytest.raises(KeyboardInterrupt) as stopped:
            trainings.run_to_its_end([sys.executable, '-c', CHILD, str(tmp_path / 'out')])
        thread.join()
    finally:
        signal.signal(number, before)
    assert type(stopped.value) is stop
    assert (tmp_path / 'out').read_text().split() == ['ready', 'SIGTERM', 'saved']


def test_a_terminals_ctrl_c_reaches_the_training_once(tmp_path):
    """It goes to the whole process group; a second signal would make train.py leave unsaved."""
    driver = subprocess.Popen(
        [sys.executable, '-c', DRIVER], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_until_ready(tmp_path / 'out')
    os.killpg(driver.pid, signal.SIGINT)
    _, stderr = driver.communicate(timeout=60)
    assert driver.returncode == 130 and 'Traceback' not in stderr and ': stopped' in stderr
    assert (tmp_path / 'out').read_text().split() == ['ready', 'SIGTERM', 'saved']


def test_a_training_that_someone_else_stopped_stops_reproduce(
        small_config, tmp_path, monkeypatch, capsys):
    config = small_config(model_dir=str(tmp_path))
    monkeypatch.setattr(trainings, 'run_to_its_end', lambda command: 75)
    with pytest.raises(SystemExit) as stop:
        trainings.train_if_missing('pgd_adv_only', config, config)
    assert stop.value.code == 75
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'the training of pgd_adv_only was stopped' in err


# ---- what is shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stderr, monkeypatch):
    """Returns what a loop over 100 examples, 40 of them done before, shows in two minutes."""
    now = 1000.
    monkeypatch.setattr(progress, 'monotonic', lambda: now)
    with contextlib.redirect_stderr(stderr), progress.progress('pgd', 100, 40) as update:
        for seconds, examples in ((30, 10), (31, 10), (30, 20), (31, 10), (30, 10)):
            now += seconds
            update(examples)
    return stderr.getvalue().splitlines()


def test_a_log_of_long_work_has_a_line_a_minute(monkeypatch):
    assert shown(io.StringIO(), monkeypatch) == [
        'pgd: 60 of 100 examples, 0.328 a second, 0:02:02 left',
        'pgd: 90 of 100 examples, 0.41 a second, 0:00:24 left']


def test_a_terminal_has_a_bar(monkeypatch):
    lines = shown(Terminal(), monkeypatch)
    assert any('pgd: ' in line and '40/100' in line and 'example/s' in line for line in lines)


def test_a_short_loop_leaves_no_line_in_a_log(capsys):
    with progress.progress('pgd', 100) as update:
        for _ in range(5):
            update(20)
    assert capsys.readouterr().err == ''

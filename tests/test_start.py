"""The first minute: a quiet start, help, and mistakes that are reported before TensorFlow loads."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from paper.tables import TABLES
from running import quiet
from test_programs import program

PROGRAMS = ('train.py', 'eval.py', 'pgd_attack.py', 'run_attack.py', 'reproduce.py', 'bench.py',
            'fetch_model.py', 'export.py', 'classify.py')


@pytest.fixture
def no_tensorflow(tmp_path, monkeypatch):
    """Makes the import of TensorFlow or Keras fail in the programs that a test starts."""
    for name in ('tensorflow', 'keras'):
        (tmp_path / 'broken' / name).mkdir(parents=True)
        (tmp_path / 'broken' / name / '__init__.py').write_text('raise SystemError("imported")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'broken'))


@pytest.mark.parametrize('name, option', [
    *((name, '--help') for name in PROGRAMS), ('train.py', '-h'), ('train.py', '--helpfull')])
def test_help_shows_an_example_and_our_options_without_tensorflow(no_tensorflow, name, option):
    status, stdout, stderr = program(name, option)
    assert status == 0 and stderr == []
    assert f'python {name}' in stdout and 'Options:' in stdout
    assert '13% above' in stdout or name != 'bench.py'  # a % in the text stays one
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        for flag in re.findall(r"flags\.DEFINE_\w+\('(\w+)'", f.read()):
            assert f'--{flag}: ' in stdout
    assert '--stderrthreshold' not in stdout  # absl's own


def test_help_lists_the_words_that_a_program_takes(no_tensorflow):
    _, stdout, _ = program('eval.py', '--help')
    assert 'adaptive_weak' in stdout and 'bn_shaping' in stdout
    _, stdout, _ = program('fetch_model.py', '--help')
    assert 'adv_trained' in stdout
    _, stdout, _ = program('reproduce.py', '--help')
    targets = re.search('Targets: (.*?), or all', stdout, re.DOTALL)[1]
    assert re.findall(r'\w+', targets) == list(TABLES)


@pytest.mark.parametrize('arguments, said', [
    (['train.py', '--epsilon=8'], '--epsilon is a key of the configuration, not an option; '
     'expected --set epsilon=VALUE'),
    (['train.py', '--conifg', 'x'], '--conifg is not an option; did you mean --config?'),
    (['train.py', '--xyz'], '--xyz is not an option; train.py --help lists them'),
    (['train.py', '--logical_cpus=two'], "--logical_cpus must be an integer, got 'two'"),
    (['reproduce.py', '--task_cpus=-1'], "--task_cpus must be a non-negative number, got '-1'"),
    (['train.py', '--profile=maybe'], "--profile must be true or false, got 'maybe'"),
    (['train.py', '--set', 'epsilon'], "--set 'epsilon': expected key=value"),
    (['train.py', '--set', 'epsilonn=8'], "unknown key 'epsilonn'; did you mean epsilon?"),
    (['train.py', '--set', 'epsilon=300'], 'epsilon must be a number from 0 to 255, got 300'),
    (['train.py', '--config', 'none.json'], 'none.json cannot be read: No such file or directory'),
    (['train.py', 'configs/quick.json'], "'configs/quick.json' is not an option; train.py --help "
     'lists them'),
    (['eval.py', '--model_dir', 'none'], 'none is no folder; expected the folder of a training'),
    (['eval.py', '--model_dir', os.sep], f'{os.sep} holds no config.json; expected the folder'),
    (['classify.py', '--model_dir', 'one'], '--model_dir is not an option; did you mean --model?'),
    (['eval.py', '--model_dir', 'one', '--set', 'model_dir=other'],
     'one and --set model_dir=other each name a folder; expected one of them'),
    (['eval.py', '--attack', 'pdg'], "--attack is 'pdg'; expected clean, fgsm, pgd, cw"),
    (['run_attack.py', '--inference', 'pm'], "--inference is 'pm'; expected bn, pn, bn_shaping"),
    (['bench.py', '--set', 'training_batch_size=0'], 'training_batch_size must be an integer, 2 '),
    (['fetch_model.py', 'other'], "'other' is none of natural, adv_trained, secret")])
def test_a_mistake_is_reported_before_tensorflow_is_imported(
        no_tensorflow, tmp_path, arguments, said):
    status, stdout, stderr = program(*arguments, cwd=tmp_path)
    assert status == 2 and stdout == ''
    assert len(stderr) == 1 and stderr[0].startswith(f'{arguments[0]}: {said}'), stderr


def test_logical_cpus_without_several_devices_are_refused(tmp_path):
    status, stdout, stderr = program('train.py', '--logical_cpus=2', '--set=dataset=synthetic',
                                     f'--set=model_dir={tmp_path}')
    assert (status, stdout) == (2, '') and os.listdir(tmp_path) == []
    assert stderr[0].endswith('expected --set distribution=mirrored')


def test_a_start_prints_our_lines_only(tmp_path):
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, 'run_attack.py'), '--set', 'dataset=synthetic',
         '--set', f'model_dir={tmp_path}'], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, '')
    assert [line.partition(': ')[0] for line in done.stderr.splitlines()] == ['run_attack.py']


def run_python(code, **environment):
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, timeout=300,
                          capture_output=True, env={**os.environ, **environment}).stderr


@pytest.mark.parametrize('words, said', [
    ('Graph execution error:\n\n{{node}} OOM when allocating tensor with shape[5000,160]\n',
     'allocating tensor with shape[5000,160]'),
    ('Out of memory while trying to allocate 7 bytes.\n\tThe step',
     'while trying to allocate 7 bytes.')])
def test_full_memory_is_one_line_and_a_full_disk_is_not_called_so(words, said):
    """TensorFlow raises the same class for both; the line that tells may stand below a heading."""
    code = ('from running.program import run\n'
            'class ResourceExhaustedError(Exception): pass\n'
            'def main(): raise ResourceExhaustedError({!r})\n'
            'run(main)')
    assert run_python(code.format(words)) == (
        f'-c: memory is full: {said}; expected smaller batches or a smaller network\n')
    assert 'Traceback' in run_python(code.format('/x; No space left on device'))


def test_the_notices_are_shown_again_on_request():
    assert run_python('import running.quiet', TF_CPP_MIN_LOG_LEVEL='0') != ''
    assert run_python('import running.quiet', TF_CPP_MIN_LOG_LEVEL='2') == ''


def test_an_error_of_the_libraries_still_comes_through(capfd):
    with quiet.without_notices():
        os.write(2, b'WARNING: All log messages before absl::InitializeLog() is called are ...\n'
                    b'I0000 00:00:1 1 cudart_stub.cc:31] Could not find cuda drivers\n'
                    b'E0000 00:00:1 1 gpu_kernel.cc:7] out of memory\nSegmentation fault\n')
    assert capfd.readouterr().err == ('E0000 00:00:1 1 gpu_kernel.cc:7] out of memory\n'
                                      'Segmentation fault\n')


def test_what_was_printed_before_a_failing_import_is_not_lost(capfd):
    with pytest.raises(ImportError), quiet.without_notices():
        os.write(2, b'libfoo.so: cannot open shared object file\n')
        raise ImportError
    assert 'libfoo.so' in capfd.readouterr().err


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports_ends_with_one_line(tmp_path, monkeypatch, number, status):
    (tmp_path / 'tensorflow').mkdir()
    (tmp_path / 'tensorflow' / '__init__.py').write_text(
        'import time; print("importing", flush=True); time.sleep(60)')
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'train.py')], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert process.stdout.readline() == 'importing\n'
    begin = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - begin < 2
    assert (process.returncode, stderr.strip()) == (status, 'train.py: stopped')

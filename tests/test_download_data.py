"""CIFAR-10 that is not there: what is downloaded, what is refused, and what a signal does then."""
import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import cifar10_input
from cifar10_input import load_data
from config import load_config
from conftest import ROOT
from running import UserError, datasets

TRAIN = """
import runpy, sys
sys.path.insert(0, {root!r})
import cifar10_input
cifar10_input.ADDRESS = {address!r}
sys.argv = ['train.py', '--set', {setting!r}, '--download']
runpy.run_path({root!r} + '/train.py', run_name='__main__')
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers HEAD; as a proxy for https it never answers: so TensorFlow Datasets waits."""
    asked, gone = threading.Event(), threading.Event()

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_CONNECT(self):
        self.asked.set()
        self.connection.recv(1)  # until the other side is gone
        self.gone.set()

    def log_message(self, *_):
        pass


@pytest.fixture
def stalling():
    """The port of a server that answers, but lets the download itself wait."""
    Handler.asked.clear()
    Handler.gone.clear()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture
def silent():
    """The port of a server that accepts and never answers."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def training(port, folder):
    """A train.py that downloads from a local server into a folder."""
    script = TRAIN.format(root=ROOT, setting=f'data_path={folder}',
                          address=f'http://127.0.0.1:{port}/cifar-10-binary.tar.gz')
    process = subprocess.Popen(
        [sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=os.path.dirname(folder), env={**os.environ, 'HTTPS_PROXY': f'http://127.0.0.1:{port}'},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def asked(process):
    """Waits until a training says that it downloads."""
    line = process.stdout.readline()
    assert ': downloading 160 MB from http://127.0.0.1' in line


@pytest.mark.parametrize('number, when', [(signal.SIGTERM, 'in the middle'),
                                          (signal.SIGINT, 'before an answer')])
def test_a_signal_during_the_download_ends_the_program(request, tmp_path, number, when):
    port = request.getfixturevalue('silent' if when == 'before an answer' else 'stalling')
    with training(port, str(tmp_path / 'data')) as process:
        asked(process)
        if when == 'in the middle':
            assert Handler.asked.wait(60)
        else:
            time.sleep(1)
        process.send_signal(number)
        assert process.wait(2) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        if when == 'in the middle':
            assert Handler.gone.wait(2)
        assert 'Traceback' not in process.stderr.read()


def test_a_killed_program_leaves_no_download_behind(stalling, tmp_path):
    with training(stalling, str(tmp_path / 'data')) as process:
        assert Handler.asked.wait(60)
        process.kill()
        assert Handler.gone.wait(5)


def test_a_server_that_does_not_answer_is_named_soon(silent, tmp_path):
    with training(silent, str(tmp_path / 'data')) as process:
        asked(process)
        begin = time.monotonic()
        assert process.wait(15) == 2
        assert time.monotonic() - begin < datasets.ANSWER + 5  # an exit takes TensorFlow its time
        last = process.stderr.read().splitlines()[-1]
    assert last.startswith('train.py: CIFAR-10 cannot be downloaded into data_path ')
    assert ': 127.0.0.1 does not answer within ' in last
    assert 'data_batch_1..5, test_batch and batches.meta, or a TensorFlow Datasets dir' in last
    assert not os.path.exists(tmp_path / 'data')


@pytest.mark.parametrize('address, said', [
    ('http://host.invalid/a', 'host.invalid cannot be reached: '),
    ('http://127.0.0.1:9/a', '127.0.0.1 cannot be reached: Connection refused')])
def test_a_host_that_cannot_be_reached_is_named_at_once(tmp_path, address, said):
    begin = time.monotonic()
    with pytest.raises(datasets.Unreachable) as error:
        datasets.prepare('cifar10', str(tmp_path / 'data'), address)
    assert str(error.value).startswith(said) and '\n' not in str(error.value)
    assert time.monotonic() - begin < datasets.ANSWER + 1
    assert not os.path.exists(tmp_path / 'data')


def test_what_fails_later_is_told_in_one_line(stalling, tmp_path):
    with pytest.raises(UserError, match='no_such_set') as error:
        datasets.prepare('no_such_set', str(tmp_path), f'http://127.0.0.1:{stalling}/a')
    assert '\n' not in str(error.value) and not isinstance(error.value, datasets.Unreachable)


def test_the_address_is_the_packages_own():
    tfds = pytest.importorskip('tensorflow_datasets')
    assert list(tfds.builder_cls('cifar10').url_infos) == [cifar10_input.ADDRESS]


# ---- which folders are downloaded into


@pytest.fixture
def downloads(monkeypatch):
    """The list of folders that were to be downloaded into; the download fails."""
    folders = []

    def prepare(_, folder, __):
        folders.append(folder)
        raise UserError('no network')
    monkeypatch.setattr(cifar10_input, 'prepare', prepare)
    return folders


@pytest.mark.parametrize('there', [True, False])
def test_a_mistyped_data_path_is_refused_and_not_made(tmp_path, downloads, there):
    path = tmp_path / 'cifar_data'
    if there:
        path.mkdir()
    config = load_config(None, [f'data_path={path}'])
    with pytest.raises(UserError, match=f'data_path {path} .*; expected a folder with data_batch_1.'
                       '.5, test_batch and batches.meta, or .* or --download') as error:
        load_data(config)
    assert '\n' not in str(error.value)
    assert downloads == [] and os.path.exists(path) == there
    with pytest.raises(UserError, match='no network'):
        load_data(config, download=True)
    assert downloads == [str(path)]


def test_the_default_folder_is_downloaded_into_unasked(tmp_path, downloads, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='no network'):
        load_data(load_config())
    assert downloads == ['cifar10_data']

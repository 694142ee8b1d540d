"""Fetching a released model: from servers and in archives that misbehave, and in a good one."""
import hashlib
import http.server
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest

from conftest import CHECKPOINT, ROOT, archive
import fetch_model
from model import Model
from running import UserError, download as downloading, untrusted
from running.download import check_url, download
from running.untrusted import find_checkpoints, unpack
from test_programs import program


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` from every address, by ranges, and misbehaves as its attributes say."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/model.zip'
        self.body, self.etag = b'', '"first"'
        self.content_type = 'application/zip'
        self.cuts = []            # of each answer in turn: how many bytes are sent before a cut
        self.stall = False        # instead of cutting, send nothing more and keep the line open
        self.ranges = True        # False: ranges are ignored
        self.chunked = False      # True: no Content-Length
        self.extra_length = 0     # added to the true Content-Length
        self.shift = 0            # added to where a Content-Range says that it starts
        self.asked = []           # (Range, If-Range) of each request
        self.served = []          # (first byte, byte after the last) of each answer
        self.status = None        # answered to every request instead
        self.location = None      # likewise, with status: where it leads
        self.over = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, body, start = self.server, self.server.body, 0
        wanted, condition = self.headers['Range'], self.headers['If-Range']
        server.asked.append((wanted, condition))
        self.close_connection = True
        if server.status:
            self.send_response(server.status)
            if server.location:
                self.send_header('Location', server.location)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        if wanted and server.ranges and condition in (None, server.etag):
            start = int(re.fullmatch(r'bytes=(\d+)-', wanted)[1])
        if start >= len(body) > 0:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(body)}')
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start + server.shift}-{len(body) - 1}/'
                                              f'{len(body) + server.extra_length}')
        if server.etag:
            self.send_header('ETag', server.etag)
        self.send_header('Content-Type', server.content_type)
        if server.chunked:
            self.send_header('Transfer-Encoding', 'chunked')
        else:
            self.send_header('Content-Length', str(len(body) - start + server.extra_length))
        self.end_headers()
        end = min(len(body), start + server.cuts.pop(0)) if server.cuts else len(body)
        server.served.append((start, end))
        if server.chunked:
            self.wfile.write(b'%x\r\n' % (len(body) - start))
        self.wfile.write(body[start:end])
        if server.chunked and end == len(body):
            self.wfile.write(b'\r\n0\r\n\r\n')
        if server.stall and end < len(body):
            self.wfile.flush()
            server.over.wait(20)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(downloading, 'WAITS', (0, 0))
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.body = archive(random_model())
        yield server
        server.over.set()
        server.shutdown()


def random_model(folder='natural/', seed=0):
    """Names and contents of what passes for a checkpoint, and does not compress."""
    data = np.random.default_rng(seed).bytes(300_000)
    return [(f'{folder}checkpoint', b'model_checkpoint_path: "checkpoint-70000"\n'),
            (f'{folder}checkpoint-70000.index', b'index'),
            (f'{folder}checkpoint-70000.data-00000-of-00001', data)]


def as_type(name, kind, system=3):
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = system, (kind | 0o777) << 16
    return entry


@pytest.fixture
def path(tmp_path):
    """Where the archive is to be; its folder does not exist yet."""
    return str(tmp_path / 'models' / 'natural.zip')


def read(path):
    with open(path, 'rb') as f:
        return f.read()


def fails(match):
    return pytest.raises(UserError, match=match)


# The download


def interrupted(server, path, at, monkeypatch, checked=False):
    """Leaves the part of a download that ended after so many bytes."""
    with monkeypatch.context() as m:
        m.setattr(downloading, 'WAITS', ())
        server.cuts = [at]
        with fails('the same command tries again'):
            download(server.url, path, checked)
    assert os.path.getsize(f'{path}.part') == at and not os.path.exists(path)


def test_a_download_that_was_cut_goes_on_where_it_was(server, path, monkeypatch):
    """By the same command after it gave up, and by itself; no byte is sent twice."""
    interrupted(server, path, 70_000, monkeypatch)
    server.cuts = [50_000, 0, 100_001]
    download(server.url, path, False)
    assert read(path) == server.body and os.listdir(os.path.dirname(path)) == ['natural.zip']
    assert server.served == [(0, 70_000), (70_000, 120_000), (120_000, 120_000),
                             (120_000, 220_001), (220_001, len(server.body))]
    assert server.asked[0] == (None, None)
    assert set(server.asked[1:]) == {(f'bytes={n}-', '"first"')
                                     for n in (70_000, 120_000, 220_001)}


def test_a_server_that_sends_nothing_more_is_asked_again(server, path, monkeypatch):
    monkeypatch.setattr(downloading, 'TIMEOUT', 0.3)
    server.cuts, server.stall = [90_000], True
    download(server.url, path, False)
    assert read(path) == server.body
    assert server.served[1][0] == 90_000


def test_it_gives_up_when_nothing_new_comes(server, path):
    server.cuts = [60_000] + [0] * 9
    with fails('the connection was cut'):
        download(server.url, path, False)
    assert len(server.asked) == 3 and os.path.getsize(f'{path}.part') == 60_000


def test_a_server_that_ignores_ranges_makes_it_start_over(server, path, monkeypatch, capsys):
    interrupted(server, path, 70_000, monkeypatch)
    server.ranges = False
    download(server.url, path, False)
    assert read(path) == server.body
    assert 'Starting over' in capsys.readouterr().out


@pytest.mark.parametrize('size', [300_000, 30_000])
@pytest.mark.parametrize('heeds_condition', [True, False])
def test_a_file_that_changed_meanwhile_is_not_mixed_with_the_old(
        server, path, monkeypatch, size, heeds_condition):
    """Longer or shorter than the part; also where the server takes no notice of If-Range."""
    interrupted(server, path, 70_000, monkeypatch)
    server.etag = '"second"'
    server.body = archive([('natural/checkpoint', np.random.default_rng(1).bytes(size))])
    if not heeds_condition:
        monkeypatch.setattr(downloading, '_ask', lambda url, start, validator,
                            ask=downloading._ask: ask(url, start, None))
    download(server.url, path, False)
    assert read(path) == server.body


def test_without_etag_a_part_is_gone_on_from_only_when_a_digest_tells(server, path, monkeypatch):
    server.etag = None
    for checked, first in ((False, 0), (True, 70_000)):
        interrupted(server, path, 70_000, monkeypatch, checked)
        download(server.url, path, checked)
        assert read(path) == server.body and server.served[-1][0] == first
        os.remove(path)


def test_the_part_of_another_address_is_not_gone_on_from(server, path, monkeypatch):
    interrupted(server, path, 70_000, monkeypatch)
    download(server.url + '?dl=1', path, True)
    assert read(path) == server.body and server.asked[-1] == (None, None)


def test_a_part_that_is_complete_needs_no_server(server, path, monkeypatch):
    def stopped_at_the_last(old, new, replace=os.replace):
        if not new.endswith('.json'):
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as m:
        m.setattr(os, 'replace', stopped_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            download(server.url, path, False)
    assert os.path.getsize(f'{path}.part') == len(server.body)
    server.status = 500
    download(server.url, path, False)
    assert read(path) == server.body and len(server.asked) == 1


def test_a_size_that_is_unknown_is_no_hindrance(server, path):
    server.chunked, server.cuts = True, [110_000]
    download(server.url, path, False)
    assert read(path) == server.body
    assert [start for start, _ in server.served] == [0, 110_000]


@pytest.mark.parametrize('spoil, named', [
    ({'shift': 1}, "what follows 70000 bytes of .* 'bytes 70001-"),
    ({'shift': -70_000}, "'bytes 0-"),
    ({'extra_length': 5}, 'remove it to start afresh'),
    ({'content_type': 'text/html', 'etag': None, 'body': b' <!DOCTYPE html><p>Sign in'},
     'text/html'),
    ({'status': 404}, 'answers 404 Not Found; --url ADDRESS names another place'),
    ({'status': 503}, 'answers 503'),
    ({'status': 204}, 'answers 204')])
def test_an_answer_that_does_not_fit_costs_nothing_that_came_before(
        server, path, monkeypatch, spoil, named):
    interrupted(server, path, 70_000, monkeypatch)
    came = read(f'{path}.part')
    good = {key: getattr(server, key) for key in spoil}
    for key, value in spoil.items():
        setattr(server, key, value)
    with fails(named) as error:
        download(server.url, path, False)
    assert '\n' not in str(error.value)
    assert read(f'{path}.part') == came
    for key, value in good.items():
        setattr(server, key, value)
    download(server.url, path, False)
    assert read(path) == server.body
    assert server.served[-1][0] == 70_000


def test_a_length_that_promises_too_much_is_told_in_one_line(server, path):
    server.extra_length = 1000
    server.ranges = False
    with fails('the connection was cut') as error:
        download(server.url, path, False)
    assert '\n' not in str(error.value) and not os.path.exists(path)
    server.extra_length = 2 ** 40
    with fails('bytes; expected 4,294,967,296 at most'):
        download(server.url + '?', path, False)


@pytest.mark.parametrize('body, content_type', [
    (b'<html><body>This link was deleted</body></html>', 'text/html; charset=utf-8'),
    (b'<html>', 'application/zip'), (b'', 'application/zip'), (b'\x1f\x8b\x08\x00' * 9, 'x/y')])
def test_what_is_no_zip_archive_is_refused_at_once(server, path, body, content_type):
    server.body, server.content_type = body, content_type
    with fails('sends no zip archive but .*: a dead link?'):
        download(server.url, path, False)
    assert len(server.asked) == 1 and not os.path.exists(os.path.dirname(path))


@pytest.mark.parametrize('url', [
    'ftp://127.0.0.1/a.zip', 'file:///etc/passwd', 'data:,PK', '/a.zip', 'a.zip', 'http://',
    'http://[', 'http://a:99999/', 'http://a/ b', 'http://a/\n', 'http://a/\xe9', 'https:///a'])
def test_only_web_addresses_are_taken(url):
    with fails('expected http://... or https://...'):
        check_url(url)


@pytest.mark.parametrize('location', ['ftp://127.0.0.1/', 'file:///etc/passwd'])
def test_a_redirection_leads_nowhere_else(server, path, location):
    server.status, server.location = 302, location
    with pytest.raises(UserError):
        download(server.url, path, False)


# The archive


def unpacked(tmp_path, body):
    """Unpacks into tmp_path/models/natural; whatever happens, nothing else may come into being."""
    models = tmp_path / 'models'
    models.mkdir(exist_ok=True)
    zipped = tmp_path / 'natural.zip'
    zipped.write_bytes(body)
    before = sorted(os.listdir(tmp_path))
    try:
        unpack(str(zipped), str(models / 'natural'))
    finally:
        assert sorted(os.listdir(tmp_path)) == before
        assert os.listdir(models) in ([], ['natural'])
    return models / 'natural'


@pytest.mark.parametrize('folder', ['', 'natural/', 'models/naturally_trained/'])
def test_the_model_is_found_wherever_the_archive_has_it(tmp_path, folder):
    extra = [('__MACOSX/natural/._checkpoint-70000.index', b'?'),
             ('__MACOSX/natural/._checkpoint-70000.data-00000-of-00001', b'?'), ('empty/', b'')]
    model = unpacked(tmp_path, archive(random_model(folder) + (extra if folder else [])))
    assert find_checkpoints(model) == [str(model / 'checkpoint-70000')]
    assert read(model / 'checkpoint-70000.data-00000-of-00001') == random_model()[2][1]


def test_the_latest_of_several_checkpoints_comes_last(tmp_path):
    model = unpacked(tmp_path, archive([(f'm/checkpoint-{step}.{end}', b'x') for end in (
        'data-00000-of-00001', 'index') for step in (9000, 70000, 100)]))
    assert [os.path.basename(prefix) for prefix in find_checkpoints(model)] == [
        'checkpoint-100', 'checkpoint-9000', 'checkpoint-70000']


def test_no_program_is_unpacked_beside_a_checkpoint(tmp_path):
    """classify.py runs a SavedModel that lies in the folder; a .meta holds a graph."""
    extra = [(f'natural/{name}', b'evil') for name in (
        'saved_model.pb', 'variables/variables.index.py', 'checkpoint-70000.meta', 'config.json',
        'eval/results.json', 'checkpoint.py')]
    model = unpacked(tmp_path, archive(random_model() + extra))
    assert sorted(name for _, _, names in os.walk(model) for name in names) == [
        'checkpoint', 'checkpoint-70000.data-00000-of-00001', 'checkpoint-70000.index']


@pytest.mark.parametrize('name', [
    '../evil', 'natural/../../evil', '/evil', '//evil', 'natural//evil', './evil', 'natural/./evil',
    'C:evil', 'C:/evil', 'C:\\evil', '..\\evil', 'natural\\..\\..\\evil', '\\\\host\\evil', '..',
    'natural/..', 'evil\x00.txt', 'evil\n', '/', 'natural/.. /evil', 'file:stream'])
def test_an_entry_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    entry = zipfile.ZipInfo('placeholder')
    entry.filename = name  # past zipfile's own tidying
    with fails('could lead elsewhere') as error:
        unpacked(tmp_path, archive([*random_model(), (entry, b'evil')]))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['LNK', 'CHR', 'BLK', 'IFO', 'SOCK'])
@pytest.mark.parametrize('system', [3, 0])
def test_an_entry_that_is_no_file_is_refused(tmp_path, kind, system):
    link = as_type('natural/out', getattr(stat, f'S_IF{kind}'), system)
    with fails("'natural/out', which is no plain file"):
        unpacked(tmp_path, archive([(link, b'/tmp'), *random_model()]))


@pytest.mark.parametrize('entries', [
    [('natural/a', b'1'), ('natural/a', b'2')], [('natural/a', b'1'), ('natural/a/b', b'2')],
    [('natural/a/b', b'1'), ('natural/a', b'2')], [('natural/a', b'1'), ('natural/a/', b'')]])
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_name_given_twice_is_refused(tmp_path, entries):
    with fails("'natural/a.*twice, or as a file and a folder"):
        unpacked(tmp_path, archive([*random_model(), *entries]))


def test_a_bomb_is_refused_whatever_its_headers_say(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, 'MAX_BYTES', 1_000_000)
    body = archive([*random_model(), ('natural/zeros', bytes(3_000_000))])
    with fails('3,300,0.. bytes unpacked; expected 10,000 and 1,000,000 at most'):
        unpacked(tmp_path, body)
    # the true size is in the entry's own header and in the archive's table; claim 5 bytes instead
    assert body.count((3_000_000).to_bytes(4, 'little')) == 2
    with fails('is damaged: Bad CRC-32'):
        unpacked(tmp_path, body.replace((3_000_000).to_bytes(4, 'little'), b'\5\0\0\0'))
    monkeypatch.setattr(untrusted, 'check_entries', lambda entries: None)
    with fails('unpacks to more than 1,000,000 bytes'):
        unpacked(tmp_path, body)
    monkeypatch.undo()
    with fails('10,001 entries'):
        unpacked(tmp_path, archive([(f'{n}/', b'') for n in range(10_001)]))


@pytest.mark.parametrize('compression', [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_unpacks_without_bounds_is_refused(tmp_path, compression):
    with fails('neither of deflate and store'):
        unpacked(tmp_path, archive(random_model(), compression))


def damaged():
    body = archive(random_model())
    flipped = bytearray(body)
    flipped[150_000] ^= 1
    encrypted = bytearray(body)
    encrypted[body.index(b'PK\1\2') + 8] |= 1
    return {'cut': body[:200_000], 'short by a byte': body[:-1], 'flipped': bytes(flipped),
            'headless': b'PK' + bytes(1000), 'empty': b'', 'tail only': body[-90:],
            'encrypted': bytes(encrypted)}


@pytest.mark.parametrize('how', damaged())
def test_a_damaged_archive_is_told_in_one_line(tmp_path, how):
    with fails('is damaged: ') as error:
        unpacked(tmp_path, damaged()[how])
    assert '\n' not in str(error.value)


def test_an_archive_without_a_checkpoint_is_refused(tmp_path):
    with fails('holds no checkpoint'):
        unpacked(tmp_path, archive([('natural/checkpoint-7.index', b''), ('a.data-0', b'')]))


def test_an_unpacking_that_was_stopped_leaves_no_half_model(tmp_path, monkeypatch):
    def stop(archive, entry):
        yield b'begun'
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(untrusted, '_contents', stop)
        with pytest.raises(KeyboardInterrupt):
            unpacked(tmp_path, archive(random_model()))
    (tmp_path / 'models/natural.unpacking/natural').mkdir(parents=True)  # as a killed one would
    unpacked(tmp_path, archive(random_model()))


# The program


def fetch(name, tmp_path, *arguments):
    return program('fetch_model.py', name, *arguments, cwd=tmp_path)


def test_a_digest_that_does_not_fit_puts_the_file_aside(server, tmp_path):
    """Of `secret` it is known; the next run starts afresh."""
    found = hashlib.sha256(server.body).hexdigest()
    for _ in range(2):
        status, _, stderr = fetch('secret', tmp_path, '--url', server.url)
        assert status == 2 and len(stderr) == 1
        assert found in stderr[0] and fetch_model.MODELS['secret'][1] in stderr[0]
        assert os.listdir(tmp_path / 'models') == ['secret.zip.bad']
    assert server.asked == [(None, None)] * 2
    status, stdout, stderr = fetch('secret', tmp_path, '--url', server.url,
                                   '--sha256', found.upper())
    assert status == 0 and found in stdout, stderr


def test_ctrl_c_keeps_what_has_come(server, tmp_path):
    server.cuts, server.stall = [90_000], True
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'fetch_model.py'), 'natural', '--url', server.url],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # a shell's background job, which these tests may be, ignores SIGINT, and so would its child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    part, deadline = tmp_path / 'models/natural.zip.part', time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.strip() == 'fetch_model.py: stopped'
    kept = os.path.getsize(part)
    assert 0 < kept <= 90_000
    status, _, stderr = fetch('natural', tmp_path, '--url', server.url)
    assert status == 0 and server.served[-1][0] == kept, stderr


def test_a_truncated_archive_is_put_aside(server, tmp_path):
    server.body = server.body[:200_000]
    status, _, stderr = fetch('natural', tmp_path, '--url', server.url)
    assert status == 2 and len(stderr) == 1 and 'is damaged' in stderr[0]
    assert os.listdir(tmp_path / 'models') == ['natural.zip.bad']


@pytest.mark.parametrize('end', ['', '.unpacking', '.zip.part', '.zip.part.json.tmp'])
def test_nothing_is_written_through_a_link(server, tmp_path, end):
    target = tmp_path / 'elsewhere'
    target.mkdir()
    (tmp_path / 'models').mkdir()
    (tmp_path / f'models/natural{end}').symlink_to(target)
    status, _, stderr = fetch('natural', tmp_path, '--url', server.url)
    assert status == 2 and len(stderr) == 1 and f'models/natural{end} is a link' in stderr[0]
    assert os.listdir(target) == [] and len(os.listdir(tmp_path / 'models')) == 1


def test_an_archive_that_lies_there_is_unpacked_without_a_download(server, tmp_path):
    (tmp_path / 'my models').mkdir()
    (tmp_path / 'my models/natural.zip').write_bytes(server.body)
    server.status = 500
    status, stdout, stderr = fetch('natural', tmp_path, '--url', server.url,
                                   '--models_dir', 'my models')
    assert status == 0 and server.asked == [], stderr
    assert "--checkpoint 'my models/natural/checkpoint-70000'" in stdout


@pytest.mark.parametrize('arguments, named', [
    ([], '0 models named; expected one of natural, adv_trained, secret'),
    (['natural', 'secret'], '2 models named'),
    (['public'], "'public' is none of natural, adv_trained, secret"),
    (['natural', '--url', 'ftp://a/b.zip'], "'ftp://a/b.zip'; expected http://... or https://..."),
    (['natural', '--sha256', '12'], '--sha256 must be 64 hexadecimal digits'),
    (['natural', '--url', 'http://127.0.0.1:1/a.zip'], 'http://127.0.0.1:1/a.zip: Connection')])
def test_mistakes_are_told_in_one_line_and_leave_nothing_behind(
        tmp_path, monkeypatch, arguments, named):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    status, _, stderr = program('fetch_model.py', *arguments, cwd=tmp_path)
    assert status == 2 and len(stderr) == 1 and named in stderr[0]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_something_else_is_left_alone(server, tmp_path):
    (tmp_path / 'models/natural').mkdir(parents=True)
    (tmp_path / 'models/natural/mine').write_text('mine')
    status, _, stderr = fetch('natural', tmp_path, '--url', server.url)
    assert status == 2 and len(stderr) == 1 and 'holds no checkpoint' in stderr[0]
    assert server.asked == [] and os.listdir(tmp_path / 'models/natural') == ['mine']


def test_a_fetched_model_is_evaluated_by_the_command_that_is_printed(server, tmp_path):
    """An archive laid out as the original's, with one of its checkpoints; the line is cut once."""
    entries = [('models/naturally_trained/', b''),
               ('models/naturally_trained/checkpoint', b'model_checkpoint_path: "/x/y-250"\n')]
    for end in ('index', 'data-00000-of-00001'):
        entries.append((f'models/naturally_trained/checkpoint-250.{end}',
                        read(f'{CHECKPOINT}.{end}')))
    server.body, server.cuts = archive(entries), [1_000_000]
    status, stdout, stderr = fetch('natural', tmp_path, '--url', server.url)
    assert status == 0, stderr
    assert hashlib.sha256(server.body).hexdigest() in stdout and 'natural.zip removed' in stdout
    assert [start for start, _ in server.served] == [0, 1_000_000]
    assert os.listdir(tmp_path / 'models') == ['natural']
    status, again, _ = fetch('natural', tmp_path, '--url', server.url)
    assert status == 0 and 'is there already' in again and len(server.asked) == 2
    status, _, stderr = fetch('natural', tmp_path, '--sha256', '0' * 64)
    assert status == 2 and 'its digest cannot be checked' in stderr[0]

    command = stdout.splitlines()[-1]
    assert command == again.splitlines()[-1] == (
        '    python eval.py --checkpoint models/natural/checkpoint-250 '
        '--set model_dir=models/natural')
    model = Model(num_residual_units=5, width_factor=1)
    assert model.load_madry_checkpoint(tmp_path / 'models/natural/checkpoint-250') == 250
    status, stdout, stderr = program(
        *command.split()[1:], '--attack', 'clean', '--inference', 'pn', cwd=tmp_path,
        settings=['dataset=synthetic', 'width_factor=1', 'num_eval_examples=20'])
    assert status == 0, stderr
    assert 'step 250' in stdout and os.path.exists(tmp_path / 'models/natural/eval/results.json')

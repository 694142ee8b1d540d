"""Symbolic links planted in a stranger's folder: no writer follows one."""
from email.message import Message
import os

import numpy as np
import pytest
import tensorflow as tf

from running import download, unfinished
from running.files import replacing
from running.outputs import Log
from running.resume import CUT_CURVES, LOG, forget_steps, take_lock


@pytest.fixture
def target(tmp_path):
    """A file of the user's own, elsewhere."""
    path = tmp_path / 'precious'
    path.write_text('precious')
    yield path
    assert path.read_text() == 'precious'


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / 'model'
    path.mkdir()
    return path


@pytest.mark.parametrize('mode', ['w', 'wb'])
def test_replacing_does_not_write_through_a_link(folder, target, mode):
    (folder / 'config.json.tmp').symlink_to(target)
    with replacing(folder / 'config.json', mode) as f:
        f.write('new' if mode == 'w' else b'new')
    assert (folder / 'config.json').read_text() == 'new'
    assert os.listdir(folder) == ['config.json'] and not (folder / 'config.json').is_symlink()


def test_replacing_takes_the_place_of_a_link(folder, target):
    (folder / 'config.json').symlink_to(target)
    with replacing(folder / 'config.json') as f:
        f.write('new')
    assert not (folder / 'config.json').is_symlink()


def test_what_a_killed_run_left_blocks_nothing(folder):
    (folder / 'a.tmp').write_text('half a')
    for text in ('first', 'second'):
        with replacing(folder / 'a') as f:
            f.write(text)
    assert (folder / 'a').read_text() == 'second' and os.listdir(folder) == ['a']


def test_a_failed_block_leaves_the_file_as_it_was(folder):
    (folder / 'a').write_text('old')
    with pytest.raises(KeyError):
        with replacing(folder / 'a') as f:
            f.write('new')
            raise KeyError
    assert (folder / 'a').read_text() == 'old' and os.listdir(folder) == ['a']


def test_two_that_replace_one_file_never_move_a_half_into_place(folder):
    with pytest.raises(FileNotFoundError, match='another program is writing it'):
        with replacing(folder / 'a') as first:
            first.write('first')
            os.remove(folder / 'a.tmp')  # as the second one does, which then makes its own
            (folder / 'a.tmp').write_text('half of the sec')
    assert not (folder / 'a').exists()
    assert (folder / 'a.tmp').read_text() == 'half of the sec'  # the second one's


def test_the_log_and_the_lock_refuse_a_link(folder, target):
    (folder / LOG).symlink_to(target)
    with pytest.raises(OSError, match='is a symbolic link; expected a plain file'):
        Log(folder).append({'step': 1})
    (folder / 'lock').symlink_to(target)
    with pytest.raises(OSError, match='is a symbolic link; expected a plain file') as error:
        take_lock(str(folder / 'lock'))
    assert error.value.filename == str(folder / 'lock')


def test_curves_are_cut_back_beside_a_link(folder, target):
    path = str(folder / 'events.out.tfevents.1.host')
    with tf.io.TFRecordWriter(path) as writer:
        for step in range(4):
            writer.write(tf.compat.v1.Event(step=step).SerializeToString())
    (folder / CUT_CURVES).symlink_to(target)
    forget_steps(str(folder), 2)
    assert len(list(tf.data.TFRecordDataset(path))) == 2
    assert not (folder / CUT_CURVES).exists()


@pytest.mark.parametrize('name', ['.part', '.part.json', '.part.json.tmp'])
def test_a_file_that_grows_batch_by_batch_refuses_or_replaces_a_link(folder, target, name):
    path = str(folder / 'attack.npy')
    os.symlink(target, path + name)
    array = np.zeros((4, 2), np.float32)
    try:
        for start, end in unfinished.appended(path, array, 2, 'what', 'label'):
            array[start:end] = 1
        unfinished.finish(path)
        assert (np.load(path) == 1).all()
    except OSError as error:
        assert name == '.part' and 'symbolic link' in error.strerror
    else:
        assert name != '.part'


def test_a_batch_that_is_kept_does_not_write_through_a_link(folder, target):
    path = folder / 'pgd.part'
    (folder / 'pgd.part.tmp').symlink_to(target)
    array = np.zeros(4)
    for start, end in unfinished.batches(str(path), [array], 4, 2, 'label'):
        array[start:end] = 1
    assert path.exists() and not path.is_symlink()


def test_a_download_does_not_write_through_a_link(folder, target, monkeypatch):
    os.symlink(target, folder / 'a.zip.part')

    class Response:
        status, headers = 200, Message()

        def __init__(self):
            self.rest = [b'PK rest', b'']

        def read1(self, _):
            return self.rest.pop(0)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass
    monkeypatch.setattr(download, '_ask', lambda *_: Response())
    monkeypatch.setattr(download.zipfile, 'is_zipfile', lambda _: True)
    download.download('http://host/a.zip', str(folder / 'a.zip'), checked=False)
    assert (folder / 'a.zip').read_bytes() == b'PK rest'
    assert not (folder / 'a.zip').is_symlink()

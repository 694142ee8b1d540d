"""docs/side_by_side.md is held to our code; the tool prints both columns.

Nothing here needs the original. Where it is at hand, in ../cifar10_challenge or in the folder that
the environment variable ORIGINAL names, the tables are held to it, too.
"""
import ast
import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT
import side_by_side
from side_by_side import Mismatch, definitions, find, in_order, indent, locate, pieces, read

ORIGINAL = os.environ.get('ORIGINAL', os.path.join(ROOT, '..', 'cifar10_challenge'))
FILES = ['cifar10_input.py', 'model.py', 'pgd_attack.py', 'train.py', 'eval.py', 'run_attack.py',
         'fetch_model.py']
PAGE = read(ROOT, side_by_side.TABLES)
ALL_TABLES = side_by_side.read_tables(PAGE)
NAMES = {file: in_order(rows, file) for file, rows in ALL_TABLES.items()}
in_each_file = pytest.mark.parametrize('file', FILES)


def test_each_file_has_a_table():
    assert list(ALL_TABLES) == FILES
    rows = [line for line in PAGE.splitlines() if line.startswith('| `')]
    assert len(rows) == 1 + sum(map(len, ALL_TABLES.values()))  # 1: config.json's


@in_each_file
def test_each_row_says_where_and_why(file):
    for row in ALL_TABLES[file]:
        assert len(row.difference) > 5, row
        for path, name in row.places:
            assert os.path.isfile(os.path.join(ROOT, path)), row
            assert find(read(ROOT, path), name), row


@in_each_file
def test_our_order_is_the_originals(file):
    assert len(NAMES[file]) >= 5
    locate(read(ROOT, file), NAMES[file])


@in_each_file
def test_what_is_called_moved_is_not_in_order(file):
    for moved in ALL_TABLES[file]:
        if moved.difference.startswith('Moved'):
            names = [row.places[0][1] for row in ALL_TABLES[file] if row is moved or
                     row.places and row.places[0][1] in NAMES[file]]
            with pytest.raises(Mismatch):
                locate(read(ROOT, file), names)


# ---- a table that is wrong is found


@in_each_file
def test_a_name_that_is_changed_is_found(file):
    source = read(ROOT, file)
    for name in set(NAMES[file]):
        if re.fullmatch(r'[\w.]+', name):
            changed = re.sub(rf'\b(def|class) {name.split(".")[-1]}\b', r'\1 other', source)
        else:
            changed = re.sub(rf'(?m)^( *){re.escape(name)}', r'\1other', source)
        with pytest.raises(Mismatch, match='no '):
            find(changed, name)


def swapped(source, first, second):
    """Returns a source with two of its pieces swapped."""
    lines = source.splitlines()
    (a, b), (c, d) = first, second
    return '\n'.join(lines[:a] + lines[c:d] + lines[b:c] + lines[a:b] + lines[d:])


@in_each_file
def test_two_pieces_that_are_swapped_are_found(file):
    source = read(ROOT, file)
    lines, tried = source.splitlines(), 0
    spans = {}
    for name, (line, text) in pieces(source, NAMES[file]).items():
        spans[name] = line - 1, line - 1 + len(text.splitlines())
    for a, b in zip(NAMES[file], NAMES[file][1:]):
        inside = locate(source, [a])[a][1] >= spans[b][0] and re.fullmatch(r'[\w.]+', a)
        if a == b or inside or indent(lines[spans[a][0]]) != indent(lines[spans[b][0]]):
            continue
        with pytest.raises(Mismatch, match='is above'):
            locate(swapped(source, spans[a], spans[b]), NAMES[file])
        tried += 1
    assert tried >= 1


# ---- config.json


def keys(folder):
    with open(os.path.join(folder, 'config.json')) as f:
        pairs = json.load(f, object_pairs_hook=list)
    return [(key, value) for key, value in pairs if key != '_comment']


def named_keys():
    row = re.search(r'^\| `model_dir`.*', PAGE, re.MULTILINE)[0]
    return re.findall('`([^`]+)`', row.split(' | ')[0])


def test_the_originals_keys_come_first():
    assert len(named_keys()) == 21
    assert [key for key, _ in keys(ROOT)][:21] == named_keys()


# ---- the original, where it is at hand


@pytest.mark.skipif(not os.path.isdir(ORIGINAL), reason='the original is not at hand')
@in_each_file
def test_the_table_names_all_that_the_original_defines(file):
    source = read(ORIGINAL, file)
    names = [row.original for row in ALL_TABLES[file]]
    assert len(set(names)) == len(names)
    assert {name for name, *_ in definitions(ast.parse(source), source.splitlines())} <= set(names)
    locate(source, names)


@pytest.mark.skipif(not os.path.isdir(ORIGINAL), reason='the original is not at hand')
def test_our_configuration_begins_with_the_originals():
    theirs, ours = keys(ORIGINAL), keys(ROOT)
    assert [key for key, _ in theirs] == named_keys()
    assert [pair for pair in theirs if pair not in ours] == [('training_batch_size', 128)]


# ---- the tool


def run(*arguments):
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'tests', 'side_by_side.py'),
                           *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


MADE_UP = '''
class CIFAR10Data:
    def __init__(self): 'theirs, which is a line that is quite a bit longer than a column can be'
    def _load_datafile(self):
        return 'their file'
class AugmentedCIFAR10Data:
    def __init__(self): pass
class DataSubset:
    def __init__(self): pass
    def get_next_batch(self): pass
# their last class
class AugmentedDataSubset:
    def __init__(self): pass
    def get_next_batch(self): pass
'''
MADE_UP_FETCH = '''
if len(sys.argv) == 1:
  if sys.argv[1] == 'a name':
    url = 'an address'
fname = 'a name'
# model download, theirs
get(url)
# computing model hash
print(hash)
# extracting model
unpack()
'''


@pytest.fixture
def original(tmp_path):
    (tmp_path / 'cifar10_input.py').write_text(MADE_UP)
    (tmp_path / 'fetch_model.py').write_text(MADE_UP_FETCH)
    return tmp_path


def test_both_columns_are_printed(original):
    status, stdout, stderr = run('--original', original, 'cifar10_input.py', 'fetch_model.py')
    assert (status, stderr) == (0, '')
    rows = [tuple(cell.rstrip() for cell in line.split(' | ', 1))
            for line in stdout.splitlines() if line[78:81] == ' | ']
    assert ('class DataSubset:', 'class DataSubset:') in rows
    assert ('def _load_datafile(self):',
            'def _load_datafile(filename, names, expected=None):') in rows
    assert any(left.startswith("  > ") for left, _ in rows)  # a long line is wrapped
    assert ('[the original, cifar10_input.py:11]', '[not here]') in rows
    assert ('# their last class', '') not in rows and '# their last class' in stdout
    at = stdout.index('fetch_model.py: # model download')
    section = stdout[at:stdout.index('fetch_model.py: # computing model hash')]
    assert 'A partial download is resumed.' in section
    assert '# model download, theirs' in section and '| # Download the model' in section
    assert 'get(url)' in section and '| def download(' in section and 'hash' not in section
    headings = re.findall(r'^\w+\.py: (.*)', stdout, re.MULTILINE)
    assert headings == [row.original for file in ('cifar10_input.py', 'fetch_model.py')
                        for row in ALL_TABLES[file]]


@pytest.mark.parametrize('arguments, said', [
    ([], '--original is missing; expected a clone'),
    (['model.py'], '--original is missing; expected a clone'),
    (['--original', 'nowhere'], '--original nowhere is no folder; expected a clone'),
    (['--original', 'DIR', 'bench.py'], 'bench.py has no table; expected one of cifar10_input.py'),
    (['--original', 'DIR', 'model.py'], 'model.py: No such file or directory; expected a clone'),
    (['--original', 'DIR', 'eval.py'], "no '# Global constants'"),
    (['--original', 'DIR', 'pgd_attack.py'], 'pgd_attack.py (the original or ours) is not as'),
    (['--original', 'DIR', 'run_attack.py'], 'run_attack.py (the original or ours) is not as'),
    (['--original', 'DIR', 'train.py'], "'# seeding randomness' is above 'with open('")])
def test_a_mistake_is_one_line(original, arguments, said):
    (original / 'eval.py').write_text('x = 1\n')
    (original / 'pgd_attack.py').write_text('class (:\n')
    (original / 'run_attack.py').write_bytes(b'\xff\x00')
    (original / 'train.py').write_text('# seeding randomness\nwith open(path) as f:\n  pass\n')
    status, stdout, stderr = run(*(original if word == 'DIR' else word for word in arguments))
    assert (status, stdout) == (2, '') and len(stderr.splitlines()) == 1
    assert stderr.startswith('side_by_side.py: ') and said in stderr

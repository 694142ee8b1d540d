"""The house: imports point down only, in no circle; a room's code counts as the code."""
import ast
import graphlib
import os
from pathlib import Path

import pytest

from attacks import ATTACKS
from conftest import ROOT
from running import unfinished

ROOMS = ('attacks', 'paper', 'running')
# From the bottom up; what stands in one line may import within that line.
FLOORS = [
    ('running',), ('config',), ('cifar10_input', 'model', 'shaping'), ('pgd_attack',), ('trades',),
    ('attacks',), ('doubts',), ('report',), ('eval', 'train'),
    ('bench', 'export', 'fetch_model', 'paper', 'run_attack'), ('classify', 'reproduce')]


def modules():
    """Returns {module name: path} of all code of the project."""
    found = {path.stem: path for path in Path(ROOT).glob('*.py')}
    for room in ROOMS:
        for path in Path(ROOT, room).glob('*.py'):
            found[room if path.stem == '__init__' else f'{room}.{path.stem}'] = path
    return found


def imports(path, known):
    """Returns the project's modules that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: a relative import'
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found & set(known)


@pytest.fixture(scope='module')
def graph():
    known = modules()
    graph = {name: imports(path, known) for name, path in known.items()}
    graph['attacks'] |= {f'attacks.{maker.partition(".")[0]}' for maker in ATTACKS.values()}
    return graph


def test_no_circle(graph):
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert sorted(order) == sorted(graph) and len(order) > 20


def test_a_circle_would_be_found(graph):
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({**graph, 'config': {'train'}}).prepare()


def test_imports_point_down(graph):
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert {name.partition('.')[0] for name in graph} == set(floor)
    for name, imported in graph.items():
        for other in imported:
            room, other_room = (of.partition('.')[0] for of in (name, other))
            assert floor[other_room] < floor[room] or other_room == room, f'{name} -> {other}'


def test_running_knows_nothing_of_the_project(graph):
    for name, imported in graph.items():
        if name.startswith('running'):
            assert all(other.startswith('running') for other in imported), name
    for name in ('program', 'files', 'untrusted', 'progress'):  # but for the room's one-line error
        assert graph[f'running.{name}'] <= {'running'}
    assert graph['running'] == set()


def test_rooms_have_no_rooms():
    for room in ROOMS:
        inside = [entry.name for entry in os.scandir(os.path.join(ROOT, room)) if entry.is_dir()]
        assert set(inside) <= {'__pycache__'}


def test_an_attack_is_one_file_and_one_line():
    """Every file of attacks/ has its line; but neighbours.py does not change what is judged."""
    files = {name for name in modules() if name.startswith('attacks.')} - {'attacks.neighbours'}
    assert {f'attacks.{maker.partition(".")[0]}' for maker in ATTACKS.values()} == files
    for file, maker in (maker.split('.') for maker in ATTACKS.values()):
        tree = ast.parse(Path(ROOT, 'attacks', f'{file}.py').read_text())
        assert maker in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_the_code_that_numbers_depend_on_is_all_of_it():
    """A batch that was kept is stale once any file here has changed, in a room, too."""
    assert {Path(path) for path in unfinished.code_files()} == set(modules().values())


@pytest.mark.parametrize('where', ['train.py', 'attacks/apgd.py', 'new_room/attack.py'])
def test_a_change_in_a_room_is_a_change_of_the_code(tmp_path, monkeypatch, where):
    for room in ('attacks', 'new_room'):
        (tmp_path / room).mkdir()
        (tmp_path / room / '__init__.py').touch()
    for name in ('train.py', 'attacks/apgd.py', 'new_room/attack.py'):
        (tmp_path / name).write_text('a = 1\n')
    monkeypatch.setattr(unfinished, 'ROOT', str(tmp_path))
    digests = []
    try:
        for text in ('a = 1\n', 'a = 2\n'):
            (tmp_path / where).write_text(text)
            unfinished.code.cache_clear()
            digests.append(unfinished.path_of('.', 'pgd', []))
    finally:
        unfinished.code.cache_clear()
    assert digests[0] != digests[1]

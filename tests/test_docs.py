"""The documentation is held to the code: commands, options, keys, links, numbers, the picture."""
import ast
import functools
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from config import SCHEMA, load_config, may_change
from conftest import ROOT
from paper.published import MODES, PAPER_TABLES
from running import UserError
import second_opinion

PAGES = ['README.md', 'RESULTS.md'] + sorted(
    f'docs/{name}' for name in os.listdir(os.path.join(ROOT, 'docs')) if name.endswith('.md'))
BUILTIN = {'help': False, 'helpfull': False}  # options that absl and argparse define themselves
PLACEHOLDER = re.compile(r'[A-Z][A-Z0-9_]*')  # DIR, MODE, K, ...


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def exists(path):
    return os.path.exists(os.path.join(ROOT, path))


# ---- Markdown


def split_code(text):
    """Returns (code, prose) of a page: the lines of its code blocks, and all other lines."""
    code, prose, fenced, before = [], [], False, ''
    for line in text.splitlines():
        if line.startswith('```'):
            fenced = not fenced
        elif fenced or line.startswith('    ') and (before == '' or before.startswith('    ')):
            code.append(line.strip())
        else:
            prose.append(line)
        before = line
    return '\n'.join(code), '\n'.join(prose)


def spans(text):
    """Returns the inline code of a page, each on one line."""
    return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', split_code(text)[1])]


def commands(code):
    """Returns the simple commands in lines of shell code, each a list of words."""
    found = []
    for line in code.replace('\\\n', ' ').splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ';']:
            if set(word) <= set('&|;'):
                found.append(command)
                command = []
            elif command or not re.match(r'\w+=|srun$', word):  # settings of the environment
                command.append(word)
    return [command for command in found if command]


def documented(pattern):
    """Returns (page, command) of all documented commands whose first words match a pattern."""
    return [(page, command) for page in PAGES for command in commands(split_code(read(page))[0])
            if re.match(pattern, ' '.join(command))]


# ---- what the programs take


@functools.cache
def tree(path):
    return ast.parse(read(path))


def local_imports(path):
    """Returns the paths of the project's modules that a file imports."""
    names = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
    paths = [name.replace('.', '/') for name in names]
    return [p for path in paths for p in (f'{path}.py', f'{path}/__init__.py') if exists(p)]


def defined(nodes):
    """Returns {option: whether it takes a value} of what absl or argparse calls in nodes define."""
    found = {}
    for call in (n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Call)):
        name = getattr(call.func, 'attr', getattr(call.func, 'id', ''))
        if (name.startswith('DEFINE_') or name == 'add_argument') and call.args:
            option = getattr(call.args[0], 'value', None)
            if isinstance(option, str) and (name != 'add_argument' or option.startswith('--')):
                flag = name in ('DEFINE_boolean', 'DEFINE_bool') or any(
                    k.arg == 'action' for k in call.keywords)
                found[option.removeprefix('--')] = not flag
    return found


@functools.cache
def options(program):
    """Returns {option: whether it takes a value} of a program, by its source.

    These are defined in the program, in the bodies of the modules that it imports, or in functions
    of theirs that the program calls.
    """
    modules, found = [program], defined([tree(program)])
    for path in modules:
        modules += [p for p in local_imports(path) if p not in modules]
    called = {getattr(n.func, 'attr', getattr(n.func, 'id', '')) for n in ast.walk(tree(program))
              if isinstance(n, ast.Call)}
    for path in modules[1:]:
        for node in tree(path).body:
            is_main = isinstance(node, ast.If) and '__main__' in ast.dump(node.test)
            is_code = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if node.name in called if is_code else not is_main:
                found |= defined([node])
    return BUILTIN | found


@functools.cache
def answer(program, *arguments):
    """Returns all that a program says when it is run."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, program), *arguments],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert 'Traceback' not in done.stderr, done.stderr
    return done.stdout + done.stderr


def known(option, program):
    """Returns the names that a program's --attack or --inference takes; but for one, eval.py's."""
    if (option, program) == ('attack', 'tests/second_opinion.py'):
        return {*second_opinion.ATTACKS, *second_opinion.ATTACKS_WHERE_DRAWN}
    text = re.search(rf'--{option}: (.*?)\(default', answer('eval.py', '--helpfull'), re.DOTALL)
    return set(re.findall(r'\w+', text[1])) - {'Comma', 'separated', 'or'}


def words_known(program):
    """Returns the words that a program takes beside its options, by its answer to a wrong one."""
    if program not in ('reproduce.py', 'fetch_model.py'):
        return ()
    return set(re.findall(r'\w+', answer(program, 'no_such_word'))) - {'no_such_word'}


# ---- what may be wrong with a command


def option_faults(program, arguments):
    """Returns (faults, {option: values}, other words) of a program's arguments."""
    faults, given, words, rest = [], {}, [], list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith('--'):
            words.append(word)
            continue
        name, equals, value = word[2:].partition('=')
        if name not in options(program):
            faults.append(f'{program} has no --{name}')
        elif options(program)[name] and not equals:
            value = rest.pop(0) if rest else faults.append(f'--{name} has no value')
        given.setdefault(name, []).append(value)
    return faults, given, words


def setting_faults(settings, config=None):
    """Returns what is wrong with --set settings; a value that is a placeholder is not looked at."""
    faults, concrete = [], []
    for setting in settings:
        key, _, value = setting.partition('=')
        if not PLACEHOLDER.fullmatch(value):
            concrete.append(setting)
        elif key not in load_config():
            faults.append(f'unknown key {key}')
    try:
        load_config(config, concrete)
    except UserError as error:
        faults.append(str(error))
    return faults


def faults(command):
    """Returns what is wrong with a documented command that runs Python, a list of lines."""
    program, *arguments = command[1:]
    if program == '-m':
        return [f'{word} is missing' for word in arguments[1:]
                if word.endswith('.py') and not exists(word)]
    if not exists(program):
        return [f'{program} is missing']
    found, given, words = option_faults(program, arguments)
    for option in ('config', 'stored'):
        for path in given.get(option, ()):
            if not PLACEHOLDER.fullmatch(path) and not exists(path):
                found.append(f'{path} is missing')
    config = given.get('config', [None])[0]
    if not found and 'set' in given:
        found += setting_faults(given['set'], config and os.path.join(ROOT, config))
    for option in ('attack', 'inference'):
        names = {name for value in given.get(option, ()) for name in value.split(',')}
        if names:
            found += [f'--{option} has no {name}' for name in names - known(option, program)]
    words = [word for word in words if not PLACEHOLDER.fullmatch(word)
             and not (program == 'classify.py' and word.endswith(('.png', '.jpg', '.npy')))]
    return found + [f'{program} takes no {word}' for word in words
                    if word not in words_known(program)]


# ---- commands and options


def test_documented_commands_are_right():
    found = documented('python3? ')
    assert {command[1] for _, command in found} >= {
        'train.py', 'eval.py', 'pgd_attack.py', 'run_attack.py', 'fetch_model.py', 'reproduce.py',
        'bench.py', 'export.py', 'classify.py', '-m'}
    assert [(page, ' '.join(command), fault) for page, command in found
            for fault in faults(command)] == []


@pytest.mark.parametrize('command', [
    'python trian.py', 'python train.py --sett a=b', 'python train.py --attack pgd',
    'python train.py --set', 'python train.py --set num_step=10',
    'python train.py --set num_step=N', 'python train.py --set num_steps=ten',
    'python train.py --set training_batch_size=65', 'python train.py --config configs/none.json',
    'python train.py --profile yes', 'python eval.py --attack pdg', 'python eval.py pgd',
    'python eval.py --attack clean,worst', 'python eval.py --inference bn_shape',
    'python reproduce.py table5', 'python reproduce.py all --stored results/none',
    'python fetch_model.py public', 'python bench.py --model_dir DIR',
    'python -m pytest tests/test_none.py', 'python tests/kills.py --tries 3'])
def test_a_wrong_command_would_be_found(command):
    assert faults(shlex.split(command)) != []


def test_the_two_commands_of_the_readme():
    run, test = [line for line in split_code(read('README.md'))[0].splitlines()
                 if 'pip install' in line]
    assert commands(run)[-2:] == [
        ['python', 'train.py', '--config', 'configs/quick.json'],
        ['python', 'eval.py', '--config', 'configs/quick.json']]
    assert commands(test) == [['pip', 'install', '-r', 'requirements-dev.txt'],
                              ['python', '-m', 'pytest', '-n', '2']]


def test_installed_requirement_files_exist():
    files = [word for _, command in documented('pip install') for word in command
             if word.endswith('.txt')]
    assert files and all(map(exists, files))


@pytest.mark.parametrize('page', PAGES)
def test_options_in_the_text_exist(page):
    programs = {command[1] for _, command in documented(r'python \S+\.py') if exists(command[1])}
    every = {name for program in programs for name in options(program)}
    every |= set(re.findall(r'^#SBATCH --([\w-]+)', read(page), re.MULTILINE))
    for span in spans(read(page)):
        names = re.findall(r'(?<!\S)--([\w-]+)', span)
        assert set(names) <= every, span
        settings = re.findall(r'--set (\S+)', span)
        settings = [setting for setting in settings if setting != 'key=value']
        assert setting_faults(settings) == [], span


# ---- keys


def key_rows():
    """Returns the cells of each row in the table of keys."""
    table = read('docs/configuration.md').split('\n## Keys\n')[1].split('\n## ')[0]
    return [[cell.strip() for cell in line.strip('|').split(' | ')]
            for line in table.splitlines() if line.startswith('| `')]


def test_every_key_is_documented_with_its_default_in_order():
    rows = key_rows()
    assert all(len(row) == 4 and len(row[2]) > 5 for row in rows)
    defaults = [(row[0].strip('`'), json.loads(row[1].strip('`'))) for row in rows]
    assert defaults == list(load_config().items())


def test_keys_that_may_change_on_resume():
    assert [row[0].strip('`') for row in key_rows()
            if row[3].strip(' |') == 'yes'] == [key for key in SCHEMA if may_change(key)]


# ---- links, files, numbers


def slugs(page):
    """Returns the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r'^#+ (.*)', split_code(read(page))[1], re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)\s]+)\)', split_code(read(page))[1])
    assert links or page != 'README.md'
    for link in links:
        if re.match('https?://', link):
            continue
        path, _, anchor = link.partition('#')
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert exists(target), link
        assert not anchor or anchor in slugs(target), link


@pytest.mark.parametrize('page', PAGES)
def test_files_and_folders_in_the_text_exist(page):
    named = [span for span in spans(read(page)) if re.fullmatch(
        r'[\w/]+\.py|(configs|docs|tests|results)/[\w./]+|[a-z_]+/|[A-Z]+\.(md|cff)', span)]
    elsewhere = ('models/', 'cifar10_challenge/')  # made by a run; the original's
    assert [path for path in named if not path.startswith(elsewhere) and not exists(path)] == []


def test_the_numbers_in_the_readme_are_measured_ones():
    number = re.compile(r'\d+\.\d \[\d+\.\d, \d+\.\d\]')
    measured = set(number.findall(read('RESULTS.md') + read('docs/evaluation.md')))
    shown = number.findall(read('README.md'))
    assert len(shown) > 10
    assert set(shown) <= measured


def rows_of(page):
    """Returns the rows of all tables in a page, each a list of its cells."""
    return [line.strip('| ').split(' | ') for line in read(page).splitlines()
            if line.startswith('| ') and not line.startswith('| ---')]


def test_the_results_in_the_readme_are_those_of_the_stored_table():
    measured = {(row[0], row[1]): (row[2], row[3], row[6], row[4].removesuffix(' t'))
                for row in rows_of('results/cifar10_w32_1/headline.md')}
    found = 0
    for row in rows_of('README.md'):
        mode, _, inference = row[0].replace('`', '').partition(', ')
        if mode not in ('natural', *MODES) or not inference:
            continue
        found += 1
        name = f'`pgd_{mode}{"_3to1" if "shaping" in mode else ""}`'
        assert tuple(row[1:5]) == measured[name, f'`{inference}`']
        if mode in MODES and inference == 'pn':
            assert row[5] == ', '.join(f'{100 * PAPER_TABLES["pgd"][mode][attack][1]:.1f}'
                                       for attack in ('clean', 'pgd'))
    assert found == 5


def test_the_readme_is_short():
    assert 300 < len(read('README.md').split()) <= 1800


# ---- the rest


def test_citation():
    text = read('CITATION.cff')
    try:
        import yaml
    except ImportError:
        lines = [line.split('#')[0].rstrip() for line in text.splitlines()]
        assert 'cff-version: 1.2.0' in lines and 'type: software' in lines
        assert 'license: MIT' in lines and '  - type: article' in lines
        assert {line.partition(':')[0] for line in lines if re.match(r'\w', line)} >= {
            'message', 'title', 'authors', 'references'}
        assert '\t' not in text
        return
    cff = yaml.safe_load(text)
    assert (cff['cff-version'], cff['type'], cff['license']) == ('1.2.0', 'software', 'MIT')
    paper, = cff['references']
    assert paper['type'] == 'article'
    for work in (cff, paper):
        assert work['title'] and all(author['name'] for author in work['authors'])


def test_licence_is_mit_and_matches_the_citation():
    authors = re.search(r'authors:\n  - name: (.*)', read('CITATION.cff'))[1]
    assert read('LICENSE').startswith(f'MIT License\n\nCopyright (c) 2026 {authors}\n')


def test_the_picture_is_what_its_script_draws(tmp_path):
    from matplotlib import image
    path = str(tmp_path / 'batches.png')
    assert path in answer('docs/draw_batches.py', '--output', path)
    stored = os.path.join(ROOT, 'docs', 'batches.png')
    assert os.path.getsize(stored) < 150_000
    drawn, kept = image.imread(path), image.imread(stored)
    assert drawn.shape == kept.shape
    # Left of the attacked images, where no sign of PGD may differ between two processors; letters'
    # edges may between two versions of matplotlib
    left = np.s_[:, :880]
    assert np.mean(np.abs(drawn[left] - kept[left]).max(axis=2) > 0.2) < 0.01

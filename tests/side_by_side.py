"""Prints the original's code and ours in two columns, one piece after another.

    python tests/side_by_side.py --original ../cifar10_challenge              # all files
    python tests/side_by_side.py --original ../cifar10_challenge model.py     # one

docs/side_by_side.md says which piece is where, in the original's order. A name in its tables is the
dotted name of a function or class, or the first words of the line that a section begins with. A
piece ends where the next one of the table begins, or else with its block.
"""
import argparse
import ast
import itertools
import os
import re
import signal
import sys
import textwrap
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLES = os.path.join('docs', 'side_by_side.md')
WIDTH = 78  # of a column


class Row(NamedTuple):
    """A row of a table."""
    original: str    # name in the original's file
    places: list     # (file of ours, name): the thing itself first, then what helps it
    difference: str  # begins with 'Moved' where the thing is not in the original's order


class Mismatch(Exception):
    """A name is not in a file, or not in the table's order."""


def read(folder, file):
    with open(os.path.join(folder, file), encoding='utf-8') as f:
        return f.read()


def read_tables(text):
    """Returns {file: its rows} of the tables whose heading is the name of a Python file."""
    tables, file = {}, None
    for line in text.splitlines():
        if line.startswith('## '):
            file = line[3:] if line.endswith('.py') else None
        elif file and line.startswith('| `'):
            original, here, difference = line.strip('| ').split(' | ')
            places = [(path or file, name) for path, name in
                      re.findall(r'`(?:([\w/]+\.py): )?([^`]+)`', here)]
            tables.setdefault(file, []).append(Row(original.strip('`'), places, difference))
    return tables


def in_order(rows, file):
    """Returns the names in our file that are held to the original's order."""
    return [row.places[0][1] for row in rows if row.places and row.places[0][0] == file
            and not row.difference.startswith('Moved')]


def indent(line):
    return len(line) - len(line.lstrip())


def definitions(tree, lines, prefix=''):
    """Yields (dotted name, first line, last line) of functions and classes; lines from 0."""
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min(n.lineno for n in (node, *node.decorator_list)) - 1
            while first and lines[first - 1].startswith(' ' * node.col_offset + '#'):
                first -= 1  # the comment right above
            yield prefix + node.name, first, node.end_lineno - 1
            name = f'{prefix}{node.name}.'
        yield from definitions(node, lines, name)


def find(source, name):
    """Returns [(first line, last line)] of all that a name may mean, at least one."""
    lines = source.splitlines()
    if re.fullmatch(r'[\w.]+', name):
        found = [(first, last) for known, first, last
                 in definitions(ast.parse(source), lines) if known == name]
    else:
        found = [(i, next((j for j in range(i + 1, len(lines)) if lines[j].strip()
                           and indent(lines[j]) < indent(line)), len(lines)) - 1)
                 for i, line in enumerate(lines) if line.strip().startswith(name)]
    if not found:
        raise Mismatch(f'no {name!r}')
    return found


def locate(source, names):
    """Returns {name: (first line, last line)}.

    Raises:
        Mismatch: a name is missing, or stands above the one before it.
    """
    spans, start, before = {}, 0, None
    for name in names:
        below = [span for span in find(source, name) if span[0] >= start]
        if not below:
            raise Mismatch(f'{name!r} is above {before!r}')
        spans[name], start, before = below[0], below[0][0], name
    return spans


def pieces(source, names, others=()):
    """Returns {name: (line number, source)} of names, which must be in order, and of others."""
    spans = {name: find(source, name)[0] for name in others} | locate(source, names)
    starts = [first for first, _ in spans.values()]
    found = {}
    for name, (first, last) in spans.items():
        end = min([last + 1, *(start for start in starts if start > first)])
        text = '\n'.join(source.splitlines()[first:end])
        found[name] = first + 1, textwrap.dedent(text).rstrip()
    return found


def wrapped(text):
    """Returns the lines of a column; what follows '>' belongs to the line above it."""
    return [part for line in text.splitlines() for part in textwrap.wrap(
        line, WIDTH, subsequent_indent=' ' * indent(line) + '  > ', break_on_hyphens=False) or ['']]


def side_by_side(file, rows, folder):
    """Yields the lines to print for one file: for each row a heading, then both columns."""
    theirs = pieces(read(folder, file), [row.original for row in rows])
    places = [place for row in rows for place in row.places]
    ours = {path: pieces(read(ROOT, path), in_order(rows, file) if path == file else (),
                         [name for other, name in places if other == path]) for path, _ in places}
    shown = set()
    for row in rows:
        yield from ('', '=' * (2 * WIDTH + 3), f'{file}: {row.original}')
        yield from (*textwrap.wrap(row.difference, 2 * WIDTH), '-' * (2 * WIDTH + 3))
        line, text = theirs[row.original]
        left, right = [f'[the original, {file}:{line}]', *wrapped(text)], []
        for path, name in row.places:
            line, text = ours[path][name]
            again = (path, line) in shown
            right += [f'[{path}:{line}{", shown above" if again else ""}]']
            right += [] if again else [*wrapped(text), '']
            shown.add((path, line))
        for a, b in itertools.zip_longest(left, right or ['[not here]'], fillvalue=''):
            yield f'{a:<{WIDTH}} | {b}'.rstrip()


def fail(problem):
    print(f'side_by_side.py: {problem}', file=sys.stderr)
    sys.exit(2)


def main():
    tables = read_tables(read(ROOT, TABLES))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--original', metavar='DIR', help="a clone of MadryLab's cifar10_challenge")
    parser.add_argument('files', metavar='FILE', nargs='*', help=f'of {", ".join(tables)}')
    args = parser.parse_args()
    if args.original is None or not os.path.isdir(args.original):
        fail(f'--original {args.original or "is missing"}{" is no folder" * bool(args.original)}; '
             "expected a clone of MadryLab's cifar10_challenge")
    for file in args.files:
        if file not in tables:
            fail(f'{file} has no table; expected one of {", ".join(tables)}')
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    for file in args.files or tables:
        try:
            print('\n'.join(side_by_side(file, tables[file], args.original)))
        except OSError as error:
            fail(f'{error.filename}: {error.strerror}; expected a clone of the original')
        except (Mismatch, SyntaxError, ValueError) as error:
            fail(f'{file} (the original or ours) is not as {TABLES} says: {error}')


if __name__ == '__main__':
    main()

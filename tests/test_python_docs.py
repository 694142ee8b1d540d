"""docs/python.md is run: all its blocks, in order, in one process and an empty folder."""
import importlib.util
import os
import re
import subprocess
import sys

from conftest import ROOT

PAGE = os.path.join(ROOT, 'docs', 'python.md')


def blocks():
    """Returns (number of the line before it, code) of each block of Python."""
    with open(PAGE, encoding='utf-8') as f:
        text = f.read()
    return [(text[:match.start(1)].count('\n'), match[1])
            for match in re.finditer(r'^```python\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)]


def test_the_blocks_run_in_order(tmp_path):
    code = ['space = {}']
    for line, block in blocks():
        if 'PIL' in block and importlib.util.find_spec('PIL') is None:
            continue
        source = '\n' * line + block  # so that a traceback names the page's line
        code.append(f'exec(compile({source!r}, {PAGE!r}, "exec"), space)')
    environment = {**os.environ, 'PYTHONPATH': ROOT, 'CUDA_VISIBLE_DEVICES': '-1'}
    done = subprocess.run([sys.executable, '-c', '\n'.join(code)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    out = done.stdout
    assert 'models/notebook/checkpoint-60' in out and '60 steps: ' in out
    accuracies = re.findall(r'^(?:batch|population) norms: accuracy ([\d.]+)%', out, re.MULTILINE)
    assert len(accuracies) == 2 and float(accuracies[1]) > 30  # of ten classes
    assert re.search(r'^bn_shaping class_\d$', out, re.MULTILINE)
    assert 'largest perturbation 8.0' in out
    assert len(re.findall(r'^(?:clean|pgd|worst).*% \[', out, re.MULTILINE)) == 8
    assert out.splitlines()[-1] == '0.0'


def test_the_page_has_a_block_for_each_task():
    code = '\n'.join(block for _, block in blocks())
    assert len(blocks()) >= 6
    for name in ('train(', 'load_madry_checkpoint', 'Image.open', 'perturb(', 'evaluate(',
                 'load_model('):
        assert name in code
    assert all(len(block.splitlines()) <= 12 for _, block in blocks())

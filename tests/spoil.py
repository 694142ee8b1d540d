"""Cuts off and flips bytes in each kind of file of a training, and looks at what becomes of it.

    python tests/spoil.py MODEL_DIR --tries 500

MODEL_DIR, which is left as it was, holds a training that is done, checkpoints and all.
"""
import argparse
import collections
import contextlib
import glob
import io
import json
import os
import random
import shutil
import sys
import tempfile

os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import running.quiet  # noqa: E402, F401
from config import load_config  # noqa: E402
from running import UserError  # noqa: E402
import kills  # noqa: E402
from model import checkpoints, damage  # noqa: E402
from running.arriving import step_of  # noqa: E402
from running.resume import forget_steps  # noqa: E402
import train  # noqa: E402

KINDS = ('index', 'data', 'config', 'log', 'events')


def file_of(folder, kind):
    newest = checkpoints(folder)[0]
    return {'index': f'{newest}.index', 'data': f'{newest}.data-00000-of-00001',
            'config': f'{folder}/config.json',
            'log': f'{folder}/log.jsonl',
            'events': glob.glob(f'{glob.escape(folder)}/events.out*')[0]}[kind]


def spoiled(raw, rng):
    """Returns bytes that are cut off (one in three) or in which one to three bits are flipped."""
    if rng.random() < 1 / 3:
        return raw[:rng.randrange(len(raw))]
    result = bytearray(raw)
    for place in rng.sample(range(len(raw)), rng.randint(1, 3)):
        result[place] ^= 1 << rng.randrange(8)
    return bytes(result)


def outcome(folder, kind, step, before):
    """Returns what becomes of a spoiled file: 'recognized', 'harmless', or what is wrong."""
    if kind in ('index', 'data'):
        if damage(checkpoints(folder)[0]):
            return 'recognized'
        now = kills.weights(folder, step)
        same = all(now[name].tobytes() == before[0][name].tobytes() for name in before[0])
        return 'harmless' if same else 'another weight was read'
    if kind == 'config':
        try:
            train.check_same_run(before[1], f'{folder}/config.json')
        except UserError as error:
            return 'recognized' if '\n' not in str(error) else 'more than one line'
        return 'harmless'  # what may change is taken from the command line anyway
    forget_steps(folder, step // 2)
    if kind == 'log':
        sound = all(line['step'] < step // 2 for line in kills.log(folder))
    else:  # each value with a checksum of its own
        found = kills.curves(folder)
        sound = set(found) <= set(before[2]) and len(set(found)) == len(found)
        sound = sound and all(at < step // 2 for _, at, _ in found)
    return 'harmless' if sound else 'a step is wrong'


def campaign(folder, kind, tries, seed=0):
    """Returns (Counter of outcomes, what went wrong) of so many tries."""
    rng, outcomes, wrong = random.Random(seed), collections.Counter(), []
    step = step_of(checkpoints(folder)[0])
    before = kills.weights(folder, step), load_config(f'{folder}/config.json'), kills.curves(folder)
    with open(file_of(folder, kind), 'rb') as f:
        raw = f.read()
    with tempfile.TemporaryDirectory() as place:
        copy = os.path.join(place, 'model')
        shutil.copytree(folder, copy)
        path = file_of(copy, kind)
        for number in range(tries):
            with open(path, 'wb') as f:
                f.write(spoiled(raw, rng))
            with contextlib.redirect_stdout(io.StringIO()):
                found = outcome(copy, kind, step, before)
            outcomes[found] += 1
            if found not in ('recognized', 'harmless'):
                wrong.append(f'{kind}, try {number}: {found}')
    return outcomes, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model_dir')
    parser.add_argument('--tries', type=int, default=500)
    options = parser.parse_args()
    if not (checkpoints(options.model_dir) and os.path.isfile(f'{options.model_dir}/log.jsonl')
            and glob.glob(f'{glob.escape(options.model_dir)}/events.out*')):
        parser.error('MODEL_DIR must be the folder of a training by train.py, with checkpoints, '
                     'log.jsonl and events.out*')
    for kind in KINDS:
        outcomes, wrong = campaign(options.model_dir, kind, options.tries)
        print(f'{kind}: {json.dumps(outcomes)}', *wrong, sep='\n', flush=True)


if __name__ == '__main__':
    main()

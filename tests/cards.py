"""Writes card.json beside each model in weights/: what it is, and what is known of its accuracy.

    python tests/cards.py            # for all folders in weights/
    python tests/cards.py --check    # says which cards are missing or not up to date

The accuracies are those of the table headline or of Tables I and II in results/, by the same
weights. The first entry says what the model answers on the images of tests/data, so that a card and
its weights can be held together without the data set; tests/test_cards.py does.
"""
import argparse
import glob
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import running.quiet  # noqa: E402, F401
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from config import load_config  # noqa: E402
from doubts import flagged, shares_norms  # noqa: E402
from eval import WORST_IN_BALL, wilson_interval  # noqa: E402
from export import digests_of  # noqa: E402
from model import build_model, find_checkpoint, network_name  # noqa: E402
from paper import headline  # noqa: E402
from paper.cells import (StoredEvaluations, attacks_on, result_of,  # noqa: E402
                         worst_cases_of)
from paper.published import MODES  # noqa: E402
from paper.tables import TABLES  # noqa: E402
from paper.trainings import config_of, name_of  # noqa: E402
from running.unfinished import checkpoint_digest  # noqa: E402
from running.untrusted import read_json  # noqa: E402

FIXTURE = 'tests/data/golden_slim.npz'
CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
KEPT = ('accuracy', 'interval', 'num_examples')
ROUNDING = 2e-4  # of the cross-entropy, between two processors


def folders():
    """Returns the folders of the released models: weights/GROUP/NAME."""
    return sorted(map(os.path.dirname, glob.glob(os.path.join(ROOT, 'weights', '*', '*',
                                                              'config.json'))))


def on_the_fixture(folder):
    """Returns what the model in a folder answers on the fixture's images of its classes, a text."""
    config = load_config(os.path.join(folder, 'config.json'))
    names = config['classes'] or CLASSES
    with np.load(os.path.join(ROOT, FIXTURE)) as z:
        images, labels = z['images'], [CLASSES[y] for y in z['labels']]
    chosen = [i for i, name in enumerate(labels) if name in names]
    labels = np.array([names.index(labels[i]) for i in chosen])
    model = build_model(config, len(names))
    model.load_madry_checkpoint(find_checkpoint(config, folder))
    logits = model(images[chosen].astype(np.float32), training=False)
    xent = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits).numpy().mean()
    answers = np.argmax(logits, axis=1)
    return (f'on the {len(chosen)} images of its classes in {FIXTURE}, pn answers '
            f'{"".join(map(str, answers))}, {(answers == labels).sum()} of them rightly; mean '
            f'cross-entropy {xent:.4f}')


def accuracies(group, name):
    """Returns {inference: {'clean': ..., 'worst in ball': ...}} as results/GROUP has them.

    Of Tables I and II; of the table `headline` where they lack the model, or the strongest attack
    on it, `adaptive`, or where it has more images. Where both lack it: clean and `adaptive_pgd`, if
    they were run. {} where nothing is stored, or results/ has other weights'.
    """
    folder = os.path.join(ROOT, 'results', group)
    if not os.path.exists(os.path.join(folder, 'config.json')):
        return {}
    config = load_config(os.path.join(folder, 'config.json'))
    digest = checkpoint_digest(find_checkpoint(config, os.path.join(ROOT, 'weights', group, name)))
    trainings = {name_of(training, config): training for table in TABLES.values()
                 for training in table.trainings}
    if name not in trainings:
        return {}
    training, found = trainings[name], {}
    stored = StoredEvaluations(name, config_of(training, config), os.path.join(folder, 'cells'))
    if training.mode in MODES and not training.seed and stored.has('clean'):
        found = of_tables(attacks_on(training, config, {name: stored}), config, digest)
    for inference, ours in (of_headline(stored, digest) if stored.has() else {}).items():
        worst = found.get(inference, {}).get(WORST_IN_BALL, {})
        if ('adaptive' not in worst.get('attacks', ())
                or ours[WORST_IN_BALL]['num_examples'] > worst['num_examples']):
            found[inference] = ours
    return found or of_cells(stored, digest)


def of_cells(stored, digest):
    found = {}
    for attack in ('clean', 'adaptive_pgd') if stored.digests[:1] == [digest] else ():
        kept = stored.if_kept(stored.attack, attack, stored.judges_of(attack))
        for result in kept['results'] if kept else ():
            found.setdefault(result['inference'], {})[attack] = {key: result[key] for key in KEPT}
    return found


def of_tables(by_attack, config, digest):
    found = {}
    if by_attack['clean']['identity'][2] != digest:
        return found
    for result in [*by_attack['clean']['results'], *worst_cases_of(by_attack, config)]:
        if result['attack'] in ('clean', WORST_IN_BALL):
            shown = {key: result[key] for key in (*KEPT, 'attacks') if key in result}
            if shares_norms(result):  # no robust accuracy: who fills the batch leaves less
                shown |= flagged({'shared norms': True})
            found.setdefault(result['inference'], {})[result['attack']] = shown
    return found


def of_headline(stored, digest):
    found, attacks = {}, ['clean', 'pgd', 'adaptive']
    for inference in headline.DEPLOYED:
        _, *kept = headline.of_row(inference, stored, False)
        if None in kept or kept[0]['identity'][2] != digest:
            continue
        clean = result_of(kept[0], inference)
        robust = headline.survivors(kept, inference)
        found[inference] = {'clean': {key: clean[key] for key in KEPT}, WORST_IN_BALL: {
            'accuracy': float(robust.mean()), 'num_examples': len(robust), 'attacks': attacks,
            'interval': [*wilson_interval(robust.sum(), len(robust))]}}
    return found


def card_of(folder):
    """Returns the card of the model in a folder, a dict."""
    config = load_config(os.path.join(folder, 'config.json'))
    group, name = folder.split(os.sep)[-2:]
    checkpoint, found = find_checkpoint(config, folder), accuracies(group, name)
    return {
        'fixture': on_the_fixture(folder),
        'model': name, **digests_of(checkpoint), 'architecture': network_name(config),
        'dataset': config['dataset'], 'classes': config['classes'] or CLASSES,
        'data': 'CIFAR-10 whose images went through JPEG compression once',
        'training': {key: config[key] for key in (
            'adversary', 'trades_beta', 'trades_xent', 'training_mode', 'shaping_ratio',
            'attack_norms', 'max_num_training_steps', 'training_batch_size', 'precision',
            'tf_random_seed', 'np_random_seed')},
        'threat_model': f'L-infinity, {config["epsilon"]:g} of 255; the attacker knows the weights '
                        'and the draw that answers',
        'epsilon': config['epsilon'], 'accuracy': found,
        **({} if found else {'note': 'its accuracy as it is served is not stored: run eval.py'}),
        'made_by': f'reproduce.py; results/{group}; RESULTS.md'}


def same(card, stored):
    """Returns whether two cards agree, up to a processor's rounding of the cross-entropy."""
    (*answers, xent), (*of_stored, other) = card['fixture'].split(), stored['fixture'].split()
    return (answers == of_stored and abs(float(xent) - float(other)) < ROUNDING
            and card == {**stored, 'fixture': card['fixture']})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing, name stale cards')
    check, stale = parser.parse_args().check, []
    for folder in folders():
        path, card = os.path.join(folder, 'card.json'), card_of(folder)
        if os.path.exists(path) and same(card, read_json(path)):
            continue
        stale.append(os.path.relpath(path, ROOT))
        if not check:
            with open(path, 'w', encoding='utf-8') as f:
                f.write(json.dumps(card, indent=1) + '\n')
    if check and stale:
        sys.exit(f'not up to date: {", ".join(stale)}')


if __name__ == '__main__':
    main()

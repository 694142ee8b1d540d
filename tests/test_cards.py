"""The released weights: each has a card, and the card is of these weights."""
import json
import os

import numpy as np
import pytest
import tensorflow as tf

import classify
from cards import CLASSES, FIXTURE, ROOT, ROUNDING, accuracies, folders, on_the_fixture
from config import load_config
from export import RECORDINGS, card_beside, read_recordings
from model import build_model, find_checkpoint

MODELS = [os.path.relpath(folder, ROOT) for folder in folders()]


@pytest.mark.parametrize('name', MODELS)
def test_the_first_line_of_a_card_is_what_its_weights_answer(name):
    with open(os.path.join(ROOT, name, 'card.json'), encoding='utf-8') as f:
        card = json.load(f)
    assert next(iter(card)) == 'fixture'
    *said, xent = card['fixture'].split()
    *found, value = on_the_fixture(os.path.join(ROOT, name)).split()
    assert said == found and float(xent) == pytest.approx(float(value), abs=ROUNDING)
    assert load_config(os.path.join(ROOT, name, 'config.json'))['model_dir'] == name
    *_, group, model = name.split(os.sep)
    assert card['accuracy'] == accuracies(group, model) and card['model'] == model


def without_images(name):
    return load_config(os.path.join(ROOT, name, 'config.json'), values={
        'model_dir': os.path.join(ROOT, name), 'data_path': 'nowhere'})


@pytest.mark.parametrize('name', MODELS)
def test_a_hundred_recordings_of_this_network_are_beside_its_weights(name):
    config = without_images(name)
    checkpoint = find_checkpoint(config)
    card = card_beside(checkpoint, config)
    assert {'weights_digest', 'recordings_digest'} <= set(card)  # and they are these files'
    model = build_model(config, len(card['classes']))
    assert len(read_recordings(model, f'{checkpoint}{RECORDINGS}', 100)) == (
        6 * config['num_residual_units'] + 1)


# One of each number of classes; the default of ten, 67% right, is not held to this
@pytest.mark.parametrize('name', ['weights/cifar10_w32_1/pgd_natural', MODELS[-1]])
def test_classify_answers_where_there_are_no_images(name):
    config = without_images(name)
    classifier, num_recordings, names = classify.load_trained(config)
    with np.load(os.path.join(ROOT, FIXTURE)) as z:
        images, labels = z['images'], [CLASSES[y] for y in z['labels']]
    known = [i for i, label in enumerate(labels) if label in names]
    answers = classifier(images[known], recording=tf.zeros([len(known)], tf.int32))['label']
    right = [names[answer] == labels[i] for answer, i in zip(answers, known)]
    assert num_recordings == 100 and sum(right) >= 0.75 * len(known)


@pytest.mark.parametrize('name', MODELS)
def test_released_weights_are_evaluated_with_the_budget_of_their_results(name):
    ours = load_config(os.path.join(ROOT, name, 'config.json'))
    _, group, _ = name.split(os.sep)
    theirs = load_config(os.path.join(ROOT, 'configs', f'{group}.json'))
    for key in ('num_eval_examples', 'apgd_num_steps', 'num_restarts', 'num_attack_examples'):
        assert ours[key] == theirs[key]


def test_the_weights_are_there_and_small():
    assert len(MODELS) >= 15
    sizes = [os.path.getsize(os.path.join(folder, file))
             for folder, _, files in os.walk(os.path.join(ROOT, 'weights')) for file in files]
    assert sum(sizes) < 25e6

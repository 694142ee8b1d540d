"""Neighbours: what other queries of a batch can do to a victim, and where they can do nothing."""
import numpy as np
import pytest

from attacks.apgd import xent_loss
from attacks.neighbours import ANY_IMAGE, QUERIES, NeighboursAttack
from paper import neighbours
from paper.cells import NotKept, StoredEvaluations
from paper.trainings import name_of
from paper.published import ADV_ONLY, NORM_SHAPING, Training
from running import UserError
from shaping import make_inference


def victims(data, n):
    """Returns n batches of QUERIES images, the label of each one's first image, in all of it."""
    return data.eval_data.xs[:n * QUERIES], np.repeat(data.eval_data.ys[:n * QUERIES:QUERIES],
                                                      QUERIES)


@pytest.mark.parametrize('ratio', [0, 9])
@pytest.mark.parametrize('epsilon', [8., ANY_IMAGE])
def test_helpers_alone_move_and_the_victims_loss_rises(
        small_model, small_config, data, ratio, epsilon):
    config = small_config(inference_shaping_ratio=ratio, shaping_batch_size=QUERIES * (ratio + 1))
    shared = make_inference(small_model, 'bn_shaping', data, config)
    x_nat, _ = victims(data, 2)
    y = np.repeat(np.argmax(shared(x_nat, 3), 1)[::QUERIES], QUERIES)  # answered rightly, both
    x = NeighboursAttack(shared, epsilon, 6).move_norms(x_nat, y, 0, 3, num_helpers=4)
    moved = (x != x_nat).any((1, 2, 3)).reshape(2, QUERIES)
    assert (moved == ((np.arange(QUERIES) >= 1) & (np.arange(QUERIES) <= 4))).all()
    assert x.min() >= 0 and x.max() <= 255
    assert (np.abs(x - x_nat).max() > 100) if epsilon == ANY_IMAGE else (
        np.abs(x - x_nat).max() <= epsilon)

    def losses(images):
        return xent_loss(shared(images, 3), y).numpy()[::QUERIES]
    assert (losses(x) > losses(x_nat)).all()


@pytest.mark.parametrize('helpers, epsilon', [(0, 8.), (5, 8.), (5, ANY_IMAGE)])
def test_who_owns_the_victim_too_moves_it_within_its_ball(
        small_model, small_config, data, helpers, epsilon):
    config = small_config(inference_shaping_ratio=0, shaping_batch_size=6)
    shared = make_inference(small_model, 'bn_shaping', data, config)
    x_nat = data.eval_data.xs[:6].astype(np.float32)
    y = np.repeat(np.argmax(shared(x_nat, 3), 1)[:1], 6)  # answered rightly
    x = NeighboursAttack(shared, epsilon, 3, 6, ['xent', 'dlr', 'targeted_dlr'], 8.).move_norms(
        x_nat, y, 0, 3, helpers)
    moved = np.abs(x - x_nat).max((1, 2, 3))
    assert (moved > 0).tolist() == [i <= helpers for i in range(6)]
    assert moved[0] == 8 and x.min() >= 0 and x.max() <= 255
    assert (moved[1:] > 100).all() if epsilon == ANY_IMAGE else (moved <= 8).all()
    assert xent_loss(shared(x, 3), y).numpy()[0] > xent_loss(shared(x_nat, 3), y).numpy()[0]


def test_a_stronger_attacker_keeps_what_a_weaker_one_found(small_model, small_config, data):
    """Without a step of its own it returns the weaker one's batch, or one with a higher loss."""
    shared = make_inference(small_model, 'bn_shaping', data, small_config())
    x_nat, _ = victims(data, 1)
    y = np.repeat(np.argmax(shared(x_nat, 0), 1)[:1], QUERIES)
    weaker = NeighboursAttack(shared, ANY_IMAGE, 6).move_norms(x_nat, y, 0, 0, 9)
    again = NeighboursAttack(shared, 0., 1).move_norms(x_nat, y, 0, 0, 9, [weaker])
    assert (again == weaker).all() and (weaker != x_nat).any()


@pytest.fixture
def few(monkeypatch, small_config):
    monkeypatch.setattr(neighbours, 'NUM_HELPERS', (9,))
    monkeypatch.setattr(neighbours, 'AT_ONCE', 2)
    return small_config(num_eval_examples=4, apgd_num_steps=1, num_recordings=5,
                        recorded_samples=20)


def test_no_bit_of_an_answer_changes_where_queries_are_on_their_own(small_model, few, data):
    """`neighbours` holds each of them to that itself; so do random images beside the victim."""
    x_nat, _ = victims(data, 2)
    noise = np.random.default_rng(0).integers(0, 256, x_nat.shape, np.uint8)
    x = np.where((np.arange(len(x_nat)) % QUERIES == 0)[:, None, None, None], x_nat, noise)
    forms = neighbours.separate_forms(few)
    assert len(forms) == 2
    for mode, settings in forms.values():
        inference = make_inference(small_model, mode, data, {**few, **settings})
        before, after = (neighbours.of_victims(inference, images, 1) for images in (x_nat, x))
        assert before.tobytes() == after.tobytes()
    for settings in neighbours.shared_forms(few).values():
        inference = make_inference(small_model, 'bn_shaping', data, {**few, **settings})
        before, after = (neighbours.of_victims(inference, images, 1) for images in (x_nat, x))
        assert (before != after).any(axis=1).all()


def test_the_measurement_resumes_and_gives_its_rows(small_model, few, data, tmp_path, monkeypatch):
    """Stopped after two of four victims; then the other two alone are attacked."""
    kept = str(tmp_path / 'unfinished' / 'neighbours.part')
    original = NeighboursAttack.move_norms

    def stopped(self, x_nat, y, seed, query, *args):
        if query == 1:
            raise KeyboardInterrupt
        return original(self, x_nat, y, seed, query, *args)
    with monkeypatch.context() as m:
        m.setattr(NeighboursAttack, 'move_norms', stopped)
        with pytest.raises(KeyboardInterrupt):
            neighbours.neighbours(small_model, data, few, kept)

    def rest(self, x_nat, y, seed, query, *args):
        assert query == 1
        return original(self, x_nat, y, seed, query, *args)
    with monkeypatch.context() as m:
        m.setattr(NeighboursAttack, 'move_norms', rest)
        right = neighbours.neighbours(small_model, data, few, kept)
    assert {len(values) for values in right.values()} == {4} and len(right) == 4 + 2 * 2

    rows = rows_of(few, {'neighbours': right})
    assert len(rows) == 2 * (2 * 2 + 2) and {len(row) for row in rows} == {
        len(neighbours.HEADER)}
    assert rows[-1][1] == '`bn_recorded`' and rows[-1][4] == rows[-1][5]


def rows_of(config, found):
    """Returns the rows where {name of the measurement: what it found} is stored of both models."""
    class Kept(StoredEvaluations):
        def __init__(self):
            pass

        def experiment(self, measure, identity, summarize):
            if measure.__name__ not in found:
                raise NotKept('not stored')
            return summarize(found[measure.__name__])
    names = [name_of(Training('pgd', mode), config) for mode in (ADV_ONLY, NORM_SHAPING)]
    return neighbours.neighbour_rows(config, dict.fromkeys(names, Kept()))


def test_the_owner_of_a_batch_turns_whom_the_owner_of_an_image_turns(small_model, few, data):
    """Under `bn` in batches of ten and of eval_batch_size, and where queries share clean samples.

    An untrained network answers nearly all images with one class; its victims have that label.
    """
    data.eval_data.ys[:4] = np.argmax(small_model(data.eval_data.xs[:4]), 1)
    right = neighbours.owners(small_model, data, few)
    forms = {name for name, *_ in right}
    assert len(forms) == 3 and {len(values) for values in right.values()} == {4}
    for form in forms:
        *attackers, (helpers, epsilon) = [key[1:] for key in right if key[0] == form]
        assert epsilon == ANY_IMAGE
        assert helpers == (19 if '20' in form and 'shaping' not in form else 9)
        assert attackers == [(0, 0.), (0, 8.), (helpers, 8.)]
        still_right = np.array([values for key, values in right.items() if key[0] == form])
        assert (still_right[:-1] | ~still_right[1:]).all()
    rows = rows_of(few, {'owners': right})
    assert len(rows) == 2 * 3 * 3 and [row[2:4] for row in rows[:3]] == [
        ['0, own', 'within 8'], ['9, own', 'within 8'], ['9, own', 'any']]
    with pytest.raises(UserError, match='nothing is stored'):
        rows_of(few, {})


def test_who_was_wrong_before_is_not_turned():
    before, after = np.array([1, 1, 1, 1, 0], bool), np.array([1, 1, 1, 0, 0], bool)
    assert neighbours.turned(before, after) == ['80.0', '60.0', '1 of 4: 25.0 [4.6, 69.9]']
    assert neighbours.turned(np.zeros(5, bool), after)[-1] == '0 of 0'


def test_an_answer_that_depends_on_others_where_it_must_not_is_a_defect(
        small_model, few, data, monkeypatch):
    monkeypatch.setattr(neighbours, 'separate_forms', lambda config: {
        'leaky': ('bn_shaping', {'shaping_batch_size': 100})})
    data.eval_data.ys[:4] = np.argmax(small_model(data.eval_data.xs[:4]), 1)
    with pytest.raises(RuntimeError, match='leaky: an answer depends on the other queries'):
        neighbours.neighbours(small_model, data, few)

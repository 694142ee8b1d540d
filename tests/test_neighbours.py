"""Neighbours: what other queries of a batch can do to a victim, and where they can do nothing."""
import numpy as np
import pytest

from attacks.apgd import xent_loss
from attacks.neighbours import ANY_IMAGE, QUERIES, NeighboursAttack
from paper import neighbours
from paper.cells import StoredEvaluations
from paper.trainings import name_of
from paper.published import ADV_ONLY, NORM_SHAPING, Training
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

    class Kept(StoredEvaluations):
        def __init__(self):
            pass

        def experiment(self, measure, identity, summarize):
            return summarize(right)
    names = [name_of(Training('pgd', mode), few) for mode in (ADV_ONLY, NORM_SHAPING)]
    rows = neighbours.neighbour_rows(few, dict.fromkeys(names, Kept()))
    assert len(rows) == 2 * (2 * 2 + 2) and {len(row) for row in rows} == {
        len(neighbours.HEADER)}
    assert rows[-1][1] == '`bn_recorded`' and rows[-1][4] == rows[-1][5]


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

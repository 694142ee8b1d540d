"""The binarization test: it plants what it says, and tells a masked gradient from an intact one."""
import numpy as np
import pytest
import tensorflow as tf

from paper import binarization
from paper.binarization import EXPECTING, KNOWING, BinaryInference, FeatureModel
from shaping import make_inference


@pytest.fixture
def config(small_config, monkeypatch):
    monkeypatch.setattr(binarization, 'BATCH', 2)
    return small_config(num_eval_examples=3, num_steps=5, apgd_num_steps=3, num_recordings=5,
                        recorded_samples=20)


class Masked(FeatureModel):
    """Sees pixels in steps of 4, and has no gradient; but for that it is the same network."""

    def __call__(self, images, **norms):
        return super().__call__(tf.stop_gradient(4 * tf.round(images / 4)) + 0 * images, **norms)


def test_a_masked_gradient_fails_where_an_intact_one_passes(small_model, data, config,
                                                            monkeypatch):
    intact = binarization.binarization(small_model, data, config, 'pn', KNOWING)
    monkeypatch.setattr(binarization, 'FeatureModel', Masked)
    masked = binarization.binarization(small_model, data, config, 'pn', ('adaptive_pgd',))
    assert intact['planted'].all() and all(intact['found'][name].all() for name in KNOWING)
    assert masked['planted'].all() and not masked['found']['adaptive_pgd'].any()
    assert not intact['random']['adaptive'].any()


def test_a_weak_attack_fails(small_model, data, config):
    config |= {'num_steps': 1, 'step_size': 0.01, 'random_start': False}
    weak = binarization.binarization(small_model, data, config, 'pn', ('adaptive_pgd',))
    assert weak['planted'].all() and not weak['found']['adaptive_pgd'].any()


def test_what_is_kept_is_not_done_again(small_model, data, config, tmp_path, monkeypatch):
    config |= {'num_steps': 1}
    arguments = small_model, data, config, 'pn', ('adaptive_pgd',), str(tmp_path / 'part')
    planted, plant = [], binarization.plant

    def stopped_at_the_third(*given):
        planted.append(plant(*given))
        if len(planted) == 3:
            raise KeyboardInterrupt
        return planted[-1]
    monkeypatch.setattr(binarization, 'plant', stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        binarization.binarization(*arguments)
    resumed = binarization.binarization(*arguments)
    assert len(planted) == 4  # the third image again, alone
    whole = binarization.binarization(*arguments[:-1])
    assert len(planted) == 7 and (whole['planted'] == resumed['planted']).all()
    assert (whole['found']['adaptive_pgd'] == resumed['found']['adaptive_pgd']).all()


@pytest.mark.parametrize('mode, knows', [('pn', True), ('bn_shaping', True), ('bn_recorded', True),
                                         ('bn_recorded', False)])
def test_the_planted_example_is_a_corner_of_the_ball_and_each_image_has_its_own(
        small_model, data, config, mode, knows):
    """Whatever images are left out and however a call is divided, each meets its own readout."""
    config |= {'shaping_batch_size': 10, 'inference_shaping_ratio': 9}
    binary = BinaryInference(make_inference(FeatureModel(small_model), mode, data, config), 3,
                             small_model.filters[-1])
    x = data.eval_data.xs[:3].astype(np.float32)
    rows = binary.rows(3, binary.known(0))
    examples = np.array([
        binarization.plant(binary, x[i], i, rows[i] if knows else None, config,
                           np.random.default_rng(i)) for i in range(3)])
    change = np.abs(examples - x)
    assert change.max() <= 8 and ((change == 8) | (examples == 0) | (examples == 255)).all()
    assert binary.finds(examples, 0).all() and not binary.finds(x, 0).any()
    part, = binary.parts(3)
    drawn = binary.drawn(part, binary.known(0))[None]
    together = binary.logits(examples, tf.constant(drawn[0])).numpy()
    chosen = np.array([2, 0])
    alone = binary.logits(examples[chosen], tf.constant(binary.drawn_for(drawn, chosen)[0]))
    np.testing.assert_allclose(alone, together[chosen], atol=1e-3)
    others = binary.logits(examples[[1, 2, 0]], tf.constant(drawn[0])).numpy()
    assert (others[:, 1] < others[:, 0]).any()


def test_a_readout_separates_its_points_or_says_nothing():
    rng = np.random.default_rng(0)
    inner = rng.normal(size=(200, 8))
    boundary = np.full((3, 8), 4.) + 0.1 * rng.normal(size=(3, 8))
    weights, bias = binarization.readout(inner, boundary)
    z = inner @ weights + bias
    assert (boundary @ weights + bias).min() == pytest.approx(1 - binarization.CLOSENESS)
    assert z.max() == pytest.approx(-binarization.CLOSENESS)
    weights, bias = binarization.readout(inner, inner[:3])
    assert (inner @ weights + bias == -1).all()


@pytest.mark.parametrize('digits, planted, cells', [
    ('1' * 19 + '0', '1' * 20, ['95.0 [76.4, 99.1]', '20 of 20', 'passes']),
    ('1' * 18 + '00', '1' * 20, ['90.0 [69.9, 97.2]', '20 of 20', '**below 95%**']),
    ('1' * 18 + '00', '1' * 18 + '00', ['100.0 [82.4, 100.0]', '18 of 20', 'too few to say']),
    ('1' * 20, '0' * 20, ['', '0 of 20', 'none planted'])])
def test_rows_count_planted_examples_alone(digits, planted, cells, config):
    class Stored:
        def get(self, what, identity, compute):
            of_all = dict.fromkeys(KNOWING + EXPECTING, digits)
            return {'planted': planted, 'found': of_all, 'random': of_all}

        def if_kept(self, get, *args):  # all but one test, which takes an hour on a deep network
            return None if args[1:] == ('bn_shaping', EXPECTING) else get(*args)
    Stored.config = config
    names = ('pgd_adv_only', 'pgd_shaping_in_attack_and_training_3to1')
    rows = binarization.binarization_rows(config, dict.fromkeys(names, Stored()))
    assert len(rows) == 2 * (2 + 2 + 3) and {len(row) for row in rows} == {7}
    assert all([row[3], *row[5:]] == cells for row in rows)

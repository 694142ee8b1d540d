"""The table `variations`: what a replay of a training finds, and how a row is judged."""
import json
import os

import pytest

from cifar10_input import load_data
from config import load_config
from model import build_model
from paper import experiments, tables, variations
from paper.cells import Evaluations, StoredEvaluations, networks, result_of
from paper.population_norms import REPLAYS, Replay, population_norms, replay, set_population_norms
from paper.published import SHAPED
from paper.trainings import config_of, name_of
from running import UserError
from running.unfinished import data_digest
from train import train


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The configuration of a training of five steps, of which the last three are kept."""
    return load_config(settings=[
        'dataset=synthetic', 'num_residual_units=1', 'width_factor=1', 'training_batch_size=8',
        'num_steps=1', 'max_num_training_steps=5', 'num_checkpoint_steps=1', 'num_output_steps=9',
        'num_eval_examples=20',
        'step_size_schedule=[[0, 0.1]]', f'model_dir={tmp_path_factory.mktemp("replayed")}'])


@pytest.fixture(scope='module')
def norms_at(trained):
    """f(step) -> the population norms that the training stored; it was made before."""
    train(trained)
    data = load_data(trained)

    def norms(step):
        model = build_model(trained, data.num_classes)
        model.load_madry_checkpoint(os.path.join(trained['model_dir'], f'checkpoint-{step}'))
        return model, [v.numpy() for v in population_norms(model)]

    return norms


def equal(a, b):
    return all((u == v).all() for u, v in zip(a, b))


@pytest.mark.parametrize('stale', [0, 1, 3])
def test_a_replay_finds_the_norms_that_the_training_had(stale, trained, norms_at):
    """Resumed from a checkpoint, or, where the folder keeps none so old, made from the start."""
    config, data = trained, load_data(trained)
    if stale == 3:  # checkpoint-2 is gone: the twin is a training that ends there
        assert not os.path.exists(os.path.join(config['model_dir'], 'checkpoint-2.index'))
        twin = {**config, 'max_num_training_steps': 2, 'model_dir': config['model_dir'] + '_twin'}
        train(twin)
        model = build_model(twin, data.num_classes)
        model.load_madry_checkpoint(os.path.join(twin['model_dir'], 'checkpoint-2'))
        expected = [v.numpy() for v in population_norms(model)]
    else:
        expected = norms_at(5 - stale)[1]
    assert equal(replay(data, config, Replay(stale=stale)), expected)


def test_a_replay_with_another_decay_moves_the_norms_alone(trained, norms_at, monkeypatch):
    data = load_data(trained)
    model, norms = norms_at(5)
    weights = [v.numpy() for v in model.trainable_variables]
    monkeypatch.setitem(REPLAYS, 'decay 0', Replay(decay=0.))
    set_population_norms(model, data, trained, 'decay 0')
    moved = [v.numpy() for v in population_norms(model)]
    with monkeypatch.context() as m:  # a second attack takes them as they are
        m.setattr('paper.population_norms.replay', None)
        set_population_norms(norms_at(5)[0], data, trained, 'decay 0')
    assert not equal(moved, norms)
    assert equal(weights, [v.numpy() for v in model.trainable_variables])
    # With no memory, they are the statistics of the last step's X^(T): as `last batch` is of the
    # next step's, they are those of a training that is one step shorter
    shorter = {**trained, 'max_num_training_steps': 4}
    previous, _ = norms_at(4)
    set_population_norms(previous, data, shorter, 'last batch')
    for ours, theirs in zip(moved, population_norms(previous)):
        assert ours == pytest.approx(theirs.numpy(), rel=1e-3, abs=1e-4)


def test_released_weights_cannot_be_replayed(trained, small_model, tmp_path):
    small_model.save_madry_checkpoint(tmp_path / 'checkpoint-5', global_step=5)
    with pytest.raises(UserError, match='checkpoint-5 holds no velocities; expected the folder of'):
        replay(load_data(trained), {**trained, 'model_dir': str(tmp_path)}, Replay())


@pytest.fixture
def evaluations(tmp_path, small_model, small_config, data):
    """{name: Evaluations} of all variations' trainings, each the untrained small model."""
    config = small_config(num_eval_examples=20, model_dir=str(tmp_path), training_batch_size=16,
                          max_num_training_steps=8)
    found = {}
    for name, of_training in tables.trainings_of([tables.TABLES['variations']], config).items():
        network = networks(10)(of_training)
        network.save_madry_checkpoint(
            os.path.join(of_training['model_dir'],
                         f'checkpoint-{of_training["max_num_training_steps"]}'))
        found[name] = Evaluations(name, of_training, data, data_digest(data), network,
                                  str(tmp_path / 'cells'))
    return config, found


def test_a_row_is_judged_by_the_attack_of_the_first_one(evaluations, monkeypatch):
    config, found = evaluations
    few = [each for each in variations.VARIATIONS if each.training.variant in (
        '', 'one_step') and not each.training.seed]
    assert len(few) == 4  # the first, the conjectured training, two that cross
    monkeypatch.setattr(variations, 'VARIATIONS', few)
    monkeypatch.setattr(experiments, 'num_measured', lambda data, config: 32)
    rows = variations.variation_rows(config, found)
    assert len(rows) == 5 and {len(row) for row in rows} == {len(variations.HEADER)}
    assert rows[-1][3:8] == ['94.4', '94.2', '3.0', '81.6', '+78.6']
    steps = variations.HEADER.index('learning rate')
    assert [row[steps] for row in rows[:-1]] == ['0.1'] * 4
    one_step = found[name_of(few[1].training, config)]
    assert one_step.config['num_steps'] == 1
    kept = one_step.attack('pgd', ('pn', 'bn_shaping'), num_eval_examples=20,
                           num_steps=config['num_steps'], step_size=config['step_size'])
    assert result_of(kept, 'pn')['num_steps'] == config['num_steps'] > 1
    # What is stored makes the same rows, and those alone
    stored = {name: StoredEvaluations(name, of.config, of.folder) for name, of in found.items()}
    assert variations.variation_rows(config, stored) == rows
    monkeypatch.setattr(variations, 'VARIATIONS', (*few, variations.Variation(
        'depth', 'w32-1', SHAPED._replace(variant='w32'))))
    assert variations.variation_rows(config, stored) == rows
    assert len(variations.differences(config, stored)) == 4
    # Without the direct attack the row stays, and says nothing of it
    lost, = (file for file in os.listdir(one_step.folder)
             if file.startswith(f'{one_step.name}-adaptive_pgd'))
    os.remove(os.path.join(one_step.folder, lost))
    stored[one_step.name] = StoredEvaluations(one_step.name, one_step.config, one_step.folder)
    without = variations.variation_rows(config, stored)[1]
    assert without == [*rows[1][:-2], '', rows[1][-1]]


def test_crossed_examples_are_judged_by_the_pn_of_the_model_that_made_them(evaluations):
    config, found = evaluations
    source = found[name_of(SHAPED._replace(variant='half'), config)]
    target = found[name_of(SHAPED, config)]
    crossed = variations.crossed('pgd', source, target, config)
    own = source.attack('pgd', ('pn',), num_eval_examples=20)
    assert result_of(crossed, 'pn')['xent'] == pytest.approx(result_of(own, 'pn')['xent'])
    direct = target.attack('pgd', ('pn', 'bn_shaping'), num_eval_examples=20)
    assert result_of(crossed, 'bn_shaping')['xent'] != result_of(direct, 'bn_shaping')['xent']


def test_a_shard_of_crossed_examples_is_no_more_than_that(evaluations, monkeypatch):
    config, found = evaluations
    source, target = found['pgd_natural'], found[name_of(SHAPED, config)]
    made = []
    monkeypatch.setattr(variations, 'make_attack', lambda *_: (
        lambda start, end: made.append((start, end)) or source.data.eval_data.xs[start:end],
        {'epsilon': None}))
    target.shard = 10, 20
    variations.crossed('clean', source, target, {**config, 'eval_batch_size': 10})
    assert made == [(10, 20)]


def test_the_crossed_table_stands_beside_table_i(evaluations, monkeypatch):
    config, found = evaluations
    monkeypatch.setattr(variations, 'PAPER_ATTACKS', ('clean', 'fgsm', 'shaping'))
    rows = variations.crossed_rows({**config, 'eval_batch_size': 20}, found)
    assert [row[0] for row in rows] == ['clean', 'fgsm', 'shaping']
    assert rows[1][2::2] == ['55.2', '59.7', '74.0']
    natural = found['pgd_natural'].attack('fgsm', ('pn',), num_eval_examples=20)
    assert rows[1][3].startswith(f'{100 * result_of(natural, "pn")["accuracy"]:.1f} [')


def test_the_steps_of_a_training_leave_a_half(small_config, data):
    with pytest.raises(UserError, match='max_num_training_steps must be at least 2'):
        variations.check_steps(small_config(max_num_training_steps=1), data)
    half = config_of(SHAPED._replace(variant='half'), small_config(max_num_training_steps=8))
    assert half['max_num_training_steps'] == 4


def test_a_variation_that_changes_nothing_is_none(small_config):
    """At the paper's depth, `w32` is the training itself; a row names the network that it has."""
    deep = small_config(num_residual_units=5, width_factor=1, precision='mixed_bfloat16')
    shown = {(each.varied, each.value) for each in variations.varied_by(deep)}
    assert {value for varied, value in shown if varied == 'width'} == {'w32-2', 'w32-4'}
    assert not {'depth', 'precision'} & {varied for varied, _ in shown}
    names = tables.trainings_of([tables.TABLES['variations']], deep)
    assert not any(name.endswith(('_w32', '_bfloat16')) for name in names)
    small = small_config(num_residual_units=1, width_factor=1)
    assert {('depth', 'w32-1'), ('width', 'w8-4'), ('precision', 'mixed_bfloat16')} <= {
        (each.varied, each.value) for each in variations.varied_by(small)}


def test_a_replay_is_in_the_precision_of_the_training(trained, norms_at, small_model, monkeypatch):
    seen = []
    monkeypatch.setattr('paper.population_norms.replayed',
                        lambda data, config, rule: seen.append(json.loads(config)) or [])
    norms_at(5)  # trains it
    set_population_norms(small_model, None, {**trained, 'precision': 'mixed_bfloat16'}, 'stale 10')
    assert seen[0]['precision'] == trained['precision'] == 'float32'

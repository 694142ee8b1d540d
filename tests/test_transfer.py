"""The attack `transfer`: another model's examples, told apart by its weights, not by its path."""
import collections
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from attacks import ATTACKS, make_attack, other_weights
from attacks.apgd import adaptive
from eval import attacks_of, kept_files
from model import Model
from paper import tables
from paper.cells import Evaluations, StoredEvaluations
from running import UserError
from running.unfinished import checkpoint_digest, data_digest
from shaping import make_inference


@pytest.fixture
def other(small_model, tmp_path):
    """(another model of the same shape, the folder of its checkpoint)"""
    model = Model(1, 1)
    for v, of_small in zip(model.variables, small_model.variables):
        v.assign(of_small)
    kernel = model.variables_by_name['logit/DW']
    kernel.assign(tf.roll(kernel.value, 1, axis=1))
    model.save_madry_checkpoint(tmp_path / 'other' / 'checkpoint-9', global_step=9)
    return model, str(tmp_path / 'other')


@pytest.mark.parametrize('mode', ['pn', 'bn_recorded'])
def test_transfer_from_the_model_itself_is_adaptive_that_gives_no_image_up(
        small_model, small_config, data, transfer_from, mode):
    """It turns whom that one turns; what is wrong already is attacked all the same."""
    config = small_config(num_recordings=5, **transfer_from)
    inference = make_inference(small_model, mode, data, config)
    (direct, of_direct), (transfer, settings) = (
        make_attack(name, small_model, data, config, 1, inference)
        for name in ('adaptive', 'transfer'))
    x_nat, y = data.eval_data.xs[:20], data.eval_data.ys[:20]
    examples, direct = transfer(0, 20).numpy(), direct(0, 20).numpy()
    wrong, beaten, left = (np.argmax(inference(x, 0), 1) != y for x in (x_nat, direct, examples))
    assert wrong.any() and not wrong.all() and left[beaten].all()
    assert (direct[wrong] == x_nat[wrong]).all()
    assert (examples != x_nat).any(axis=(1, 2, 3)).all()
    loss = [tf.nn.sparse_softmax_cross_entropy_with_logits(y, inference(x, 0)).numpy()
            for x in (x_nat, examples)]
    assert (loss[1] > loss[0]).all()
    assert settings.pop('transfer_from') and settings == of_direct


def test_transfer_goes_through_the_other_model(small_model, small_config, data, other):
    model, folder = other
    config = small_config(transfer_from=folder)
    inference, through = (make_inference(of, 'pn', data, config) for of in (small_model, model))
    attack, settings = make_attack('transfer', small_model, data, config, 1, inference)
    theirs, _ = adaptive(through, data, config, 1, until_wrong=False)
    ours, _ = adaptive(inference, data, config, 1, until_wrong=False)
    examples = attack(0, 20).numpy()
    assert (examples == theirs(0, 20).numpy()).all() and (examples != ours(0, 20).numpy()).any()
    assert settings['transfer_from'] == checkpoint_digest(f'{folder}/checkpoint-9')[:16]


def test_what_is_kept_depends_on_the_other_weights_and_not_on_their_path(
        small_config, other, transfer_from, tmp_path):
    folder = other[1]
    shutil.copytree(folder, tmp_path / 'moved')
    judged = os.path.join(transfer_from['transfer_from'], 'checkpoint-7')
    def kept(path):
        config = small_config(transfer_from=str(path))
        return kept_files('eval', judged, '', config, ['adaptive', 'transfer'], ['pn'])
    here, moved, another = map(kept, (folder, tmp_path / 'moved', judged))
    assert here == moved and here['adaptive through pn'] == another['adaptive through pn']
    assert here['transfer through pn'] != another['transfer through pn']


def test_a_cell_of_transfer_names_its_source_and_is_found_without_weights(
        small_model, small_config, data, other, transfer_from, tmp_path):
    config = small_config(num_eval_examples=20, apgd_num_steps=1)
    cells, evaluations = str(tmp_path / 'cells'), {}
    for name, folder, step in (('ours', transfer_from['transfer_from'], 7),
                               ('theirs', other[1], 9)):
        evaluations[name] = Evaluations(
            name, {**config, 'model_dir': folder, 'max_num_training_steps': step}, data,
            data_digest(data), small_model, cells)
    ours, theirs = evaluations.values()
    found = ours.attack('transfer', ('pn',), source=theirs)
    assert found['results'][0]['transfer_from'] == theirs.digests[0][:16]
    assert ours.attack('transfer', ('pn',), source=ours) != found
    stored = {name: StoredEvaluations(name, of.config, cells) for name, of in evaluations.items()}
    assert stored['ours'].attack('transfer', ('pn',), source=stored['theirs']) == found
    stored['theirs'].digests = ['of others']
    with pytest.raises(UserError, match='made with another model'):
        stored['ours'].if_kept(stored['ours'].attack, 'transfer', ('pn',), source=stored['theirs'])
    with pytest.raises(UserError, match='holds no transfer-from-ours of theirs'):
        stored['theirs'].attack('transfer', ('pn',), source=stored['ours'])


@pytest.mark.parametrize('change, fault', [
    ({'transfer_from': ''}, 'transfer_from is ""; expected --set transfer_from=DIR'),
    ({'transfer_from': 'nowhere/model-1'}, 'transfer_from nowhere/model-1: there is no nowhere/'),
    ({'width_factor': 2}, r'DW is \[3, 3, 16, 16\] in .*checkpoint-7, but \[3, 3, 16, 32\]')])
def test_another_model_that_cannot_be_used_is_told_in_one_line(
        small_model, small_config, data, transfer_from, change, fault):
    config = small_config(**{**transfer_from, **change})
    with pytest.raises(UserError, match=fault) as raised:
        make_attack('transfer', small_model, data, config)
    assert len(str(raised.value).splitlines()) == 1


def test_a_source_of_other_classes_is_refused_before_its_weights_are_read(
        small_config, transfer_from):
    with open(f'{transfer_from["transfer_from"]}/config.json', 'w', encoding='utf-8') as f:
        f.write('{"classes": ["a", "b"]}')
    with pytest.raises(UserError, match='was trained with classes .* expected the same where '
                                        'transfer_from names a model'):
        other_weights('transfer', small_config(**transfer_from))


def test_all_attacks_are_all_but_those_that_lack_another_model_or_draws(
        small_config, transfer_from, capsys):
    some = [name for name in ATTACKS if name not in ('transfer', 'retry')]
    assert attacks_of('all', small_config()) == some
    assert capsys.readouterr().out == (
        'transfer is left out: transfer_from names no other model\n'
        'retry is left out: it needs --num_draws 2 or more\n')
    assert attacks_of('all', small_config(**transfer_from), 2) == list(ATTACKS)
    assert attacks_of('clean,transfer', small_config()) == ['clean', 'transfer']  # then refused


def test_of_a_table_of_which_nothing_is_stored_one_is_told(small_config):
    """Where some is stored, as in results/cifar10_w32_1_float32, it has those rows."""
    nothing = SimpleNamespace(name='', attack=None, if_kept=lambda *_, **__: None)
    with pytest.raises(UserError, match='nothing is stored of `transfer` from the model of'):
        tables.transfer_rows(small_config(), collections.defaultdict(lambda: nothing))

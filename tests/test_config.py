"""The configuration: what config.json agrees with, and what a user's mistake is answered with."""
import difflib
import json
import os
import re
import subprocess
import sys

from hypothesis import strategies as st
import pytest

from attacks import ATTACKS, check_names
from config import (PARTS, SCHEMA, epsilon_doubt, load_config, may_change, parse_setting,
                    relevant, store_config)
from running import UserError
from running.untrusted import read_json
from conftest import fuzz

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS = os.path.join(ROOT, 'configs')

# The original's config.json: its keys and values in its order, each group under a comment.
ORIGINAL = [
    ('_comment', '===== MODEL CONFIGURATION ====='),
    ('model_dir', 'models/a_very_robust_model'),
    ('_comment', '===== DATASET CONFIGURATION ====='),
    ('data_path', 'cifar10_data'),
    ('_comment', '===== TRAINING CONFIGURATION ====='),
    ('tf_random_seed', 451760341),
    ('np_random_seed', 216105420),
    ('max_num_training_steps', 80000),
    ('num_output_steps', 100),
    ('num_summary_steps', 100),
    ('num_checkpoint_steps', 1000),
    ('training_batch_size', 128),
    ('step_size_schedule', [[0, 0.1], [40000, 0.01], [60000, 0.001]]),
    ('weight_decay', 0.0002),
    ('momentum', 0.9),
    ('_comment', '===== EVAL CONFIGURATION ====='),
    ('num_eval_examples', 10000),
    ('eval_batch_size', 100),
    ('eval_on_cpu', False),
    ('_comment', '=====ADVERSARIAL EXAMPLES CONFIGURATION====='),
    ('epsilon', 8.0),
    ('num_steps', 10),
    ('step_size', 2.0),
    ('random_start', True),
    ('loss_func', 'xent'),
    ('store_adv_path', 'attack.npy'),
]


def original_lines():
    """The original's file by line: two spaces and a pair, an empty line before a group."""
    lines = []
    for number, (key, value) in enumerate(ORIGINAL):
        if key == '_comment' and number > 0:
            lines.append('')
        comma = ',' if number + 1 < len(ORIGINAL) else ''
        lines.append(f'  {json.dumps(key)}: {json.dumps(value)}{comma}')
    return ['{', *lines, '}']


def our_text():
    with open(os.path.join(ROOT, 'config.json'), encoding='utf-8') as f:
        return f.read()


def refusal(*args, **kwargs):
    """The one line with which load_config refuses its arguments."""
    with pytest.raises(UserError) as caught:
        load_config(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def write(folder, text, name='mine.json'):
    path = os.path.join(folder, name)
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)
    return path


# ---- config.json and the original's


def test_config_json_is_accepted_and_holds_every_key_in_the_documented_order():
    assert list(load_config()) == list(SCHEMA)
    assert list(read_json(os.path.join(ROOT, 'config.json'))) == list(SCHEMA)


def test_config_json_has_the_originals_keys_first_with_its_values():
    pairs = json.loads(our_text(), object_pairs_hook=list)
    expected = [(k, 64 if k == 'training_batch_size' else v) for k, v in ORIGINAL]
    assert pairs[:len(ORIGINAL)] == expected
    assert [type(v) for _, v in pairs[:len(ORIGINAL)]] == [type(v) for _, v in ORIGINAL]


def test_diff_with_the_original_changes_one_line_and_otherwise_only_adds():
    diff = [line for line in difflib.ndiff(original_lines(), our_text().splitlines())
            if not line.startswith('?')]
    assert [line for line in diff if line.startswith('- ')] == ['-   "training_batch_size": 128,']
    assert '+   "training_batch_size": 64,' in diff


@pytest.mark.parametrize('name', sorted(os.listdir(CONFIGS)))
def test_every_other_configuration_loads(name):
    config = load_config(os.path.join(CONFIGS, name))
    assert config != load_config()  # it says something


# ---- mistakes


@pytest.mark.parametrize('key, text, expected', [
    ('max_num_training_steps', 'true', 'an integer'),
    ('max_num_training_steps', '"80000"', 'an integer'),
    ('max_num_training_steps', '0', 'an integer, 1'),
    ('max_num_training_steps', '9223372036854775808', 'an integer, 1 to 2147483647'),
    ('training_batch_size', '8.5', 'an integer'),
    ('training_batch_size', '64.0', 'an integer'),
    ('training_batch_size', 'null', 'an integer'),
    ('num_steps', 'NaN', 'an integer'),
    ('num_steps', '-1', 'an integer'),
    ('tf_random_seed', '-1', 'an integer, 0 to 2147483647'),
    ('np_random_seed', '2147483648', 'an integer, 0 to 2147483647'),
    ('inference_shaping_ratio', '-1', 'an integer, 0'),
    ('epsilon', '"8"', 'a number from 0 to 255'),
    ('epsilon', 'false', 'a number from 0 to 255'),
    ('epsilon', '-0.5', 'a number from 0 to 255'),
    ('epsilon', '256', 'a number from 0 to 255'),
    ('epsilon', 'NaN', 'a number from 0 to 255'),
    ('step_size', 'Infinity', 'a number from 0 to 255'),
    ('fgsm_epsilon', '-Infinity', 'a number from 0 to 255'),
    ('weight_decay', 'Infinity', 'a number from 0'),
    ('weight_decay', '[0.1]', 'a number from 0'),
    ('momentum', '1.5', 'a number from 0 to 1'),
    ('eval_on_cpu', '0', 'true or false'),
    ('random_start', '"true"', 'true or false'),
    ('data_augmentation', 'null', 'true or false'),
    ('model_dir', '""', 'the path of a folder'),
    ('model_dir', '7', 'the path of a folder'),
    ('data_path', r'"two\nlines"', 'the path of a folder'),
    ('data_path', r'"nul\u0000"', 'the path of a folder'),
    ('data_path', r'"half a character \ud800"', 'the path of a folder'),
    ('store_adv_path', 'true', 'the path of a .npy file'),
    ('loss_func', '"hinge"', 'one of xent, cw'),
    ('loss_func', '["xent"]', 'one of xent, cw'),
    ('training_mode', '"adversarial"', 'shaping_in_attack_and_training'),
    ('adversary', '"fgsm"', 'one of pgd, trades'),
    ('trades_beta', '-1', 'a number from 0'),
    ('eot_draws', '0', 'an integer, 1'),
    ('num_attack_examples', '7', 'an object such as {"cw": 200}'),
    ('num_attack_examples', '{"cw": 0}', '1 or more'),
    ('dataset', '"mnist"', 'one of cifar10, synthetic'),
    ('precision', '"float16"', 'one of float32, mixed_bfloat16'),
    ('xla', 'true', 'one of auto, on, off'),
    ('classes', '"cat"', 'two or more different label names'),
    ('classes', '[]', 'two or more different label names'),
    ('classes', '["cat"]', 'two or more different label names'),
    ('classes', '["cat", "cat"]', 'two or more different label names'),
    ('classes', '[0, 1]', 'two or more different label names'),
    ('classes', '{"cat": "dog"}', 'two or more different label names'),
    ('step_size_schedule', '0.1', '[[0, 0.1], [40000, 0.01]]'),
    ('step_size_schedule', '[]', 'the first step 0'),
    ('step_size_schedule', '[[0]]', '[[0, 0.1], [40000, 0.01]]'),
    ('step_size_schedule', '[[1, 0.1]]', 'the first step 0'),
    ('step_size_schedule', '[[0.0, 0.1]]', 'the first step 0'),
    ('step_size_schedule', '[[0, 0.1], [0, 0.01]]', 'steps growing'),
    ('step_size_schedule', '[[0, 0]]', 'rates above 0'),
    ('step_size_schedule', '[[0, NaN]]', 'rates above 0'),
    ('step_size_schedule', '[[0, true]]', 'rates above 0'),
])
def test_wrong_value_is_refused_by_key_value_and_what_was_expected(tmp_path, key, text, expected):
    message = refusal(write(tmp_path, f'{{"{key}": {text}}}'))
    assert message.startswith(f'{key} must be ') and message.endswith(f', got {text}')
    assert expected in message


@pytest.mark.parametrize('value', [
    str(10 ** 400),  # no float holds it
    '9' * 5000,  # more digits than Python reads
    '[' * 300 + ']' * 300,
    '[' * 100000 + ']' * 100000,  # deeper than Python reads
    json.dumps('long ' * 100000),
])
@pytest.mark.parametrize('key', ['weight_decay', 'epsilon', 'num_steps', 'step_size_schedule'])
def test_monstrous_values_are_refused_in_a_line_of_reasonable_length(tmp_path, key, value):
    path = write(tmp_path, f'{{"{key}": {value}}}')
    for message in (refusal(path), refusal(settings=[f'{key}={value[:100000]}'])):
        assert len(message) < 1000
    assert key in message


@pytest.mark.parametrize('key, near', [
    ('epsilonn', 'did you mean epsilon?'), ('numsteps', 'did you mean num_steps?'),
    ('traning_mode', 'did you mean training_mode?'),
    ('xyz', 'docs/configuration.md lists the keys, from model_dir on')])
def test_unknown_key_is_named_with_the_nearest_one(tmp_path, key, near):
    for message in (refusal(write(tmp_path, f'{{"{key}": 64}}')), refusal(settings=[f'{key}=64'])):
        assert message == f"unknown key '{key}'; {near}"


def test_unknown_key_of_several_lines_is_told_in_one(tmp_path):
    assert 'unknown key' in refusal(write(tmp_path, r'{"two\nlines": 1}'))
    assert 'two' in refusal(settings=['two\nlines'])


def test_key_given_twice_is_refused_but_comments_may_repeat(tmp_path):
    path = write(tmp_path, '{"epsilon": 8, "_comment": "a", "num_steps": 7, "epsilon": 4}')
    message = refusal(path)
    assert path in message and "'epsilon' is given twice" in message
    path = write(tmp_path, '{"_comment": "a", "num_steps": 7, "_comment": "b"}')
    assert load_config(path)['num_steps'] == 7


@pytest.mark.parametrize('key', SCHEMA)
def test_key_missing_in_config_json_is_named_with_what_was_expected(tmp_path, key):
    base = {k: v for k, v in load_config().items() if k != key}
    message = refusal(base=write(tmp_path, json.dumps(base)))
    assert message.startswith(f'{key} is missing; expected ')
    assert message.endswith(SCHEMA[key].expected)


@pytest.mark.parametrize('text, said', [
    ('', 'is not JSON'),
    ('{"epsilon": 8', 'is not JSON'),
    ('epsilon = 8', 'is not JSON'),
    ("{'epsilon': 8}", 'is not JSON'),
    ('{"epsilon": 8,}', 'is not JSON'),
    ('{} {}', 'is not JSON'),
    ('\ufeff{}', 'is not JSON'),
    ('[["epsilon", 8]]', 'expected an object of keys'),
    ('8', 'expected an object of keys'),
    ('null', 'expected an object of keys'),
    ('"epsilon"', 'expected an object of keys'),
    ('[' * 100000, 'cannot be read'),
])
def test_file_that_is_no_json_object_is_named(tmp_path, text, said):
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f'{path} ') and said in message


def test_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    path = os.path.join(tmp_path, 'missing.json')
    assert refusal(path) == f'{path} cannot be read: No such file or directory'
    assert refusal(str(tmp_path)) == f'{tmp_path} cannot be read: Is a directory'
    latin = os.path.join(tmp_path, 'latin.json')
    with open(latin, 'wb') as f:
        f.write(b'{"model_dir": "caf\xe9"}')
    assert latin in refusal(latin)


@pytest.mark.parametrize('size_key, ratio_key, size, ratio', [
    ('training_batch_size', 'shaping_ratio', 63, 3),
    ('training_batch_size', 'shaping_ratio', 2, 3),
    ('training_batch_size', 'shaping_ratio', 64, 9),
    ('shaping_batch_size', 'inference_shaping_ratio', 101, 9),
    ('shaping_batch_size', 'inference_shaping_ratio', 9, 9),
])
def test_batch_that_does_not_fit_its_ratio_is_told_sizes_that_do(size_key, ratio_key, size, ratio):
    message = refusal(settings=[f'{size_key}={size}', f'{ratio_key}={ratio}'])
    assert message.startswith(f'{size_key} is {size} and {ratio_key} {ratio}: ')
    named = re.search(r'such as (\d+) or (\d+)', message).groups()
    for fitting in named:
        config = load_config(settings=[f'{size_key}={fitting}', f'{ratio_key}={ratio}'])
        assert config[size_key] == int(fitting)


def test_training_that_shapes_nothing_takes_any_batch_size():
    for mode in ('natural', 'adv_only'):
        config = load_config(settings=[f'training_mode={mode}', 'training_batch_size=63'])
        assert config['training_batch_size'] == 63


@pytest.mark.parametrize('adversary, beta, fits', [
    ('pgd', 6, False), ('pgd', 0, True), ('trades', 6, True), ('trades', 0, True)])
def test_trades_beta_that_would_be_ignored_is_refused(adversary, beta, fits):
    settings = [f'adversary={adversary}', f'trades_beta={beta}']
    if fits:
        assert load_config(settings=settings)['trades_beta'] == beta
    else:
        assert refusal(settings=settings).startswith('trades_beta is 6 and adversary pgd, ')


def test_trades_without_any_attacked_image_is_refused():
    settings = ['adversary=trades', 'trades_xent=natural']
    assert load_config(settings=[*settings, 'trades_beta=6'])['trades_xent'] == 'natural'
    assert refusal(settings=settings).startswith('trades_xent is natural and trades_beta 0: no ')


@pytest.mark.parametrize('size, ratio, eval_size, fits', [
    (100, 0, 99, False), (100, 0, 100, True), (1000, 9, 99, False), (1000, 9, 100, True)])
def test_a_shaped_batch_that_no_evaluation_batch_fills_is_refused(size, ratio, eval_size, fits):
    settings = [f'shaping_batch_size={size}', f'inference_shaping_ratio={ratio}',
                f'eval_batch_size={eval_size}']
    if fits:
        assert load_config(settings=settings)['eval_batch_size'] == eval_size
    else:
        assert '100 test samples in a batch; expected at most eval_batch_size, 99' in refusal(
            settings=settings)


@pytest.mark.parametrize('epsilon, meant', [
    (0, None), (1, None), (8, None), (0.031, '8'), (0.03137254, '8'), (0.3, '76'), (0.5, '128'),
    (0.002, '0.51')])
def test_an_epsilon_of_the_other_scale_is_told_with_the_pixels_meant(epsilon, meant):
    doubt = epsilon_doubt(float(epsilon))
    assert (doubt is None) == (meant is None)
    if meant:
        assert doubt.startswith(f'epsilon is {epsilon:g}, in pixels of [0, 255]: ')
        assert doubt.endswith(f', set epsilon={meant}') and '\n' not in doubt


# ---- overrides


@pytest.mark.parametrize('setting, value', [
    ('num_steps=7', 7),
    ('epsilon=4', 4.0),
    ('weight_decay=5e-4', 5e-4),
    ('momentum=0', 0.0),
    ('random_start=false', False),
    ('classes=null', None),
    ('classes=["cat", "dog"]', ['cat', 'dog']),
    ('step_size_schedule=[[0, 1], [10, 0.5]]', [[0, 1.0], [10, 0.5]]),
    ('training_mode=natural', 'natural'),
    ('xla=on', 'on'),
    ('num_attack_examples={"cw": 7}', {'cw': 7}),
    ('model_dir=models/mine', 'models/mine'),
    ('model_dir="models/mine"', 'models/mine'),
    ('model_dir=with spaces ', 'with spaces '),
    ('model_dir=run=2', 'run=2'),
    ('model_dir=2024', '2024'),
    ('model_dir=1e3', '1e3'),
    ('model_dir=null', 'null'),
    ('model_dir=[1]', '[1]'),
    ('data_path=NaN', 'NaN'),
])
def test_set_takes_json_and_text_where_the_key_wants_text(setting, value):
    key = setting.partition('=')[0]
    result = load_config(settings=[setting])
    assert result[key] == value and type(result[key]) is type(value)
    assert {k: v for k, v in result.items() if k != key} == {
        k: v for k, v in load_config().items() if k != key}


def test_text_for_a_key_that_wants_a_number_is_refused_by_name():
    assert refusal(settings=['num_steps=ten']).startswith('num_steps must be an integer')
    assert refusal(settings=['num_steps=']).endswith(', got ""')
    assert refusal(settings=['model_dir=']) == 'model_dir must be the path of a folder, got ""'


def test_set_without_an_equals_sign_is_told_the_form():
    message = refusal(settings=['epsilon'])
    assert 'epsilon' in message and 'expected key=value' in message


def test_set_overrides_the_file_which_overrides_config_json(tmp_path):
    path = write(tmp_path, '{"epsilon": 4, "num_steps": 7}')
    config = load_config(path, ['epsilon=2', 'loss_func=xent', 'loss_func=cw'])
    assert config['epsilon'] == 2.0  # --set
    assert config['num_steps'] == 7  # the file
    assert config['step_size'] == 2.0  # config.json
    assert config['loss_func'] == 'cw'  # of two settings, the later


def test_numbers_come_out_as_floats_however_they_are_written(tmp_path):
    """TensorFlow and Keras take 0.1 for a learning rate, but not 1."""
    path = write(tmp_path, '{"epsilon": 8, "step_size": 2, "weight_decay": 0, "momentum": 1, '
                 '"fgsm_epsilon": 16, "step_size_schedule": [[0, 1]]}')
    config = load_config(path)
    for key in ('epsilon', 'step_size', 'weight_decay', 'momentum', 'fgsm_epsilon'):
        assert type(config[key]) is float
    assert [[type(x) for x in pair] for pair in config['step_size_schedule']] == [[int, float]]


def test_stored_configuration_is_read_back_as_it_was(tmp_path):
    config = load_config(settings=['model_dir=models/café "x"', 'classes=["cat", "dog"]',
                                   'step_size_schedule=[[0, 0.3], [7, 1e-9]]', 'epsilon=0.1'])
    path = os.path.join(tmp_path, 'config.json')
    store_config(load_config(), path)
    store_config(config, path)  # replaces the first
    assert load_config(path) == config
    assert load_config(base=path) == config  # it is complete
    assert os.listdir(tmp_path) == ['config.json']
    with open(path, encoding='utf-8') as f:
        assert len(f.read().splitlines()) == len(SCHEMA) + 2  # a key a line, for diff


def test_attacks_that_do_not_exist_are_named():
    check_names(load_config(settings=['num_attack_examples={"pgd": 7}']))
    with pytest.raises(UserError, match="'pgdd'; expected attacks: clean, fgsm, pgd, cw"):
        check_names(load_config(settings=['num_attack_examples={"pgdd": 7}']))


# ---- what a key is part of


def test_what_may_change_when_a_training_is_resumed():
    assert {key for key in SCHEMA if may_change(key)} == {
        'model_dir', 'data_path', 'max_num_training_steps', 'num_output_steps',
        'num_summary_steps', 'num_checkpoint_steps', 'num_eval_examples', 'eval_batch_size',
        'eval_on_cpu', 'store_adv_path', 'inference_shaping_ratio', 'shaping_batch_size', 'xla',
        'fgsm_epsilon', 'apgd_num_steps', 'num_restarts', 'eot_draws', 'square_queries',
        'num_attack_examples', 'transfer_from',
        'num_recordings', 'recorded_samples'}


def test_what_an_attacks_accuracy_depends_on():
    config = load_config()
    nothing = {'model_dir', 'data_path', 'num_output_steps', 'num_summary_steps',
               'num_checkpoint_steps', 'eval_on_cpu', 'store_adv_path', 'xla', 'distribution',
               'batch_norms', 'num_attack_examples', 'transfer_from'}
    younger = {'attack_norms': 'fixed', 'num_recordings': 7, 'recorded_samples': 7,
               'num_validation_examples': 7, 'trades_xent': 'natural'}
    of_some = {'fgsm_epsilon', 'apgd_num_steps', 'num_restarts', 'eot_draws', 'square_queries'}
    for attack, own in ((None, set()), ('pgd', set()), ('fgsm', {'fgsm_epsilon'}),
                        ('apgd', {'apgd_num_steps', 'num_restarts'}),
                        ('transfer', {'apgd_num_steps', 'num_restarts'}),
                        ('retry', {'apgd_num_steps', 'num_restarts'}),
                        ('square', {'square_queries'}),
                        ('apgd_eot', {'apgd_num_steps', 'eot_draws'})):
        old = set(SCHEMA) - nothing - of_some - set(younger) | own
        assert set(relevant(config, attack)) == old  # numbers stored before these keys are known
        assert set(relevant({**config, **younger}, attack)) == old | set(younger)


def test_every_key_is_part_of_something_known():
    assert {key.part for key in SCHEMA.values()} == set(PARTS)
    assert {name for key in SCHEMA.values() for name in key.attacks} <= set(ATTACKS)
    assert all(bool(key.attacks) == (key.part == 'attack') for key in SCHEMA.values())


# ---- anything at all

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
    | st.sampled_from([10 ** 400, 0, 1, 64, 0.5, 'xent', 'natural', [[0, 0.1]], ['cat', 'dog']]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)
KEYS = st.sampled_from(list(SCHEMA)) | st.text(st.characters(), max_size=10)


def accepted_or_refused_in_one_line(*args, **kwargs):
    try:
        config = load_config(*args, **kwargs)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert list(config) == list(SCHEMA)
        json.dumps(config, allow_nan=False)


@fuzz(300, values=st.dictionaries(KEYS, JSON_VALUES, max_size=4))
def test_a_file_of_any_json_is_accepted_or_refused_in_one_line(tmp_path_factory, values):
    path = write(tmp_path_factory.getbasetemp(), json.dumps(values), 'any.json')
    accepted_or_refused_in_one_line(path)


@fuzz(300, key=KEYS, value=JSON_VALUES.map(json.dumps) | st.text(st.characters()))
def test_any_setting_is_accepted_or_refused_in_one_line(key, value):
    accepted_or_refused_in_one_line(settings=[f'{key}={value}'])


@fuzz(100, key=st.sampled_from(sorted(SCHEMA)), value=JSON_VALUES.filter(lambda v: v == v))
def test_a_setting_means_what_the_same_json_in_a_file_means(key, value):
    """...unless the key wants text, and the JSON is not the text it wants."""
    parsed = parse_setting(f'{key}={json.dumps(value)}')
    assert parsed[0] == key
    assert repr(parsed[1]) in (repr(value), repr(json.dumps(value)))
    if SCHEMA[key].check(value):
        assert parsed[1] == value


# ---- the programs

COMMANDS = {
    'missing file': ['--config', 'missing.json'],
    'unknown key': ['--set', 'nonsense=1'],
    'stray word': ['extra'],
    'other scale': ['--set', 'epsilon=0.031', '--set', 'data_path=nowhere'],
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Exit status and standard error of train.py under each of COMMANDS, run side by side."""
    folder = tmp_path_factory.mktemp('elsewhere')
    processes = {name: subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *options],
                                        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)
                 for name, options in COMMANDS.items()}
    try:
        return {name: (*process.communicate(timeout=300), process.returncode)
                for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


@pytest.mark.parametrize('name, said', [
    ('missing file', 'missing.json cannot be read: No such file or directory'),
    ('unknown key', "unknown key 'nonsense'; docs/configuration.md lists the keys"),
    ('stray word', "'extra' is not an option; train.py --help lists them"),
])
def test_train_ends_with_one_line_on_a_mistake(runs, name, said):
    stdout, stderr, status = runs[name]
    assert status == 2
    assert 'Traceback' not in stdout + stderr
    *others, last = stderr.splitlines()
    assert last.startswith(f'train.py: {said}')
    assert not any(line.startswith('train.py:') for line in others)
    assert stdout == ''


def test_an_epsilon_of_the_other_scale_is_told_once(runs):
    _, stderr, _ = runs['other scale']
    told = [line for line in stderr.splitlines() if 'epsilon' in line]
    assert told == ['train.py: warning: epsilon is 0.031, in pixels of [0, 255]: less than one '
                    'pixel; if 0.031 of [0, 1] is meant, set epsilon=8']

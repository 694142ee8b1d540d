"""What export.py writes answers as eval.py does, alone, and survives any request; classify.py."""
import glob
import io
import json
import os
import shutil
import subprocess
import sys

from PIL import Image
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import classify
from eval import wilson_interval
import export
from cifar10_input import load_data
from config import load_config, store_config
from conftest import ROOT, fuzz
from hypothesis import strategies as st
from model import build_model, find_checkpoint
from running import UserError
from running.untrusted import read_json
from shaping import Inference, make_inference
from test_programs import SETTINGS, program, trained  # noqa: F401

RECORDINGS = ['num_recordings=7', 'recorded_samples=20']


@pytest.fixture(scope='module')
def exported(trained):  # noqa: F811
    """(folder of the export, configuration of the training)"""
    folder, _ = trained
    settings = [*RECORDINGS, 'num_eval_examples=100', 'apgd_num_steps=3', 'num_restarts=1',
                f'model_dir={folder}']
    status, _, stderr = program('eval.py', '--model_dir', folder, '--inference', 'bn_recorded',
                                '--attack', 'clean,pgd,adaptive', settings=settings)
    assert status == 0, stderr
    status, stdout, stderr = program('export.py', '--model_dir', folder, settings=settings)
    assert (status, stderr) == (0, []) and f'written to {folder}/exported' in stdout
    return f'{folder}/exported', load_config(f'{folder}/config.json', settings)


@pytest.fixture(scope='module')
def loaded(exported):
    return tf.saved_model.load(exported[0])


@pytest.fixture(scope='module')
def inference(exported):
    """(the inference bn_recorded that was exported, the data)"""
    config = exported[1]
    data = load_data(config)
    model = build_model(config, data.num_classes)
    model.load_madry_checkpoint(find_checkpoint(config))
    return make_inference(model, 'bn_recorded', data, config), data


def elsewhere(code, folder, cwd):
    """Runs Python without the project on its path and without Keras; returns what it prints."""
    head = ('import sys; sys.modules["keras"] = None; import os; '
            'os.environ["CUDA_VISIBLE_DEVICES"] = "-1"; os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"; '
            f'import numpy as np, tensorflow as tf; model = tf.saved_model.load({folder!r}); ')
    done = subprocess.run([sys.executable, '-c', head + code], cwd=cwd, text=True, timeout=300,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': ''})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_another_process_the_same_recordings_give_the_same_logits(exported, inference, tmp_path):
    infer, data = inference
    images = data.eval_data.xs[:100]
    drawn = infer.known(3)(0, 100)
    np.savez(tmp_path / 'request.npz', images=images, drawn=drawn)
    code = ('z = np.load("request.npz"); '
            'a = model(z["images"], recording=z["drawn"]); '
            'one = [model(z["images"][i:i + 1], recording=z["drawn"][i:i + 1])["logits"][0] '
            'for i in range(0, 100, 9)]; '
            'np.savez("answer.npz", one=one, **{k: v.numpy() for k, v in a.items()})')
    elsewhere(code, exported[0], tmp_path)
    with np.load(tmp_path / 'answer.npz') as answer:
        expected = infer(images, 3).numpy()
        np.testing.assert_allclose(answer['logits'], expected, atol=1e-4)
        np.testing.assert_allclose(answer['one'], answer['logits'][::9], atol=1e-4)
        np.testing.assert_allclose(answer['probabilities'], tf.nn.softmax(expected), atol=1e-4)
        assert (answer['recording'] == drawn).all()
        assert (answer['votes'].argmax(1) == answer['label']).all()
        assert np.mean(answer['label'] == expected.argmax(1)) > 0.98  # ties by rounding


def test_two_processes_draw_differently(exported, tmp_path):
    """Also where Keras's seed was set when the model was exported, as train.py sets it."""
    code = 'print(model(np.zeros([50, 32, 32, 3], np.uint8))["recording"].numpy().tolist())'
    draws = [elsewhere(code, exported[0], tmp_path) for _ in range(2)]
    assert draws[0] != draws[1] and set(json.loads(draws[0])) <= set(range(7))


def test_no_seed_that_is_set_at_the_export_is_stored(inference, tmp_path):
    tf.keras.utils.set_random_seed(5)
    infer, data = inference
    export.save(infer, data.num_classes, str(tmp_path))
    images = data.eval_data.xs[:30]
    draws = []
    for _ in range(2):
        tf.keras.utils.set_random_seed(5)
        draws.append(tf.saved_model.load(str(tmp_path))(images)['recording'].numpy().tolist())
    assert draws[0] != draws[1]


def test_votes_are_those_of_several_recordings(loaded, inference):
    infer, data = inference
    images = tf.constant(data.eval_data.xs[:20])
    answer = loaded(images, num_votes=5)
    first = answer['recording'].numpy()
    singles = [infer.logits(tf.cast(images, tf.float32), (first + vote) % 7).numpy()
               for vote in range(5)]
    votes = np.array([[sum(z[i].argmax() == k for z in singles) for k in range(10)]
                      for i in range(20)])
    assert (answer['votes'].numpy() == votes).mean() > 0.99
    np.testing.assert_allclose(answer['logits'], np.mean(singles, 0), atol=1e-4)


def test_the_signatures_take_float_or_uint8_and_what_the_object_takes(loaded, inference):
    images = inference[1].eval_data.xs[:6]
    signatures = loaded.signatures
    drawn = tf.constant([0, 1, 2, 3, 4, 5])
    full = signatures['serving_votes'](images=tf.constant(images, tf.float32),
                                       num_votes=tf.constant(2), recording=drawn)
    expected = loaded(images, num_votes=2, recording=drawn)
    for key in ('logits', 'probabilities', 'votes', 'label', 'recording'):
        np.testing.assert_allclose(full[key], expected[key], atol=1e-5)
    for name, dtype in (('serving_default', tf.float32), ('serving_uint8', tf.uint8)):
        answer = signatures[name](images=tf.constant(images, dtype))
        assert answer['logits'].shape == (6, 10) and (answer['votes'].numpy().sum(1) == 1).all()


def test_no_training_image_is_stored(exported, inference):
    """A batch of 90 images would be 276,480 bytes; recordings and weights are all there is."""
    folder, _ = exported
    size = sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder)
               for name in names)
    weights = 4 * sum(
        int(np.prod(v.shape)) for v in inference[0].model.variables)
    recordings = sum(v.numpy().nbytes for pair in inference[0].recordings.values() for v in pair)
    assert size < weights + recordings + 900_000
    data = open(f'{folder}/variables/variables.data-00000-of-00001', 'rb').read()
    graph = open(f'{folder}/saved_model.pb', 'rb').read()
    for image in inference[1].train_data.xs[:2000:10]:
        assert image.tobytes()[:64] not in graph + data


VALUES = st.sampled_from([0., 255., 300., -1., float('nan'), float('inf'), -float('inf'), 1e38])
SHAPES = st.one_of(st.tuples(st.integers(0, 4), st.just(32), st.just(32), st.just(3)),
                   st.lists(st.sampled_from([0, 1, 3, 31, 32, 33]), min_size=0, max_size=5))
TYPES = st.sampled_from(['float32', 'uint8', 'int32', 'float64', 'bool', 'int64', 'float16'])


@fuzz(250, shape=SHAPES, dtype=TYPES, value=VALUES, votes=st.integers(-2, 9),
      drawn=st.lists(st.integers(-1, 8), max_size=4))
def test_a_malformed_request_gets_an_error_or_a_class(loaded, shape, dtype, value, votes, drawn):
    with np.errstate(all='ignore'):
        images = np.full(shape, value).astype(dtype)
    right = (len(shape) == 4 and tuple(shape[1:]) == (32, 32, 3) and dtype in ('float32', 'uint8')
             and bool(np.isfinite(images).all() and (images >= 0).all() and (images <= 255).all())
             and 1 <= votes <= 7 and (not drawn or len(drawn) == shape[0])
             and all(0 <= number < 7 for number in drawn))
    try:
        answer = loaded(images, num_votes=votes, recording=np.array(drawn, np.int32))
    except (ValueError, TypeError, tf.errors.InvalidArgumentError):
        assert not right
        return
    assert right and answer['label'].shape == (shape[0],)
    assert np.isfinite(answer['probabilities']).all()


def test_a_server_may_leave_out_what_has_a_default(exported):
    model = saved_model_pb2.SavedModel()
    with open(f'{exported[0]}/saved_model.pb', 'rb') as f:
        model.ParseFromString(f.read())
    defaults = model.meta_graphs[0].signature_def['serving_votes'].defaults
    assert set(defaults) == {'num_votes', 'recording'}


def test_population_norms_are_exported_and_classified_with(exported, inference, pictures, tmp_path):
    """The same logits as `pn` has; nothing is drawn, nothing agrees or not."""
    folder, config = str(tmp_path / 'e'), exported[1]
    assert program('export.py', '--model_dir', config['model_dir'], '--inference', 'pn',
                   '--output', folder)[0] == 0
    images = inference[1].eval_data.xs[:9]
    answer = tf.saved_model.load(folder)(images)
    np.testing.assert_allclose(answer['logits'], inference[0].model(
        images.astype(np.float32), training=False), atol=1e-4)
    assert read_json(f'{folder}/card.json')['inference'] == {'mode': 'pn'}
    said = [program('classify.py', '--model', model, *more, 'a.png', cwd=pictures) for model, more
            in ((folder, []), (config['model_dir'], ['--inference', 'pn']))]
    assert said[0] == said[1] and 'recordings' not in said[0][1] and said[0][0] == 0
    status, _, stderr = program('classify.py', '--model', folder, '--inference', 'bn_recorded',
                                'a.png', cwd=pictures)
    assert status == 2 and 'was exported with pn' in stderr[0]
    status, _, stderr = program('export.py', '--model_dir', config['model_dir'], '--inference',
                                'pn', '--format', 'weights', '--output', str(tmp_path / 'w'))
    assert status == 2 and 'is for every inference' in stderr[0]


@pytest.mark.slow
def test_ten_thousand_images_are_one_request(loaded):
    assert loaded(np.zeros([10000, 32, 32, 3], np.uint8))['label'].shape == (10000,)


def test_the_card_says_what_was_measured_and_where_it_comes_from(exported):
    folder, config = exported
    card = read_json(f'{folder}/card.json')
    rows = {(r['attack'], r['inference']): r for r in read_json(
        f'{config["model_dir"]}/eval/results.json')['results']}
    assert card['step'] == 7 and card['checkpoint_digest'] == rows['clean', 'bn_recorded'][
        'checkpoint_digest']
    assert card['clean_accuracy']['accuracy'] == rows['clean', 'bn_recorded']['accuracy']
    worst = card['robust_accuracy']
    assert worst['attack'] == 'worst in ball' and worst['interval'] == rows[
        'worst in ball', 'bn_recorded']['interval']
    assert set(worst['attacks']) == {'clean', 'pgd', 'adaptive'}
    of_pgd, = (row for row in card['results'] if row['attack'] == 'pgd')
    assert of_pgd['unreliable'] and 'transferred' in of_pgd['flags']
    assert card['training']['num_steps'] == 2 and len(card['classes']) == 10
    assert card['inference']['num_recordings'] == 7 and card['threat_model']['epsilon'] == 8


def test_a_card_without_evaluation_and_training_has_no_numbers_and_no_configuration(
        exported, tmp_path):
    """The same weights with other recordings are another classifier, of unknown training here."""
    os.makedirs(tmp_path / 'w')
    for path in glob.glob(f'{exported[1]["model_dir"]}/checkpoint-7.*'):
        shutil.copy(path, tmp_path / 'w')
    checkpoint = str(tmp_path / 'w' / 'checkpoint-7')
    status, _, stderr = program(
        'export.py', '--checkpoint', checkpoint, '--output', str(tmp_path / 'e'), settings=[
            'num_recordings=2', 'recorded_samples=20', 'dataset=synthetic',
            'num_residual_units=1', 'width_factor=1'])
    assert status == 0, stderr
    card = read_json(tmp_path / 'e' / 'card.json')
    assert card['robust_accuracy'] is card['clean_accuracy'] is None and card['results'] == []
    assert card['training'] is None
    with pytest.raises(UserError, match=f'no config.json lies beside {checkpoint}'):
        export.check_same_training(exported[1], None, checkpoint)


def test_weak_or_transferred_attacks_alone_are_no_robust_accuracy_on_a_card():
    """Of strong ones the strongest counts, on how many images it was; a few unlucky ones do not."""
    def row(attack, accuracy, n, epsilon=8., **more):
        return {'attack': attack, 'accuracy': accuracy, 'num_examples': n, 'epsilon': epsilon,
                'interval': [*wilson_interval(accuracy * n, n)], **more}
    rows = [row('clean', 0.9, 100, None), row('pgd', 0.5, 100, norms='pn'),
            row('worst in ball', 0.5, 100, attacks=['clean', 'pgd']),
            row('transfer', 0.4, 100, norms='bn_recorded'), row('hopskipjump', 0., 100, None)]
    config = {'epsilon': 8.}
    assert not any(export.is_robust(each, config) for each in rows)
    rows += [row('adaptive_weak', 0.1, 10000), row('square', 0.1, 100),
             row('worst in ball', 0.2, 100, attacks=['clean', 'pgd', 'hopskipjump'])]
    assert not any(export.is_robust(each, config) for each in rows)
    rows += [row('apgd_eot', 0.4, 10000), row('adaptive', 0.3, 1000), row('adaptive', 0.2, 10),
             row('worst in ball', 0.3, 1000, attacks=['clean', 'pgd', 'adaptive']),
             row('apgd_eot', 0.1, 1000, unreliable=True)]
    robust = sorted((each for each in rows if export.is_robust(each, config)),
                    key=export.worst_first)
    assert [each['accuracy'] for each in robust] == [0.3, 0.3, 0.4, 0.2]
    assert robust[0]['attack'] == 'worst in ball'


def test_weights_are_not_written_beside_another_trainings_configuration(exported, tmp_path):
    folder = exported[1]['model_dir']
    status, _, stderr = program('export.py', '--checkpoint', f'{folder}/checkpoint-7', '--format',
                                'weights', '--output', str(tmp_path / 'e'), settings=[
                                    'dataset=synthetic', 'num_residual_units=1', 'width_factor=1'])
    assert status == 2 and f'expected --model_dir {folder}' in stderr[0]
    assert os.listdir(tmp_path) == []


def test_a_card_shows_what_its_own_arithmetic_was_judged_at(exported):
    """Whichever folder eval.py wrote to; and how the model was trained, not how it is exported."""
    folder, config = exported
    card = read_json(f'{folder}/card.json')
    origin = {key: card[key] for key in ('checkpoint', 'step', 'checkpoint_digest', 'data')}
    assert len(export.results_of(config, origin, 'bn_recorded')) == len(card['results']) > 0
    elsewhere = {**origin, 'checkpoint': '/elsewhere/checkpoint-7'}
    assert export.results_of(config, elsewhere, 'bn_recorded') == card['results']
    assert export.results_of({**config, 'precision': 'mixed_bfloat16'}, origin,
                             'bn_recorded') == []
    assert export.results_of(config, origin, 'pn') == []


def test_a_folder_that_holds_something_else_is_left_alone(exported, tmp_path, monkeypatch):
    (tmp_path / 'thesis.tex').write_text('years of work')
    status, stdout, stderr = program('export.py', '--model_dir', exported[1]['model_dir'],
                                     '--output', str(tmp_path))
    assert (status, stdout) == (2, '') and 'holds something else' in stderr[0]
    assert os.listdir(tmp_path) == ['thesis.tex']
    (tmp_path / 'e.tmp').mkdir()  # what is used on the way is looked at, too
    (tmp_path / 'e.tmp' / 'thesis.tex').write_text('the draft')
    with pytest.raises(UserError, match='e.tmp holds something else'):
        export.check_output(str(tmp_path / 'e'), 'checkpoint-7')
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    with pytest.raises(UserError, match='here holds something else'):
        export.check_output(str(tmp_path / 'here'), 'checkpoint-7')


def test_onnx_runtime_gives_the_same_logits(inference, tmp_path):
    pytest.importorskip('tf2onnx')
    runtime = pytest.importorskip('onnxruntime')
    infer, data = inference
    export.save_onnx(infer, str(tmp_path / 'model.onnx'))
    images, drawn = data.eval_data.xs[:50].astype(np.float32), infer.known(1)(0, 50)
    session = runtime.InferenceSession(str(tmp_path / 'model.onnx'))
    names = [output.name for output in session.get_outputs()]
    answer = dict(zip(names, session.run(None, {'images': images, 'recording': drawn})))
    np.testing.assert_allclose(answer['logits'], infer(images, 1), atol=1e-4)
    by_pn = Inference(infer.model, 'pn')
    export.save_onnx(by_pn, str(tmp_path / 'pn.onnx'))
    session = runtime.InferenceSession(str(tmp_path / 'pn.onnx'))
    logits, = session.run(['logits'], {'images': images})
    np.testing.assert_allclose(logits, by_pn(images, 0), atol=1e-4)


def test_onnx_without_its_converter_is_one_line(exported):
    try:
        import tf2onnx  # noqa: F401
    except ImportError:
        status, _, stderr = program('export.py', '--model_dir', exported[1]['model_dir'],
                                    '--format', 'onnx')
        assert (status, stderr) == (2, [
            'export.py: --format onnx needs tf2onnx: pip install tf2onnx'])


# ---- weights


@pytest.fixture(scope='module')
def released(exported, tmp_path_factory):
    """The folder that --format weights makes."""
    folder = str(tmp_path_factory.mktemp('released') / 'w')
    for _ in range(2):  # the second time in place of the first
        status, _, stderr = program('export.py', '--model_dir', exported[1]['model_dir'],
                                    '--format', 'weights', '--output', f'{folder}/',
                                    settings=RECORDINGS)
        assert (status, stderr) == (0, [])
    return folder


def test_released_weights_hold_no_velocities_and_evaluate(released, exported):
    step, = (name[11:-6] for name in os.listdir(released) if name.endswith('.index'))
    prefix = os.path.join(released, f'checkpoint-{step}')
    reader = tf.train.load_checkpoint(prefix)
    trained_here = tf.train.load_checkpoint(find_checkpoint(exported[1]))
    names = reader.get_variable_to_shape_map()
    assert names and not any('Momentum' in name for name in names)
    assert all((reader.get_tensor(name) == trained_here.get_tensor(name)).all() for name in names)
    assert tf.train.latest_checkpoint(released) == prefix
    config = load_config(f'{released}/config.json')
    assert config['model_dir'] == released and config['data_path'] == load_config()['data_path']
    with open(f'{released}/card.json') as f:
        assert json.load(f)['format'] == 'weights'


def test_classify_needs_no_images_beside_released_weights(released, inference, monkeypatch):
    monkeypatch.setattr(export, 'load_data', lambda *_: pytest.fail('loads the images'))
    answer, num_recordings, names = classify.load_trained(load_config(f'{released}/config.json'))
    infer, data = inference
    assert (num_recordings, names) == (7, list(data.label_names))
    images, drawn = data.eval_data.xs[:7].astype(np.float32), np.arange(7, dtype=np.int32)
    np.testing.assert_allclose(answer(images, recording=tf.constant(drawn))['logits'],
                               infer.logits(images, drawn), atol=1e-4)


@pytest.mark.parametrize('spoil, said', [
    (lambda table: table[:, 1:], r'holds an array \[7, \d+\] of float32; expected float32 \[7, '),
    (lambda table: table.astype(float), 'of float64; expected float32'),
    (lambda table: table[:6], 'num_recordings is 7, and .*r.npy holds 6; expected no other number'),
    (lambda table: -table, 'holds no statistics; expected finite means, variances from 0'),
    (lambda table: table * np.inf, 'holds no statistics')])
def test_recordings_of_another_network_or_damaged_ones_are_one_line(
        released, inference, spoil, said, tmp_path):
    path, = (os.path.join(released, name) for name in os.listdir(released)
             if name.endswith('.recordings.npy'))
    np.save(tmp_path / 'r.npy', spoil(np.load(path)))
    with pytest.raises(UserError, match=said):
        export.read_recordings(inference[0].model, str(tmp_path / 'r.npy'), 7)


def test_released_weights_are_exported_without_images_and_with_their_cards_numbers(
        released, inference, monkeypatch, tmp_path):
    """The recordings are those beside them, not new ones."""
    monkeypatch.setattr(export, 'load_data', lambda *_: pytest.fail('loads the images'))
    config = load_config(f'{released}/config.json')
    checkpoint = find_checkpoint(config)
    served = export.load_served(config, checkpoint, 'bn_recorded')
    export.save(served.inference, len(served.names), str(tmp_path))
    infer, data = inference
    images, drawn = data.eval_data.xs[:7], np.arange(7, dtype=np.int32)
    np.testing.assert_allclose(
        tf.saved_model.load(str(tmp_path))(images, recording=drawn)['logits'],
        infer.logits(images.astype(np.float32), drawn), atol=1e-4)
    origin = {'checkpoint': checkpoint, 'step': 7, 'checkpoint_digest': '', 'data': None}
    card = export.make_card(config, config, served, origin, 'savedmodel')
    assert card['robust_accuracy'] == served.card['robust_accuracy'] is not None
    assert served.card['results_from'] == 'eval.py' != card['results_from']
    by_pn = export.make_card(config, config, export.load_served(config, checkpoint, 'pn'), origin,
                             'onnx')
    assert by_pn['results'] == [] and by_pn['inference'] == {'mode': 'pn'}
    assert list(by_pn['input']) == ['images', 'checks']


def test_numbers_of_another_inference_or_precision_are_not_passed_off_as_ones_own():
    folder = f'{ROOT}/weights/cifar10_w32_1/pgd_shaping_in_attack_and_training_3to1'
    of_training, checkpoint = load_config(f'{folder}/config.json'), f'{folder}/checkpoint-20000'
    origin = {'checkpoint': checkpoint, 'step': 20000, 'checkpoint_digest': '', 'data': None}
    def card(**settings):
        config = {**of_training, 'model_dir': folder, **settings}
        served = export.load_served(config, find_checkpoint(config), 'bn_recorded')
        return export.make_card(config, of_training, served, origin, 'savedmodel')
    own, other = card(precision='float32'), card(inference_shaping_ratio=3)
    assert own['clean_accuracy']['accuracy'] == 0.7922
    assert (own['precision'], own['results_precision']) == ('float32', 'mixed_bfloat16')
    assert other['results'] == [] and other['clean_accuracy'] is other['robust_accuracy'] is None


def test_the_cards_of_weights_have_numbers_of_both_inferences_that_are_served():
    folder = os.path.join(ROOT, 'weights', 'cifar10_w32_1', 'pgd_adv_only')
    config = load_config(f'{folder}/config.json')
    card = read_json(f'{folder}/card.json')
    for mode in ('pn', 'bn_recorded'):
        rows = export.rows_on(card, mode)
        robust, = (row for row in rows if export.is_robust(row, config, mode))
        assert robust['accuracy'] == card['accuracy'][mode]['worst in ball']['accuracy']
    with pytest.raises(UserError, match='no accuracies'):
        export.rows_on({'classes': []}, 'pn')


@pytest.mark.parametrize('end, key', [('.index', 'weights_digest'),
                                      (export.RECORDINGS, 'recordings_digest')])
def test_weights_and_recordings_of_another_model_are_refused(released, tmp_path, end, key):
    """Both fit the network: nothing else would tell, and the answers would be wrong."""
    folder = str(tmp_path / 'w')
    shutil.copytree(released, folder)
    with open(f'{find_checkpoint({"model_dir": folder})}{end}', 'ab') as f:
        f.write(b'1')
    with pytest.raises(UserError, match=f'card.json has the {key} .*; expected the files'):
        export.card_beside(f'{folder}/checkpoint-7', load_config(f'{folder}/config.json'))


@pytest.mark.parametrize('classes', [{'airplane': 0}, 'ten names', ['one'], None])
def test_a_card_that_names_other_classes_is_one_line(released, classes, monkeypatch):
    monkeypatch.setattr(export, 'read_json', lambda path: {'classes': classes})
    with pytest.raises(UserError, match='card.json names no such classes; expected what export'):
        classify.load_trained(load_config(f'{released}/config.json'))


def test_a_folder_of_checkpoints_is_not_written_over(exported, tmp_path):
    source = find_checkpoint(exported[1])
    with pytest.raises(UserError, match='holds something else than an exported model'):
        export.check_output(os.path.dirname(source), source)
    for name in ('config.json', 'checkpoint', 'checkpoint-7.index'):
        (tmp_path / name).write_text('weeks of training')
        with pytest.raises(UserError, match='holds something else than an exported model'):
            export.check_output(str(tmp_path), source)
    (tmp_path / 'card.json').write_text('{}')
    export.check_output(str(tmp_path), source)  # a former export
    with pytest.raises(UserError, match='holds something else than an exported model'):
        export.check_output(str(tmp_path), str(tmp_path / 'checkpoint-7'))  # what is exported


# ---- classify.py


@pytest.fixture(scope='module')
def pictures(inference, tmp_path_factory):
    """A folder of pictures: two of 32 x 32 as .png, .jpg and .npy, a larger one, a text."""
    folder = tmp_path_factory.mktemp('pictures')
    images = inference[1].eval_data.xs[:2]
    Image.fromarray(images[0]).save(folder / 'a.png')
    Image.fromarray(images[1]).save(folder / 'b.jpg', quality=95)
    Image.fromarray(images[0]).resize((50, 40)).save(folder / 'large.png')
    np.save(folder / 'one.npy', images[0])
    np.save(folder / 'two.npy', images.astype(np.float32))
    np.save(folder / 'odd.npy', np.zeros([5, 5]))
    np.save(folder / 'empty.npy', np.zeros([1, 0, 5, 3]))
    np.save(folder / 'nan.npy', np.full([32, 32, 3], np.nan))
    np.save(folder / 'huge.npy', np.full([32, 32, 3], 1e300))
    many = np.lib.format.open_memmap(folder / 'many.npy', 'w+', np.uint8, (50_001, 32, 32, 3))
    del many  # a hole on the disk
    Image.new('1', (9000, 9000)).save(folder / 'bomb.png')
    (folder / 'text.png').write_text('no picture')
    return folder


@pytest.mark.parametrize('model', ['exported', ''])
def test_classify_answers_for_each_image(exported, pictures, model):
    folder = exported[0] if model else exported[1]['model_dir']
    settings = [] if model else [*RECORDINGS]
    status, stdout, stderr = program('classify.py', '--model', folder, '--num_votes', '5', 'a.png',
                                     'b.jpg', 'one.npy', 'two.npy', settings=settings, cwd=pictures)
    assert (status, stderr) == (0, [])
    lines = stdout.splitlines()
    assert [line.split(':')[0] for line in lines] == [
        'a.png', 'b.jpg', 'one.npy', 'two.npy[0]', 'two.npy[1]']
    assert all(line.endswith('of 5 recordings agree') for line in lines)


def test_classify_says_how_many_recordings_agree(exported, pictures, loaded, inference):
    answer = loaded(inference[1].eval_data.xs[:1], num_votes=7)  # all: nothing is left to chance
    _, stdout, _ = program('classify.py', '--model', exported[0], '--num_votes', '7', 'a.png',
                           cwd=pictures)
    label = int(answer['label'][0])
    assert stdout == (f'a.png: {inference[1].label_names[label]}, probability '
                      f'{float(answer["probabilities"][0, label]):.2f}, '
                      f'{int(answer["votes"][0, label])} of 7 recordings agree\n')


@pytest.mark.parametrize('name, said', [
    ('large.png', 'large.png is 50 x 40 pixels; expected 32 x 32, or --resize'),
    ('text.png', 'text.png cannot be read as PNG or JPEG'),
    ('none.png', 'none.png does not exist; expected a PNG, JPEG or .npy file'),
    ('odd.npy', r'odd.npy holds an array \[5, 5\]; expected \[32, 32, 3\] or'),
    ('empty.npy', r'empty.npy holds an array \[1, 0, 5, 3\]; expected \[32, 32, 3\] or'),
    ('nan.npy', r'nan.npy holds pixels that are no finite numbers in \[0, 255\]'),
    ('huge.npy', r'huge.npy holds pixels that are no finite numbers in \[0, 255\]'),
    ('many.npy', 'many.npy makes it more than 50,000 images; expected 50,000 in one call at most'),
    ('bomb.png', 'bomb.png is 9000 x 9000 pixels; expected 32 x 32, or --resize')])
def test_what_is_no_image_is_one_line(pictures, monkeypatch, name, said):
    monkeypatch.chdir(pictures)
    with pytest.raises(UserError, match=said):
        classify.read_images(name, resize=False)


def test_resize_makes_any_picture_fit(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    with pytest.raises(UserError, match='9000 x 9000 pixels; expected 67,108,864 in all at most'):
        classify.read_images('bomb.png', resize=True)
    (name, image), = classify.read_images('large.png', resize=True)
    assert image.shape == (32, 32, 3) and 0 <= image.min() <= image.max() <= 255
    (_, original), = classify.read_images('a.png', resize=False)
    assert np.abs(image - original).mean() < 20  # the same picture


@fuzz(200, contents=st.binary(max_size=200), place=st.integers(0, 200))
def test_a_damaged_picture_is_never_a_traceback(tmp_path_factory, contents, place):
    f = io.BytesIO()
    Image.fromarray(np.zeros([32, 32, 3], np.uint8)).save(f, 'PNG')
    whole = f.getvalue()
    path = tmp_path_factory.getbasetemp() / 'damaged.png'
    path.write_bytes(whole[:place] + contents + whole[place + len(contents):])
    try:
        classify.read_images(str(path), resize=True)
    except UserError as error:
        assert '\n' not in str(error)


def test_classify_checks_settings_against_the_models_own_configuration(tmp_path, pictures):
    """It has batches of 64, which can be divided 7:1; config.json's 100 cannot."""
    model = tmp_path / 'model'
    shutil.copytree(os.path.join(ROOT, 'weights', 'three_classes', 'pgd_natural'), model)
    config = load_config(model / 'config.json')
    store_config({**config, 'shaping_batch_size': 64, 'inference_shaping_ratio': 3},
                 str(model / 'config.json'))
    found = [program('classify.py', '--model', str(model), 'a.png', settings=settings, cwd=pictures)
             for settings in (['inference_shaping_ratio=7'], ['inference_shaping_ratio=4'],
                              ['recorded_samples=9'])]
    assert [status for status, *_ in found] == [0, 2, 2]
    assert 'a batch of 64 cannot be divided 4:1' in found[1][2][0]
    assert 'recorded_samples is 9' in found[2][2][0] and 'are of 90 training' in found[2][2][0]


def test_classify_without_a_model_or_with_too_many_votes_is_one_line(exported, pictures, tmp_path):
    os.makedirs(tmp_path / 'onnx')
    (tmp_path / 'onnx' / 'model.onnx').write_bytes(b'')
    for arguments, said in (
            (['--model', str(tmp_path), 'a.png'], f'{tmp_path} holds no config.json'),
            (['--model', str(tmp_path / 'onnx'), 'a.png'], 'is an ONNX export, which classify.py'),
            (['--model', exported[0], '--config', os.path.join(ROOT, 'configs', 'quick.json'),
              'a.png'], 'expected one of them'),
            (['--model', exported[0], '--set', 'num_recordings=5', 'a.png'], 'an exported model'),
            (['--model', exported[0], '--num_votes', '8', 'a.png'],
             '--num_votes must be an integer, 1 to 7, the number of recordings, got 8'),
            ([], 'no image is named')):
        status, stdout, stderr = program('classify.py', *arguments, cwd=pictures)
        assert (status, stdout) == (2, '') and said in stderr[0]

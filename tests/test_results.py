"""Results of several runs in one file, what is printed of them, curves, pictures, --watch."""
import json
import multiprocessing
import os
import subprocess

import numpy as np
import pytest
import tensorflow as tf

from config import store_config
from conftest import CHECKPOINT
from eval import Removed, Request, evaluate_checkpoint
from model import find_checkpoint
from report import Outputs, identity, is_marked, print_comparison, tag_settings
from running import UserError, arriving, results
from running.results import add_results, check_writable, commit, provenance, read_results


@pytest.fixture
def run(small_model, small_config, data, tmp_path):
    """f(attacks, modes, num_draws=1, step=7, output=..., pictures=..., key=value) -> the file."""
    def evaluated(attacks, modes, num_draws=1, step=7, output=None, pictures=None, **settings):
        config = small_config(model_dir=str(tmp_path / 'm'), **settings)
        os.makedirs(config['model_dir'], exist_ok=True)
        if not os.path.exists(tmp_path / 'm' / 'config.json'):
            store_config(config, tmp_path / 'm' / 'config.json')
        prefix = str(tmp_path / 'm' / f'checkpoint-{step}')
        if not os.path.exists(f'{prefix}.index'):
            small_model.variables[0].assign_add(tf.ones_like(small_model.variables[0]) * 0.01)
            small_model.save_madry_checkpoint(prefix, global_step=step)
        outputs = Outputs(config, output, pictures)
        evaluate_checkpoint(prefix, small_model, data, config,
                            Request(attacks, modes, num_draws), outputs)
        return read_results(outputs.path)
    return evaluated


def cells(contents):
    return [(r['step'], r['attack'], r['inference'], r['num_examples'])
            for r in contents['results']]


def curves(folder):
    """Returns the TensorBoard tags in a folder, and the number of values of each."""
    tags = {}
    for path in folder.glob('events*'):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            for value in tf.compat.v1.Event.FromString(record).summary.value:
                tags[value.tag] = tags.get(value.tag, 0) + 1
    return tags


# ---- one file, many runs


def test_a_run_replaces_its_own_rows_only(run):
    first = run(['clean', 'pgd'], ['pn', 'bn'])
    assert len(first['results']) == 8
    dates = [r.pop('provenance') for r in first['results']]
    assert {date['device'] for date in dates} == {'CPU'}
    assert all(where['code'] and where['date'] and where['libraries']['tensorflow']
               for where in dates)
    again = run(['pgd'], ['pn'])  # fewer: the others stay, its own is replaced
    assert cells(again) == cells(first)
    assert all({**a, 'seconds': 0, 'provenance': 0} == {**b, 'seconds': 0, 'provenance': 0}
               for a, b in zip(first['results'], again['results']))
    more = run(['pgd'], ['pn'], num_eval_examples=20)  # other settings: beside it
    assert cells(more) == [*cells(first), (7, 'pgd', 'pn', 20)]
    more = run(['pgd'], ['pn'], num_steps=1)
    assert [r['num_steps'] for r in more['results'] if r['attack'] == 'pgd'] == [2, 2, 2, 1]
    more = run(['clean'], ['pn'], np_random_seed=5)  # of bn_shaping's draws, say
    assert len(more['results']) == 11
    other = run(['clean'], ['pn'], step=8)
    assert cells(other)[-1] == (8, 'clean', 'pn', 50) and len(other['results']) == 12
    assert other['step'] == 8 and other['checkpoint'].endswith('checkpoint-8')
    assert other['config']['num_steps'] == 2
    assert {r['checkpoint'][-1] for r in other['results']} == {'7', '8'}


def test_a_worst_case_says_which_attacks_with_which_settings(run):
    run(['clean', 'pgd'], ['pn'])
    contents = run(['clean', 'pgd'], ['pn'], num_steps=1)
    worst = [r for r in contents['results'] if r['attack'] == 'worst case']
    assert [r['attack_settings']['pgd']['num_steps'] for r in worst] == [2, 1]


def test_other_weights_at_the_same_path_are_other_rows(run, tmp_path):
    run(['clean'], ['pn'])
    os.remove(tmp_path / 'm' / 'checkpoint-7.index')
    rows = run(['clean'], ['pn'])['results']
    assert len({r['checkpoint_digest'] for r in rows}) == len(rows) == 2


def test_rows_of_a_former_version_stay(tmp_path):
    path = tmp_path / 'results.json'
    path.write_text(json.dumps({'checkpoint': 'a-7', 'step': 7, 'config': {}, 'results': [
        {'attack': 'pgd', 'inference': 'pn', 'accuracy': 0.5}]}))
    add_results(path, {'step': 8}, [{'attack': 'pgd', 'step': 8}], identity)
    assert read_results(path) == {'checkpoint': 'a-7', 'step': 8, 'config': {}, 'results': [
        {'attack': 'pgd', 'inference': 'pn', 'accuracy': 0.5}, {'attack': 'pgd', 'step': 8}]}


@pytest.mark.parametrize('contents', [
    '', '{"results": [{"attack"', '[]', '{"a": 1}', '{"results": {"a": 1}}', '{"results": [1]}',
    '\x00', '[' * 100000])
def test_a_damaged_or_foreign_file_is_told_before_the_work_and_left_alone(
        run, tmp_path, small_config, contents):
    path = tmp_path / 'results.json'
    path.write_text(contents)
    for attempt in (lambda: Outputs(small_config(), str(path)),
                    lambda: add_results(path, {}, [{'a': 1}], identity)):
        with pytest.raises(UserError, match='results.json') as error:
            attempt()
        assert '\n' not in str(error.value)
    assert path.read_text() == contents and os.listdir(tmp_path) == ['results.json']


def _add(path, number, barrier):
    for i in range(25):
        barrier.wait(20)
        add_results(path, {}, [{'run': number, 'row': i}], json.dumps)


def test_two_runs_at_once_lose_no_row(tmp_path):
    context, path = multiprocessing.get_context('fork'), str(tmp_path / 'new' / 'results.json')
    barrier = context.Barrier(3)
    processes = [context.Process(target=_add, args=(path, n, barrier)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len({json.dumps(row) for row in read_results(path)['results']}) == 75
    assert os.listdir(tmp_path / 'new') == ['results.json']


def test_a_failed_write_keeps_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / 'results.json'
    add_results(path, {}, [{'a': 1}], identity)
    with pytest.raises(TypeError):
        add_results(path, {}, [{'a': object()}], lambda row: str(row))
    assert read_results(path) == {'results': [{'a': 1}]}
    assert os.listdir(tmp_path) == ['results.json']


def test_the_commit_is_told_of_a_checkout_only(tmp_path):
    def git(*arguments):
        return subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=b',
                               *arguments], check=True, capture_output=True, text=True).stdout
    assert commit(tmp_path) is None
    (tmp_path / '.git').mkdir()  # no checkout either
    assert commit(tmp_path) is None
    (tmp_path / 'a').write_text('1')
    git('init', '-q')
    git('add', 'a')
    git('commit', '-qm', 'a')
    head = git('rev-parse', 'HEAD').strip()
    assert commit(tmp_path) == head
    (tmp_path / 'a').write_text('2')
    assert commit(tmp_path) == f'{head}-dirty'


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    assert provenance()['commit'] is None


# ---- where it goes


def test_with_output_nothing_is_written_in_model_dir(run, tmp_path):
    output = tmp_path / 'out' / 'r.json'
    assert len(run(['clean'], ['pn'], output=str(output))['results']) == 1
    assert sorted(os.listdir(tmp_path / 'm')) == [
        'checkpoint-7.data-00000-of-00001', 'checkpoint-7.index', 'config.json']
    assert os.listdir(tmp_path / 'out') == ['r.json']


def test_what_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    check_writable(tmp_path / 'a' / 'b' / 'c', 'x')  # can, and nothing is made
    assert os.listdir(tmp_path) == ['file']
    for path, named in ((tmp_path / 'file' / 'r.json', 'Not a directory'),
                        (tmp_path / 'file' / 'eval' / 'r.json', 'Not a directory'),
                        (tmp_path, 'Is a directory'), (f'{tmp_path}/new/', 'Is a directory'),
                        ('/proc/r.json', '')):
        with pytest.raises(UserError, match=f'cannot be written: .*{named}.*; expected x'):
            check_writable(path, 'x')
    def read_only(**_):
        raise OSError(30, 'Read-only file system')
    monkeypatch.setattr(results.tempfile, 'TemporaryFile', read_only)
    with pytest.raises(UserError, match='r.json cannot be written: Read-only file system'):
        check_writable(tmp_path / 'r.json', 'x')


# ---- curves and pictures


ORIGINALS = {'accuracy nat', 'xent nat', 'accuracy adv', 'xent adv', 'accuracy adv eval',
             'xent adv eval'}


def test_curves_of_different_settings_share_no_tag(run, tmp_path):
    folder = tmp_path / 'm' / 'eval'
    run(['clean', 'pgd'], ['pn', 'bn_shaping'])
    usual = curves(folder)
    assert usual.keys() >= ORIGINALS | {
        'accuracy pgd pn', 'xent pgd bn_shaping', 'accuracy worst case pn of clean+pgd',
        'images pgd eval', 'answers pgd eval'}
    run(['clean', 'pgd'], ['pn', 'bn_shaping'], num_draws=2, num_steps=1, num_eval_examples=20,
        inference_shaping_ratio=4)
    both = curves(folder)
    assert all(both[tag] == 1 for tag in both) and usual.keys() < both.keys()
    assert 'accuracy pgd pn num_examples=20 num_steps=1' in both
    assert 'accuracy clean bn_shaping inference_shaping_ratio=4 num_draws=2 num_examples=20' in both
    run(['clean', 'pgd'], ['pn', 'bn_shaping'])  # the same again: the same tags
    assert set(curves(folder)) == set(both)
    run(['adaptive_pgd'], ['bn', 'bn_recorded'], num_recordings=3)  # which one of them goes through
    assert set(curves(folder)) >= {'images adaptive_pgd through bn eval',
                                   'images adaptive_pgd through bn_recorded eval num_recordings=3'}


def test_a_watch_that_began_before_the_training_writes_the_originals_tags(
        small_model, small_config, data, tmp_path):
    config = small_config(model_dir=str(tmp_path))
    outputs = Outputs(config)
    store_config(config, tmp_path / 'config.json')
    small_model.save_madry_checkpoint(tmp_path / 'checkpoint-3')
    evaluate_checkpoint(str(tmp_path / 'checkpoint-3'), small_model, data, config,
                        Request(['clean'], ['pn']), outputs)
    assert curves(tmp_path / 'eval').keys() >= {'accuracy nat', 'accuracy clean pn'}


def test_tags_of_attacks_with_keys_of_their_own(small_config):
    usual = small_config()
    config = {**usual, 'fgsm_epsilon': 4., 'num_steps': 99, 'epsilon': 2.}
    row = {'attack': 'fgsm', 'epsilon': 4., 'num_steps': 1, 'num_examples': 50}
    assert tag_settings(row, config, usual) == ' fgsm_epsilon=4.0'
    assert tag_settings({'attack': 'clean', 'epsilon': 0., 'num_examples': 50}, config, usual) == ''


def test_checkpoints_from_elsewhere_have_no_curve_in_model_dir(
        small_model, small_config, data, tmp_path):
    small_model.save_madry_checkpoint(tmp_path / 'checkpoint-3')
    config = small_config(model_dir=str(tmp_path / 'm'))
    evaluate_checkpoint(str(tmp_path / 'checkpoint-3'), small_model, data, config,
                        Request(['clean'], ['pn']), Outputs(config))
    assert os.listdir(tmp_path / 'm' / 'eval') == ['results.json']


def test_pictures_show_clean_adversarial_and_difference(run, tmp_path, monkeypatch):
    from matplotlib import image
    drawn = []
    monkeypatch.setattr('matplotlib.axes.Axes.imshow', lambda axis, x: drawn.append(x))
    texts = []
    monkeypatch.setattr('matplotlib.axes.Axes.set_xlabel',
                        lambda axis, text, **_: texts.append(text))
    path = str(tmp_path / 'new' / 'p.png')
    run(['clean', 'pgd'], ['pn', 'bn'], pictures=path)
    assert image.imread(path).shape[2] == 4 and len(drawn) == 8 * 3
    clean, adversarial, difference = drawn[:3]
    assert 0 < np.abs(adversarial - clean).max() <= 8 / 255 + 1e-6
    expected = np.clip(0.5 + 10 * (adversarial - clean), 0, 1)
    assert difference == pytest.approx(expected, abs=1e-5)
    assert texts[0].startswith('pn: ') and '\nbn: ' in texts[0] and texts[2] == ''
    run(['clean', 'pgd'], ['pn', 'bn'], pictures=path, num_attack_examples={'pgd': 4})
    assert len(drawn) == (8 + 4) * 3


def test_the_answers_in_pictures_are_those_that_were_counted(
        small_model, small_config, data, tmp_path):
    from eval import evaluate
    samples = {}
    evaluate(small_model, data, small_config(), ['clean'], ['pn', 'bn'], samples=samples)
    x_adv, answers, sure = samples['clean']
    assert (x_adv == data.eval_data.xs[:8]).all()
    for judge, training in ((('pn', None), False), (('bn', None), True)):
        logits = small_model(data.eval_data.xs[:20], training=training,
                             update_population_norms=False)
        assert (answers[judge] == np.argmax(logits, 1)[:8]).all()
        assert sure[judge] == pytest.approx(tf.nn.softmax(logits).numpy().max(axis=1)[:8])


# ---- what is printed


def test_a_number_on_fewer_examples_is_marked(run, capsys):
    run(['clean', 'pgd'], ['bn_shaping'], num_draws=2, num_attack_examples={'pgd': 20})
    lines = capsys.readouterr().out.splitlines()
    table, = (i for i, line in enumerate(lines) if line.startswith('Accuracy'))
    assert lines[table] == ('Accuracy in %, [95% Wilson interval], n = 50 test images where no '
                            'other n is given;')
    for name, n in (('clean', None), ('pgd', 20), ('worst case', 20)):
        rows = [line for line in lines if line.startswith(f'{name} ')]
        assert len(rows) == 2 and all((f'(n = {n})' in row) == bool(n) for row in rows)


def results_of(path, step=7, checkpoint='m/checkpoint', **rows):
    contents = {'checkpoint': f'{checkpoint}-{step}', 'step': step, 'config': {}, 'results': [
        {'attack': attack, 'inference': 'pn', 'accuracy': accuracy, 'num_examples': 1000,
         'interval': [accuracy - 0.03, accuracy + 0.03], 'checkpoint': f'{checkpoint}-{step}',
         'step': step, **settings} for attack, (accuracy, settings) in rows.items()]}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as f:
        json.dump(contents, f)


def test_several_results_are_printed_side_by_side(tmp_path, capsys):
    results_of(tmp_path / 'a/eval/results.json', pgd=(0.5, {'num_steps': 10}), clean=(0.9, {}))
    results_of(tmp_path / 'b.json', pgd=(0.4, {'num_steps': 20, 'flags': ['transferred']}),
               clean=(0.8, {'num_examples': 500}))
    print_comparison([str(tmp_path / 'a'), str(tmp_path / 'b.json')])
    assert capsys.readouterr().out.splitlines() == [
        'Accuracy in %, [95% Wilson interval], t where transferred, number of test images. A dash: '
        'not evaluated',
        f'(1) {tmp_path}/a/eval/results.json, step 7', f'(2) {tmp_path}/b.json, step 7',
        ' ' * 21 + '(1)'.rjust(32) + '(2)'.rjust(32),
        'clean, pn            ' + '90.00 [87.00, 93.00]     1000'.rjust(32)
        + '80.00 [77.00, 83.00]      500'.rjust(32),
        'pgd, pn, num_steps=10' + '50.00 [47.00, 53.00]     1000'.rjust(32) + '-'.rjust(32),
        'pgd, pn, num_steps=20' + '-'.rjust(32) + '40.00 [37.00, 43.00] t   1000'.rjust(32)]


def test_a_comparison_shows_the_last_runs_checkpoint(run, tmp_path, capsys):
    run(['clean'], ['pn'], step=7)
    run(['clean'], ['pn'], step=8, num_eval_examples=20)
    run(['clean'], ['pn'], step=8)
    capsys.readouterr()
    print_comparison([str(tmp_path / 'm')])
    out = capsys.readouterr().out
    assert 'results.json, step 8' in out and out.count('clean, pn') == 1
    assert out.rstrip().endswith(' 50')


def test_a_comparison_goes_by_the_weights_not_by_where_they_were(run, tmp_path, capsys):
    """A folder is moved between two evaluations: the rows of both are of the same weights."""
    run(['clean'], ['pn'])
    (tmp_path / 'm').rename(tmp_path / 'moved')
    path = tmp_path / 'moved' / 'eval' / 'results.json'
    contents = json.loads(path.read_text())
    row = {**contents['results'][0], 'attack': 'pgd', 'checkpoint': 'moved/checkpoint-7'}
    contents |= {'checkpoint': 'moved/checkpoint-7', 'results': [*contents['results'], row]}
    path.write_text(json.dumps(contents))
    capsys.readouterr()
    print_comparison([str(tmp_path / 'moved')])
    out = capsys.readouterr().out
    assert 'clean, pn' in out and 'pgd, pn' in out


@pytest.mark.parametrize('contents, named', [
    (None, 'does not exist'), ('{}', 'no file of results'), ('{"results": []}', 'no rows'),
    ('{"results": [{"attack": "a\\u001b", "inference": "pn"}]}', 'a row has no attack'),
    *((json.dumps({'results': [{'attack': 'pgd', 'inference': 'pn', 'accuracy': 0.5,
                                'interval': [0.4, 0.6], 'num_examples': 9, key: value}]}),
       'a row has no attack') for key, value in (('flags', None), ('data', [1])))])
def test_what_cannot_be_compared_is_named(tmp_path, contents, named):
    if contents:
        (tmp_path / 'r.json').write_text(contents)
    with pytest.raises(UserError, match=f'r.json.*{named}'):
        print_comparison([str(tmp_path / 'r.json')])
    with pytest.raises(UserError, match='holds no eval/results.json; eval.py --model_dir'):
        print_comparison([os.path.dirname(CHECKPOINT)])
    with pytest.raises(UserError, match='--compare'):
        print_comparison([])


def test_a_comparison_marks_transferred_worst_cases_of_older_versions():
    """Their rows have no flags."""
    of_pgd = {'attack_settings': {'clean': {'epsilon': 0.}, 'pgd': {'norms': 'pn'}}}
    worst = {'attack': 'worst in ball', 'inference': 'bn_shaping', **of_pgd}
    assert is_marked(worst) and not is_marked({**worst, 'inference': 'pn'})
    assert not is_marked({**worst, 'flags': []})
    assert not is_marked({'attack': 'clean', 'inference': 'pn', 'epsilon': 0.})


def test_a_checkpoint_that_the_training_removed_is_told_apart(
        small_model, small_config, data, tmp_path):
    """--watch takes the next one then; any other mistake, such as in the output, ends it."""
    config = small_config(model_dir=str(tmp_path))
    arguments = small_model, data, config, Request(['clean'], ['pn']), Outputs(config)
    with pytest.raises(Removed, match='checkpoint-3 was removed before it could be evaluated'):
        evaluate_checkpoint(str(tmp_path / 'checkpoint-3'), *arguments)
    (tmp_path / 'old').write_text('of one file, as very old checkpoints are, and damaged')
    with pytest.raises(UserError) as error:
        evaluate_checkpoint(str(tmp_path / 'old'), *arguments)
    assert not isinstance(error.value, Removed)
    small_model.save_madry_checkpoint(tmp_path / 'checkpoint-3')
    (tmp_path / 'eval').mkdir()
    (tmp_path / 'eval' / 'results.json').write_text('meanwhile damaged')
    with pytest.raises(UserError, match='results.json is not JSON') as error:
        evaluate_checkpoint(str(tmp_path / 'checkpoint-3'), *arguments)
    assert not isinstance(error.value, Removed)
    assert os.listdir(tmp_path / 'eval' / 'unfinished')  # a second run has nothing to compute


# ---- which checkpoint


@pytest.fixture
def folder(small_model, tmp_path):
    """A folder with checkpoint-7 and 9 and the configuration of a training on three classes."""
    for step in (7, 9):
        small_model.save_madry_checkpoint(tmp_path / f'checkpoint-{step}', global_step=step)
    (tmp_path / 'checkpoint').write_text('model_checkpoint_path: "checkpoint-7"')
    (tmp_path / 'config.json').write_text(json.dumps(
        {'num_residual_units': 1, 'width_factor': 1, 'dataset': 'cifar10', 'classes': ['a', 'b']}))
    return tmp_path


ALIKE = {'model_dir': 'nowhere', 'num_residual_units': 1, 'width_factor': 1, 'dataset': 'cifar10',
         'classes': ['a', 'b']}


@pytest.mark.parametrize('given, step', [
    ('checkpoint-7', 7), ('checkpoint-7.index', 7), ('checkpoint-7.data-00000-of-00001', 7),
    ('', 9), ('checkpoint', 9)])
def test_a_checkpoint_may_be_given_by_one_of_its_files_or_its_folder(folder, given, step):
    assert find_checkpoint(ALIKE, str(folder / given)) == str(folder / f'checkpoint-{step}')


def test_a_checkpoint_that_is_not_there_is_told_with_what_is(folder):
    with pytest.raises(UserError, match='there is no .*checkpoint-8.index; expected a prefix such '
                                        'as .*holds checkpoint-9, checkpoint-7'):
        find_checkpoint(ALIKE, str(folder / 'checkpoint-8'))


@pytest.mark.parametrize('change, named', [
    ({'classes': None}, r'classes \["a", "b"\], got null'),
    ({'classes': ['b', 'a']}, 'classes'), ({'width_factor': 10}, 'width_factor 1, got 10'),
    ({'num_residual_units': 5}, 'num_residual_units'), ({'dataset': 'synthetic'}, 'dataset')])
def test_a_model_trained_otherwise_is_refused(folder, change, named):
    for config, given in (({**ALIKE, **change}, folder / 'checkpoint-7'),
                          ({**ALIKE, **change, 'model_dir': str(folder)}, None)):
        with pytest.raises(UserError, match=f'was trained with .*{named}.*; expected --model_dir '
                                            f'{folder}'):
            find_checkpoint(config, given)


# ---- --watch


def watched(monkeypatch, events, plan=lambda: (2, 8), damaged=()):
    """Returns the steps that `arriving` yields where events are what the folder holds, in turn."""
    there, events = [], list(events)
    def come(_=None):
        assert events, 'it waits for ever'
        there[:] = events.pop(0)
    monkeypatch.setattr(arriving.time, 'sleep', come)
    come()
    found = []
    for prefix in arriving.arriving(
            'm', lambda folder: [f'm/checkpoint-{step}' for step in sorted(there, reverse=True)],
            lambda prefix: 'cut short' if prefix.endswith(damaged) and damaged else None, plan):
        found.append(arriving.step_of(prefix))
        if len(events) > 1 and events[0] == 'meanwhile':
            events.pop(0)
            come()
    return found


def test_watch_takes_every_checkpoint_in_order(monkeypatch, capsys):
    assert watched(monkeypatch, [[], [0], [0, 2, 4], [2, 4, 6], [4, 6, 8]]) == [0, 2, 4, 6, 8]
    assert capsys.readouterr().out.splitlines() == [
        'Waiting for the first checkpoint in m, until step 8',
        'Waiting for the next checkpoint in m, after step 0, until step 8',
        'Waiting for the next checkpoint in m, after step 4, until step 8',
        'Waiting for the next checkpoint in m, after step 6, until step 8',
        'Step 8 is the last of this training']


def test_watch_tells_which_checkpoints_it_missed(monkeypatch, capsys):
    assert watched(monkeypatch, [[0], 'meanwhile', [4, 6, 8]]) == [0, 4, 6, 8]
    assert 'Missed: checkpoints 2; ' in capsys.readouterr().out


def test_watch_evaluates_what_is_there_and_ends(monkeypatch):
    assert watched(monkeypatch, [[4, 6, 8]]) == [4, 6, 8]
    assert watched(monkeypatch, [[6], [7]], plan=lambda: (2, 7)) == [6, 7]

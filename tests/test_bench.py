"""What bench.py times: PyTorch's network is ours, and the attack on it is the same."""
import numpy as np
import pytest
import tensorflow as tf

import bench
from model import Model
from test_programs import SETTINGS, program


def copy_weights(model, network):
    """Gives a PyTorch network the weights of ours."""
    torch = bench.import_torch()
    ours = {name: torch.from_numpy(v.numpy()) for name, v in model.variables_by_name.items()}

    def norm(module, name):
        for key in ('beta', 'gamma'):
            getattr(module, {'beta': 'bias', 'gamma': 'weight'}[key]).data = ours[
                f'{name}/BatchNorm/{key}']

    network.conv.weight.data = ours['input/init_conv/DW'].permute(3, 2, 0, 1)
    for (name, *_), unit in zip(model.units(), network.units):
        scope = 'shared_activation' if name == 'unit_1_0' else 'residual_only_activation'
        norm(unit.norm1, f'{name}/{scope}')
        norm(unit.norm2, f'{name}/sub2')
        unit.conv1.weight.data = ours[f'{name}/sub1/conv1/DW'].permute(3, 2, 0, 1)
        unit.conv2.weight.data = ours[f'{name}/sub2/conv2/DW'].permute(3, 2, 0, 1)
    norm(network.norm, 'unit_last')
    network.dense.weight.data = ours['logit/DW'].T
    network.dense.bias.data = ours['logit/biases']


def test_the_network_in_pytorch_is_ours(batch):
    """Batch norms; TensorFlow pads a strided convolution on one side, PyTorch on both."""
    torch = pytest.importorskip('torch')
    model = Model(2, 1)
    network = bench.make_torch_network(model, 10)
    copy_weights(model, network)
    for unit in network.units:
        if unit.stride > 1:
            unit.conv1.padding = 0
            unit.conv1.register_forward_pre_hook(
                lambda _, x: torch.nn.functional.pad(x[0], (0, 1, 0, 1)))
    x = batch[0].astype(np.float32)
    theirs = network(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(theirs, model(tf.constant(x)), atol=2e-3)


@pytest.mark.parametrize('mode', ['natural', 'adv_only', 'shaping_in_attack_and_training'])
def test_a_step_in_pytorch_lowers_the_loss(small_model, small_config, batch, mode):
    pytest.importorskip('torch')
    config = small_config(training_mode=mode, data_augmentation=False, epsilon=2.)
    step = bench.make_torch_step(small_model, config, 10, np.random.default_rng(0))
    losses = [step(*batch) for _ in range(12)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize('options, said', [
    (['--steps', '1', '--against', 'original'], {
        'Original, same ops': 1, 'Original, its own ops': 1, 'over ours': 2,
        ' seconds a step': 2, 'Share of peak': 1}),
    (['--query'], {'query, bn_recorded ': 1, 'gradient, bn_shaping, 10 ': 1, ' ms an image': 10,
                   ' times pn': 10})])
def test_the_program_times_what_it_is_asked_for(options, said):
    status, stdout, stderr = program('bench.py', '--repeats', '1', *options,
                                     settings=[*SETTINGS, 'num_recordings=2'])
    assert status == 0, stderr
    assert {words: stdout.count(words) for words in said} == said, stdout

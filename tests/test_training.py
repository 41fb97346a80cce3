import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import timm_cascade
from timm_cascade.data import ImageData


def test_heads_learn_and_the_backbone_does_not_change(small, images, tmp_path):
    before = {k: v.clone() for k, v in small.backbone.state_dict().items()}
    small.train()
    history = timm_cascade.train_heads(small, images, images, epochs=12, batch_size=32, lr=1e-2,
                                       log=tmp_path / 'log.jsonl')
    assert small.training
    assert all(torch.equal(v, before[k]) for k, v in small.backbone.state_dict().items())
    assert history[-1]['loss'] < 0.5 * history[0]['loss']
    assert min(history[-1]['accuracy'][:2]) > 0.9 and len(history[-1]['accuracy']) == 3
    assert [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()] == history


def test_the_same_seed_gives_the_same_heads(small, images):
    state = {k: v.clone() for k, v in small.state_dict().items()}
    results = []
    for _ in range(2):
        small.load_state_dict(state)
        timm_cascade.train_heads(small, images, epochs=2, batch_size=32)
        results.append({k: v.clone() for k, v in small.heads.state_dict().items()})
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_wrong_labels_leave_the_heads_as_they_were(small):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    data = TensorDataset(torch.randn(8, 1, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]))
    with pytest.raises(ValueError, match='num_classes=5'):
        timm_cascade.train_heads(small, data, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_a_loss_that_is_not_finite_leaves_the_heads_as_they_were(small):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    data = TensorDataset(torch.full((8, 1, 16, 16), float('nan')), torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match='loss is nan'):
        timm_cascade.train_heads(small, data, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_training_drops_a_calibration_for_the_old_heads(small, images):
    timm_cascade.calibrate(small, images)
    small.thresholds = [0.5, 0.5]
    timm_cascade.train_heads(small, images, epochs=1)
    assert small.calibration is None and small.table is None and not small.any_open


def test_two_processes_train_the_same_heads_as_one(tmp_path):
    """torchrun with two gloo processes, a data set that two does not divide; heads equal to 1e-5."""
    script = tmp_path / 'work.py'
    script.write_text(textwrap.dedent('''
        import sys, numpy as np, timm, torch, timm_cascade
        from accelerate import Accelerator
        from timm_cascade.data import ImageData
        torch.set_num_threads(1)
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == int(sys.argv[1]), accelerator.num_processes
        torch.manual_seed(0)
        model = timm.create_model('cascade_cifar_resnet20', in_chans=1, num_classes=4, exits=['layer1', 'layer2'],
                                  pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,)))
        rng = np.random.default_rng(0)
        data = ImageData(rng.integers(0, 255, (45, 16, 16), dtype=np.uint8), rng.integers(0, 4, 45), list('abcd'))
        timm_cascade.train_heads(model, data, epochs=3, batch_size=16, accelerator=accelerator)
        calibration = timm_cascade.calibrate(model, data, batch_size=16, accelerator=accelerator)
        if accelerator.is_main_process:
            torch.save({**model.heads.state_dict(), 'confidence': torch.tensor(calibration.confidence)}, sys.argv[2])
    '''))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    for command, n in (([sys.executable], '1'), (launch, '2')):
        subprocess.run([*command, str(script), n, str(tmp_path / f'{n}.pt')], check=True, capture_output=True)
    one, two = (torch.load(tmp_path / f'{n}.pt', weights_only=True) for n in '12')
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[k].float(), two[k].float(), atol=1e-5) for k in one)


def test_grey_images_for_a_colour_model():
    import timm
    model = timm.create_model('cascade_test_resnet', num_classes=2, exits=1)
    data = ImageData(np.random.default_rng(0).integers(0, 255, (6, 20, 20), dtype=np.uint8), [0, 1] * 3, ['a', 'b'])
    assert np.isfinite(timm_cascade.train_heads(model, data, epochs=1)[0]['loss'])

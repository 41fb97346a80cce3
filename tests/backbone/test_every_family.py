"""The smallest model of every module file of timm, on small pictures: exits by default, and every result is right."""

import pytest
import timm
import torch
from helpers import needs
from timm.models import model_entrypoint
from timm.models._manipulate import group_with_matcher

from scripts.experiments.every_backbone.equality import batch, judge, randomise
from timm_cascade.backbone import BackboneError, backbone_macs, input_size_of


def picture(side):
    return dict(pretrained_cfg_overlay=dict(input_size=(3, side, side)))


# built for pictures of one size, which is an argument of theirs
SIZED = """
    deit_tiny_patch16_224 efficientformerv2_s0 eva02_tiny_patch14_224 gmlp_ti16_224 levit_128s
    mobilevit_xxs mvitv2_tiny nest_tiny pit_ti_224 repvit_m1 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_byobnet test_coatnet test_vit test_vit_relpos
    tnt_s_legacy_patch16_224 visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xcit_nano_12_p8_224
""".split()
# any size will do
FREE = """
    cpubone_nano cs3darknet_focus_s cspnext_tiny dla46x_c dpn48b edgenext_xx_small ese_vovnet19b_slim_dw
    fasternet_t0 focalnet_tiny_srf ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t
    inception_next_atto lcnetv2_small legacy_seresnet18 legacy_xception mobilenetv3_small_050 nasnetalarge
    nextvit_small pnasnet5large poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 res2next50
    resnest14d resnetv2_18 rexnet_100 selecsls42 shvit_s1 skresnet18 starnet_s050 test_convnext test_efficientnet
    test_mambaout test_nfnet test_resnet tiny_vit_5m_224 tresnet_m xception41p
""".split()
NARROW = dict(depth=3, embed_dim=64, num_heads=2)
# no smaller picture will do, or fewer and narrower blocks will: the code that is cut is the same
OTHER = {
    'beit_base_patch16_224': dict(img_size=64, **NARROW),
    'cait_xxs24_224': dict(img_size=64, depth=6),
    'coat_tiny': dict(img_size=64, serial_depths=[1, 1, 1, 1], parallel_depth=1, embed_dims=[16, 32, 32, 32]),
    'convit_tiny': dict(img_size=64, depth=6, local_up_to_layer=4),
    'convmixer_768_32': picture(28),
    'crossvit_tiny_240': dict(img_size=48, img_scale=(1.0, 2 / 3), depth=[[1, 2, 0]] * 3),
    'csatv2': dict(depths=(1, 1, 2, 2), transformer_depths=(0, 0, 1, 1), **picture(64)),
    'davit_tiny': dict(embed_dims=(24, 48, 96, 192), num_heads=(1, 2, 4, 8), **picture(64)),
    'deepseek_vit_412m': dict(img_size=112, **NARROW),
    'densenet121': dict(block_config=(2, 3, 4, 3), **picture(64)),
    'efficientformer_l1': dict(img_size=224, depths=(1, 1, 2, 2)),
    'efficientvim_m1': dict(depths=(1, 2, 1), **picture(64)),
    'efficientvit_b0': dict(depths=(1, 1, 1, 1, 1), **picture(64)),
    'efficientvit_m0': dict(img_size=64, depth=[1, 1, 2]),
    'fastvit_t8': dict(layers=(1, 1, 2, 1), **picture(64)),
    'gcvit_xxtiny': dict(img_size=64, embed_dim=16),
    'gemma4_vit_167m': dict(img_size=48, **NARROW),
    'halonet26t': dict(img_size=256, width_factor=0.25),
    'hiera_tiny_224': dict(img_size=64, embed_dim=48, stages=(1, 1, 2, 1)),
    'hieradet_small': dict(stages=(1, 1, 2, 1), embed_dim=48, **picture(64)),
    'inception_resnet_v2': picture(75),
    'inception_v3': picture(75),
    'inception_v4': picture(75),
    'lowformer_b0': dict(depth_list=[0, 1, 1, 2, 2], **picture(64)),
    'mobilenetv5_base': dict(channel_multiplier=0.25, **picture(32)),
    'naflexvit_base_patch16_parfac_gap': dict(img_size=64, **NARROW),
    'qwen3_vit_88m': dict(img_size=64, **NARROW),
    'samvit_base_patch16_224': dict(img_size=64, **NARROW),
    'sequencer2d_s': dict(img_size=64, layers=(1, 1, 2, 1)),
    'twins_svt_small': dict(img_size=64, depths=[1, 1, 2, 1]),
    'vgg11': dict(mlp_ratio=0.05, **picture(64)),
}
FAMILIES = {**{n: dict(img_size=64) for n in SIZED}, **{n: picture(64) for n in FREE}, **OTHER}
# what hooks cannot cut
EXPORTED = set(
    'coat_tiny deepseek_vit_412m gemma4_vit_167m nasnetalarge pnasnet5large qwen3_vit_88m twins_svt_small'.split()
)


# refused with timm before 1.0.31, and with torch 2.6
NEEDS_NEWER = {'gcvit_xxtiny', 'efficientvit_b0'}
# four others, which take less, are cut by an export too
SLOW = set('coat_tiny efficientvim_m1 hrnet_w18_small mobilenetv5_base nasnetalarge pnasnet5large'.split())


def module_file(name):
    return model_entrypoint(name).__module__.rpartition('.')[2]


@needs(*FAMILIES)
def test_the_list_has_every_module_file():
    known = {module_file(name) for name in timm.list_models() if not name.startswith(('cascade_', 'cifar_'))}
    assert {module_file(name) for name in FAMILIES} == known and len(FAMILIES) == len(known)


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[needs(n), *([pytest.mark.slow] if n in SLOW else [])]) for n in sorted(FAMILIES)]
)
def test_remaining_samples_get_the_logits_they_get_in_the_whole_batch(name):
    torch.manual_seed(0)
    try:
        model = timm.create_model(f'cascade_{name}', num_classes=11, **FAMILIES[name]).eval()
    except BackboneError as e:
        if name not in NEEDS_NEWER or 'Upgrade' not in str(e):
            raise
        pytest.skip(str(e))
    # four: batch norm of few numbers (maps of one pixel) would be ill-conditioned
    images = batch(input_size_of(model.backbone), 4)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    randomise(model, images)
    with torch.no_grad():
        before = model.backbone(images)
        equal, *errors = judge(model, images, quick=True)
        assert equal, errors
        assert torch.equal(model.backbone(images), before)  # an export or a probe leaves nothing behind
    assert 1 <= len(model.exits) <= 5
    if name in EXPORTED:
        assert {p.cut for p in model.exits} == {'export'}

    total = backbone_macs(model.backbone, images.shape[1:])
    assert model.stage_macs().sum() == total + model.head_macs().sum() and (model.stage_macs() > 0).all()

    assert hasattr(model, 'group_matcher') == hasattr(model.backbone, 'group_matcher')
    if hasattr(model, 'group_matcher'):  # parameters fall into the groups they fall into without the cascade
        names = [n for n, _ in model.backbone.named_parameters()]
        want = group_with_matcher([(n, n) for n in names], model.backbone.group_matcher(), reverse=True)
        got = group_with_matcher([(n, n) for n, _ in model.named_parameters()], model.group_matcher(), reverse=True)
        assert {n: got[f'backbone.{n}'] for n in names} == want
        assert all(got[n] == max(got.values()) for n in got if n.startswith('heads.'))

"""What a picture loses on its way to the network: nothing that can be seen."""

from __future__ import annotations

import numpy as np
import pytest
import timm
from PIL import Image

from timm_cascade.data import BadImageError, ImageData, eval_transform, load_data
from timm_cascade.data.views import _ToMode

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(image):
    return np.asarray(_ToMode(1)(image))


@pytest.mark.parametrize(
    'image',
    [
        Image.fromarray(RAMP.astype(np.uint16) * 257),
        Image.fromarray(RAMP.astype(np.int32) * 257),
        Image.fromarray(RAMP.astype(np.int32)),
        Image.fromarray(RAMP.astype(np.float32)),
        Image.fromarray(RAMP.astype(np.float32) / 255),
        Image.fromarray(RAMP).convert('LA'),
        Image.fromarray(RAMP).convert('P'),
    ],
    ids=lambda image: image.mode,
)
def test_grey_of_any_depth_keeps_its_steps(image):
    assert np.array_equal(grey(image), RAMP)
    assert np.array_equal(np.asarray(_ToMode(3)(image)), np.stack([RAMP] * 3, -1))


@pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
def test_files_of_sixteen_bits(tmp_path, suffix):
    for name, scale in (('dark', 3), ('bright', 257)):
        (tmp_path / name).mkdir()
        Image.fromarray(RAMP.astype(np.uint16) * scale).save(tmp_path / name / f'1.{suffix}')
    data = load_data(tmp_path, extensions=['.tif', '.pgm'])
    by_name = {data.class_names[label]: grey(image) for image, label in (data[i] for i in range(2))}
    assert np.array_equal(by_name['bright'], RAMP)
    assert by_name['dark'].max() == round(
        255 * 3 / 257
    )  # dark stays dark: the range is the format's, not the picture's


def test_values_of_no_known_range(tmp_path):
    for value in (300.0, -1.0, np.nan):
        with pytest.raises(BadImageError, match='values go from'):
            grey(Image.fromarray(np.full((4, 4), value, np.float32)))
    images = ImageData([np.full((40, 40), -5, np.float32)], [0], ['a'], 'scans')
    seen = images.with_transform(eval_transform(timm.create_model('test_resnet')))
    with pytest.raises(BadImageError, match=r'image 0 of scans: .*mode F'):
        seen[0]


def test_transparency_is_dropped_as_timm_does(tmp_path):
    rgba = Image.fromarray(np.dstack([RAMP, RAMP, RAMP, RAMP]))
    palette = Image.fromarray(RAMP).convert('P')
    palette.info['transparency'] = bytes(range(256))
    for image in (rgba, palette, rgba.convert('RGBa')):
        assert np.abs(grey(image).astype(int) - RAMP)[8:].max() <= 2


@pytest.mark.parametrize('mode', ['CMYK', 'YCbCr', 'HSV', 'LAB', '1'])
def test_colour_in_other_spaces(mode):
    colour = Image.fromarray(np.dstack([RAMP, RAMP[::-1], np.full_like(RAMP, 90)]))
    there = colour.convert(mode) if mode != 'LAB' else Image.new('LAB', (4, 4), (200, 128, 128))
    assert _ToMode(3)(there).mode == 'RGB'
    if mode == 'LAB':
        assert np.ptp(np.asarray(_ToMode(3)(there))[0, 0].astype(int)) <= 3  # neutral grey stays so


def test_a_photograph_stands_upright(tmp_path):
    picture = Image.fromarray(np.vstack([np.full((10, 30), 250, np.uint8), np.full((10, 30), 5, np.uint8)]))
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways: to be turned by 90 degrees
    (tmp_path / 'a').mkdir()
    picture.save(tmp_path / 'a' / '1.jpg', exif=exif)
    image, _ = load_data(tmp_path)[0]
    assert image.size == (20, 30) and image.getpixel((18, 5)) > 200 > 50 > image.getpixel((1, 5))


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new('L', (8, 8), value) for value in (10, 200)]
    (tmp_path / 'a').mkdir()
    for suffix in ('gif', 'png', 'webp'):
        frames[0].save(tmp_path / 'a' / f'1.{suffix}', save_all=True, append_images=frames[1:], lossless=True)
    data = load_data(tmp_path, extensions='.gif .webp')
    assert len(data) == 3 and all(grey(data[i][0]).max() <= 12 for i in range(3))


def test_arrays_with_one_channel():
    data = ImageData(RAMP[None, ..., None], [0], ['a'])
    assert np.array_equal(np.asarray(data[0][0]), RAMP)


def test_parts_by_position(images):
    assert images.select([-1])[0][1] == images[95][1]
    assert len(images.select(images.labels == 2)) == (images.labels == 2).sum()
    with pytest.raises(IndexError):
        images.select([96])
    with pytest.raises(ValueError, match='no images were selected'):
        images.select([])

"Pictures: every odd file opens right, every bad one gets one sentence with its name, and the square is CLIP's."
import io
import struct
import time
import warnings
import zlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from vl_tutor.data.images import CLIP_MEAN, CLIP_STD, centre_crop, centre_strip, clip_transform, open_image, resize_short, undo_transform

quick = settings(max_examples=40, deadline=None, derandomize=True)


def photo(w=40, h=30, seed=0):
    "Smooth colours, so that a lossy file stays near"
    y, x = np.mgrid[0:1:h*1j, 0:1:w*1j]
    return Image.fromarray(np.stack([255*x, 255*y, 120 + 100*np.sin(4*x + y + seed)], -1).astype(np.uint8))


def saved(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def near(a, b, tolerance): return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean() <= tolerance


# ---- what opens ----

@pytest.mark.parametrize('kind, tolerance', [('PNG', 0), ('BMP', 0), ('JPEG', 4), ('WEBP', 4)])
def test_four_kinds_from_path_bytes_and_pil(kind, tolerance, tmp_path):
    data = saved(photo(), kind)
    file = tmp_path/'picture.anything'                                      # the name does not matter, the content does
    file.write_bytes(data)
    for source in (data, bytearray(data), file, str(file), Image.open(io.BytesIO(data))):
        image = open_image(source)
        assert image.mode == 'RGB' and image.size == (40, 30) and near(image, photo(), tolerance)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_every_exif_turn_ends_upright(orientation, kind):
    T = Image.Transpose
    how_it_was_stored = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90,
                         7: T.TRANSVERSE, 8: T.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    stored = photo() if how_it_was_stored is None else photo().transpose(how_it_was_stored)
    image = open_image(saved(stored, kind, exif=exif))
    assert image.size == (40, 30) and near(image, photo(), 4)


def test_sixteen_bits_are_divided():
    deep = (np.arange(1200, dtype=np.uint16)*54).reshape(30, 40)
    for image in (Image.fromarray(deep), Image.open(io.BytesIO(saved(Image.fromarray(deep))))):
        assert np.array_equal(np.asarray(open_image(image))[..., 0], deep >> 8)


def png_of_16_bit_colour(w=3, h=2):
    "A 16-bit RGB PNG, which Pillow cannot write: colour (0x8001, 0x40ff, 0xff00)"
    chunk = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    line = b'\0' + struct.pack('>3H', 0x8001, 0x40ff, 0xff00)*w
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(line*h)) + chunk(b'IEND', b'')


def test_sixteen_bit_colour():
    image = open_image(png_of_16_bit_colour())
    assert image.size == (3, 2) and image.getpixel((1, 1)) == (0x80, 0x40, 0xff)


def test_transparency_lies_on_white():
    clear = photo().convert('RGBA')
    alpha = np.zeros((30, 40), np.uint8)
    alpha[:, 20:] = 255
    clear.putalpha(Image.fromarray(alpha))
    for data in (saved(clear), saved(clear, 'WEBP', lossless=True), saved(clear.convert('LA'))):
        pixels = np.asarray(open_image(data))
        assert (pixels[:, :20] == 255).all() and not (pixels[:, 20:] == 255).all()


def test_palette_with_a_transparent_colour():
    image = Image.new('P', (4, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(open_image(saved(image, transparency=0)))
    assert (pixels[1] == 255).all() and pixels[0, 1].tolist() == [200, 100, 50]
    assert np.asarray(open_image(saved(image)))[0, 0].tolist() == [10, 20, 30]


def test_grey_one_bit_and_cmyk():
    assert near(open_image(saved(photo().convert('L'))), np.asarray(photo().convert('L'))[..., None].repeat(3, 2), 0)
    assert set(np.unique(np.asarray(open_image(saved(photo().convert('1')))))) == {0, 255}
    assert near(open_image(saved(photo().convert('CMYK'), 'JPEG', quality=95)), photo(), 6)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F', 'LA', 'PA', 'RGBX', 'RGBa', 'La', 'I;16', 'I;16B'])
def test_every_mode_of_pillow(mode):
    image = open_image(Image.new(mode, (3, 2)))
    assert image.mode == 'RGB' and image.size == (3, 2)


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'MPO'])
def test_the_first_of_several_frames(kind):
    data = saved(photo(), kind, save_all=True, append_images=[photo(seed=2)])
    assert near(open_image(data), photo(), 5)


@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1), (2, 20_000), (20_000, 2)])
def test_ribbons(size):
    image = open_image(saved(Image.new('RGB', size, 'red')))
    assert image.size == size
    x = clip_transform(image, 32)
    assert x.shape == (3, 32, 32) and x.isfinite().all()
    torch.testing.assert_close(undo_transform(x)[:, 16, 16], torch.tensor([255, 0, 0], dtype=torch.uint8))


def test_arrays_and_tensors():
    pixels = np.asarray(photo())
    tensor = torch.from_numpy(pixels.copy())
    for source in (pixels, tensor, tensor.permute(2, 0, 1), pixels.transpose(2, 0, 1), np.asarray(photo().convert('RGBA'))):
        assert np.array_equal(np.asarray(open_image(source)), pixels)
    assert open_image(pixels[..., 0]).size == (40, 30)
    for bad in (torch.rand(3, 4, 4), np.zeros((2, 2, 5), np.uint8), np.zeros((0, 3, 3), np.uint8), torch.zeros(4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match='expected uint8 pixels'): open_image(bad)


# ---- what is refused ----

JPEG, PNG, WEBP, BMP = (saved(photo(200, 150), kind) for kind in ('JPEG', 'PNG', 'WEBP', 'BMP'))
BAD = {
    'poem.png': b'Shall I compare thee to a summer\'s day?', 'empty.jpg': b'', 'head.jpg': JPEG[:20], 'half.jpg': JPEG[:len(JPEG)//2],
    'half.png': PNG[:len(PNG)//2], 'half.webp': WEBP[:len(WEBP)//2], 'half.bmp': BMP[:len(BMP)//2], 'film.gif': saved(photo(), 'GIF'),
    'scan.tiff': saved(photo(), 'TIFF'), 'drawing.svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'page.eps': b'%!PS-Adobe-3.0 EPSF-3.0\n',
    'zeros.png': bytes(5000), 'broken.png': PNG[:60] + bytes(40) + PNG[100:],
    'bomb.png': saved(Image.new('1', (30_000, 30_000))), 'large.png': saved(Image.new('1', (5_001, 5_000))),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files_get_one_sentence(name, tmp_path):
    file = tmp_path/name
    file.write_bytes(BAD[name])
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                      # no warning either
        for source in (file, str(file)):
            with pytest.raises(ValueError) as error: open_image(source)
            said = str(error.value)
            assert str(file) in said and '\n' not in said and len(said) < len(str(file)) + 100, said
    with pytest.raises(ValueError, match='the picture|your upload'): open_image(BAD[name])
    with pytest.raises(ValueError, match='your upload'): open_image(BAD[name], name='your upload')
    assert time.process_time() - start < 5


@pytest.mark.parametrize('path', ['missing.png', 'no/such/folder.jpg', '', 'a'*400, 'nul\0byte.png'])
def test_paths_that_lead_nowhere(path, tmp_path):
    with pytest.raises(ValueError) as error: open_image(path if '\0' in path or not path else tmp_path/path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_folder_and_other_things(tmp_path):
    with pytest.raises(ValueError, match='is a folder'): open_image(tmp_path)
    for thing in (None, 3, ['a.png'], {'path': 'a.png'}):
        with pytest.raises(ValueError, match='a picture is a path'): open_image(thing)


def test_sentences_name_the_number():
    with pytest.raises(ValueError, match='5001×5000 pixels, more than the limit of 25 million'): open_image(BAD['large.png'])
    assert open_image(saved(Image.new('1', (5_000, 5_000)))).size == (5_000, 5_000)
    with pytest.raises(ValueError, match='limit of 0.001 million'): open_image(photo(), max_pixels=1000)


def test_size_is_looked_at_before_a_pixel_is_decoded(monkeypatch):
    def decoded(*_, **__): raise AssertionError('a pixel was decoded')
    for kind in ('PNG', 'JPEG', 'WEBP', 'BMP'):
        data = saved(photo(60, 50), kind)
        with monkeypatch.context() as m:
            m.setattr('PIL.ImageFile.ImageFile.load', decoded)
            m.setattr(Image.Image, 'convert', decoded)
            with pytest.raises(ValueError, match='60×50 pixels'): open_image(data, max_pixels=2_999)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(kind=st.sampled_from(['PNG', 'JPEG', 'WEBP', 'BMP']), flips=st.lists(st.tuples(st.floats(0, .999), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_bytes_open_or_are_refused(kind, flips):
    data = bytearray(saved(photo(20, 10), kind))
    for where, value in flips: data[int(where*len(data))] = value
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: assert open_image(data).mode == 'RGB'
        except ValueError as error: assert '\n' not in str(error)


@quick
@given(data=st.binary(max_size=200))
def test_noise_is_no_picture(data):
    with pytest.raises(ValueError, match='the picture'): open_image(data)


# ---- the square ----

@quick
@given(w=st.integers(1, 90), h=st.integers(1, 90), size=st.integers(1, 40))
def test_sizes_are_the_rule(w, h, size):
    small = resize_short(Image.new('L', (w, h)), size)
    long = int(size*max(w, h)/min(w, h))
    assert small.size == ((size, long) if w <= h else (long, size))
    assert centre_crop(small, size).size == (size, size)


@pytest.mark.parametrize('w, h', [(70, 45), (40, 61), (27, 20), (52, 40), (32, 32), (32, 57), (33, 1000)])
def test_clip_transform_is_transformers(w, h):
    from transformers import CLIPImageProcessorPil
    pixels = np.random.default_rng(w).integers(0, 256, (h, w, 3), dtype=np.uint8)
    theirs = CLIPImageProcessorPil(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32})
    want = theirs(Image.fromarray(pixels), return_tensors='pt').pixel_values[0]
    torch.testing.assert_close(clip_transform(pixels, 32), want, atol=1e-6, rtol=0)


def test_statistics_are_clips_and_can_be_others():
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    assert (CLIP_MEAN, CLIP_STD) == (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
    plain = clip_transform(photo(32, 32), 32, mean=(0., 0., 0.), std=(1., 1., 1.))
    torch.testing.assert_close(plain, torch.from_numpy(np.array(photo(32, 32))).permute(2, 0, 1)/255)


def test_undo_is_the_inverse():
    x = clip_transform(photo(64, 48), 24)
    pixels = undo_transform(x)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 24, 24)
    torch.testing.assert_close(clip_transform(pixels, 24), x, atol=1e-5, rtol=0)
    assert torch.equal(undo_transform(torch.stack([x, x]))[1], pixels)


def test_only_the_middle_of_a_ribbon_is_kept():
    ribbon = Image.new('L', (1001, 1), 0)
    ribbon.putpixel((500, 0), 255)
    kept = np.asarray(centre_strip(ribbon, 3))
    assert kept.tolist() == [[0, 255, 0]]
    assert centre_strip(photo()).size == (40, 30)

"Fog over pictures and the words that clear it"
import re
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
from vl_tutor.demos.word_maps import MOST_WORDS, fog, misplaced, seen_square, show_words, style_sheet, veiled, verdict, word_view

RED = Image.new('RGB', (60, 40), (255, 0, 0))
EVIL = ['<b>bold</b>', '<img', 'src=x', 'onerror=alert(1)>', '"quoted"', "'single'", '&amp;', '${1+1}', '{{value}}', '</style><script>alert(1)</script>']


def told(words, maps=True):
    return SimpleNamespace(text=' '.join(words), words=list(words), maps=torch.rand(len(words), 6, 6) if maps else None)


def test_fog_is_clear_where_the_model_looked():
    w = torch.zeros(4, 4)
    w[0, 3] = 1
    veil = np.array(fog(w, side=64))[..., 3]
    assert veil[4, 60] == 0 and veil[60, 4] == int(.88*255) and veil.shape == (64, 64)


@pytest.mark.parametrize('w', [torch.zeros(3, 3), torch.full((3, 3), 1/9), torch.tensor([[5.]])])
def test_fog_of_an_even_map_is_even(w):
    veil = np.array(fog(w, side=16))[..., 3]
    assert veil.min() == veil.max()


def test_fog_refuses_what_is_no_map():
    with pytest.raises(ValueError, match=r'\(2, 3, 3\)'): fog(torch.ones(2, 3, 3))


@pytest.mark.parametrize('size', [(48, 48), (640, 427), (30, 900), (1, 1)])
def test_the_square_is_what_the_model_reads(size):
    assert seen_square(Image.new('RGB', size), 96).size == (96, 96)


def test_small_pictures_keep_their_pixels():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    assert (np.array(seen_square(image, 16))[::4, ::4] == np.array(image)).all()


def test_a_looked_at_corner_keeps_its_colour():
    w = torch.zeros(2, 2)
    w[0, 0] = 1
    seen = np.array(veiled(seen_square(RED, 32), w)).astype(int)
    assert abs(seen[1, 1] - [255, 0, 0]).max() < 12 and abs(seen[-1, -1] - [255, 0, 0]).max() > 80


@pytest.mark.parametrize('word', EVIL)
def test_every_word_is_escaped(word):
    for html in (word_view(told([word, 'x']), RED), word_view(told(['x']), RED, truth=word)):
        assert not re.search(r'<(b|img|script)\b|</style>', html)
        assert set(re.findall(r'<(\w+)', html)) <= {'div', 'i', 'p', 'label', 'input', 'span'}
        quoted = re.search(r'aria-label="([^"]*)"', html)[1]
        assert '<' not in quoted and '>' not in quoted


def test_the_view_asks_nobody():
    html = word_view(told(['a', 'red', 'square']), RED, truth='a red ring')
    assert not re.search(r'https?:|//|@import|<script|<link|\son\w+=', re.sub(r'data:image/webp;base64,[\w+/=]+', '', html))
    assert html.count('type="radio"') == 4 and html.count(' checked') == 1
    assert {f'--f{k}' for k in (1, 2, 3)} == set(re.findall(r'(--f\d+):', html))


@pytest.mark.parametrize('picked', [0, 1, 2])
def test_one_word_is_picked_when_the_page_opens(picked):
    html = word_view(told(['a', 'ring']), RED, picked=picked, group='other')
    chips = re.findall(r'<label class="vlt-word w(\d)"><input type="radio" name="other"( checked)?>', html)
    assert chips == [(str(k), ' checked'*(k == picked)) for k in range(3)] and 'vlt-word"' not in html.replace('class="vlt-word', '')


def test_a_view_without_maps_still_shows_words():
    html = word_view(told(['a', 'ring'], maps=False), RED)
    assert '--f1:' not in html and 'ring' in html


def test_rules_reach_as_far_as_words_do():
    from vl_tutor.demos.captioning import CaptionDesk
    css = style_sheet()
    assert all(f'.w{k}:hover) .f{k},' in css for k in range(1, MOST_WORDS + 1))
    assert 'http' not in css and 'url(' not in css
    asked = {}
    def caption(images, **how): asked.update(how); return [told(['a'])]
    CaptionDesk(SimpleNamespace(caption=caption, model=SimpleNamespace(resampler=1))).caption(RED)
    assert asked['max_words'] <= MOST_WORDS


@pytest.mark.parametrize('said, true, wrong', [
    ('a red square', 'a red square', set()), ('a blue square', 'a red square', {1}), ('a square', 'a red square', set()),
    ('a red red square', 'a red square', {2}), ('', 'a', set()), ('x y', '', {0, 1})])
def test_misplaced_words(said, true, wrong):
    assert misplaced(said.split(), true.split()) == wrong


@pytest.mark.parametrize('text, mark', [('a small red square left of a large blue circle', 'word for word'),
                                        ('a large blue disc right of a tiny red box', '✓ true'), ('a small red ring', '✗')])
def test_verdict(text, mark):
    assert mark in verdict(text, 'a small red square left of a large blue circle') and verdict(text, None) == ''


def test_the_printed_page_has_a_cell_for_every_word(tmp_path):
    fig = show_words([told(['a', 'red', 'ring']), told(['one'])], [RED, RED], across=3)
    assert [ax.get_title() for ax in fig.axes] == ['', 'a', 'red', 'ring', '', '', '', 'one', '']
    fig.savefig(tmp_path/'x.png')

"The page in a real browser: look, roll, upload, draw, pick a word"
import io
import re
import numpy as np
import pytest
from PIL import Image
from strokes import draw, red


@pytest.fixture
def visit(watch, page):
    "Open the page, and wait for its first caption"
    def open_page(*screen):
        tab = watch(page.local_url, *screen)
        tab.locator('.vlt-text').wait_for(timeout=30_000)
        return tab
    return open_page


def picture(locator): return np.array(Image.open(io.BytesIO(locator.screenshot())).convert('RGB')).astype(int)


def settled(tab, text, timeout=20_000):
    tab.wait_for_function('t => document.querySelector(".vlt-text")?.textContent === t', arg=text, timeout=timeout)


def test_upload_click_read_pick(visit, scene, tool, tmp_path):
    tab, path = visit(), scene[0]
    tab.get_by_role('tab', name='Upload').click()
    tab.locator('#upload input[type=file]').set_input_files(path)
    tab.locator('#upload img').wait_for(timeout=20_000)
    tab.locator('#sent').click()
    said, = tool.caption([path], decoding='beam', width=4, max_words=30)
    settled(tab, said.text)
    chips = tab.locator('.vlt-word')
    assert [c.inner_text().strip() for c in chips.all()] == ['all of it', *said.words]

    stage = tab.locator('.vlt-stage')
    tab.mouse.move(1, 1)
    plain = picture(stage)
    chips.nth(2).click()
    tab.mouse.move(1, 1)                                                 # picked, no longer hovered
    tab.wait_for_function('getComputedStyle(document.querySelector(".vlt-stage .f2")).opacity === "1"')
    assert abs(picture(stage) - plain).mean() > 5, 'picking a word changes nothing in the picture'
    tab.keyboard.press('ArrowRight')                                     # and by keyboard
    tab.wait_for_function('getComputedStyle(document.querySelector(".vlt-stage .f3")).opacity === "1"')
    chips.nth(1).hover()                                                 # hovering wins over picking
    tab.wait_for_function('getComputedStyle(document.querySelector(".vlt-stage .f1")).opacity === "1"')
    tab.wait_for_function('getComputedStyle(document.querySelector(".vlt-stage .f3")).opacity === "0"')
    tab.screenshot(path=tmp_path/'page.png', full_page=True)
    assert (tmp_path/'page.png').stat().st_size > 20_000


def test_roll(visit):
    tab = visit()
    before = tab.locator('#truth textarea').input_value()
    for _ in range(3):                                                   # the same scene twice in a row is possible, not thrice
        tab.locator('#roll').click()
        tab.wait_for_timeout(1500)
        if tab.locator('#truth textarea').input_value() != before: break
    truth = tab.locator('#truth textarea').input_value()
    assert truth != before and truth.startswith('a ')
    tab.wait_for_function('t => document.querySelector(".vlt-truth").textContent.includes(t) || /word for word/.test(document.querySelector(".vlt-truth").textContent)', arg=truth)


def test_tries_and_controls(visit, desk, tool):
    tab = visit()
    tab.get_by_text('one shape', exact=True).click()
    image, truth, _ = desk.roll('shapes', 'one', 8)
    tab.wait_for_function('t => document.querySelector("#truth textarea").value === t', arg=truth)
    settled(tab, tool.caption([image], decoding='beam', width=4, max_words=30)[0].text)
    tab.get_by_label('greedy').check()
    settled(tab, tool.caption([image], decoding='greedy', max_words=30)[0].text)
    tab.get_by_label('nucleus sampling').check()
    settled(tab, tool.caption([image], decoding='nucleus', temperature=1., top_p=.9, seed=0, max_words=30)[0].text)
    assert tab.get_by_text('Temperature').is_visible() and not tab.get_by_text('Beams').is_visible()


def test_draw(visit):
    tab = visit()
    before = tab.locator('.vlt').get_attribute('style')
    tab.get_by_role('tab', name='Draw').click()
    draw(tab, '#board')
    tab.locator('#drawn').click()
    tab.wait_for_function('s => document.querySelector(".vlt").getAttribute("style") !== s', arg=before, timeout=20_000)
    tab.mouse.move(1, 1)
    shown = picture(tab.locator('.vlt-stage'))
    assert red(shown) > .01, 'the drawn stroke is not in the picture that was captioned'


def test_a_bad_upload_gets_one_sentence(visit, tmp_path):
    path = tmp_path/'notes<b>.png'
    path.write_text('these are notes')
    tab = visit()
    tab.get_by_role('tab', name='Upload').click()
    tab.locator('#upload input[type=file]').set_input_files(path)
    toast = tab.locator('.toast-body.error').first
    toast.wait_for(timeout=20_000)
    said = toast.inner_text()
    assert 'notes' in said and 'is not a JPEG, PNG, WebP or BMP picture' in said and 'Traceback' not in said
    assert tab.locator('.toast-body b').count() == 0 or '<b>' not in tab.locator('.toast-body').first.inner_html()


@pytest.mark.parametrize('width, dark', [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_fits_the_screen(visit, tmp_path, width, dark):
    tab = visit(width, 844, dark)
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    assert (tab.evaluate('getComputedStyle(document.body).backgroundColor').count('255') == 3) is not dark
    assert tab.locator('.vlt-stage').bounding_box()['width'] >= 220
    tab.screenshot(path=tmp_path/f'{width}_{dark}.png', full_page=True)
    ink = tab.evaluate('[getComputedStyle(document.querySelector(".vlt-text")).color, getComputedStyle(document.body).backgroundColor]')
    lightness = [sum(map(float, re.findall(r'[\d.]+', c)[:3])) for c in ink]
    assert abs(lightness[0] - lightness[1]) > 350, f'text hard to read: {ink}'

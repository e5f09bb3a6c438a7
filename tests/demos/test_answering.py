"The answering page through its endpoints and in a real browser; and the page that holds all pages"
import concurrent.futures as futures
import html
import io
import json
import re
import time
import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from strokes import draw, red
from vl_tutor.demos.answer_desk import AnswerDesk, average, belongs, remark, strange, true_answer, truth_of
from vl_tutor.world.tasks import make_task


@pytest.fixture(scope='module')
def client(answer_page): return Client(answer_page.local_url, verbose=False)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory, answers):
    "Two pictures of the gallery as files"
    folder = tmp_path_factory.mktemp('gallery')
    for k in (0, 1): Image.fromarray(answers.gallery[k].permute(1, 2, 0).numpy()).save(folder/f'{k}.png')
    return folder/'0.png', folder/'1.png'


def confident(label): return {c['label']: c['confidence'] for c in label['confidences']}


# ---- the desk ----

def test_without_looking_is_the_mean_over_other_pictures(answers, vlc):
    told = vlc.answer(answers.gallery, ['is there a ring ?']*len(answers.gallery), top=len(vlc.answers))
    mean = {word: np.mean([dict(a.choices)[word] for a in told]) for word in vlc.answers}
    found = answers.unseen('is there a ring ?')
    assert found == pytest.approx(mean, abs=1e-5) and list(found.values()) == sorted(found.values(), reverse=True)


def test_a_model_that_ignores_pictures_says_the_same_twice(vlc):
    from copy import deepcopy
    blind = deepcopy(vlc)
    blind.model.modality.weight.data[1] += 1e9                                                  # drowns every patch in one and the same number
    seen, unseen = AnswerDesk(blind, others=6).ask(AnswerDesk(vlc, others=1).gallery[0], 'is there a ring ?')
    assert seen == pytest.approx(unseen, abs=1e-4)


@pytest.mark.parametrize('n', range(12))
def test_the_page_knows_the_truth_of_what_it_rolls(answers, n):
    for task, key in (('question', 'answer'), ('statement_pair', 'label')):
        _, text, there, number = answers.roll(task, 'pair', n)
        truth = make_task(task, 'pair', 'test')[n][key]
        assert number == n and true_answer(text, there) == (truth if task == 'question' else ['false', 'true'][int(truth)])


def test_the_truth_follows_another_question(answers):
    _, _, there, _ = answers.roll('question', 'pair', 0)
    n = dict(zero=0, one=1, two=2)
    assert all(n[true_answer(f'How many {kind}s are there?', there)] == sum(t['kind'] == kind for t in there[0]) for kind in ('ring', 'circle', 'star'))
    assert true_answer('who are you?', there) is None and true_answer('is there a ring?', None) is None


def test_gaps_are_words_of_the_caption(answers):
    for n in range(20):
        _, text, caption, _ = answers.roll_gaps(n)
        assert text.count('[MASK]') == 3 and belongs(text, caption) and text != caption
    assert not belongs('a red ring', 'a red') and not belongs('a blue [MASK]', 'a red ring') and not belongs('x', None)


def test_every_map_is_what_explain_finds(answers, vlc):
    "Filled words: each hidden once; an answer: the one that the desk gives; both read as the tool says that they point best"
    from vl_tutor.explain.one_call import explain
    picture, text, _, _ = answers.roll_gaps(4)
    said = answers.fill(picture, text)
    read = explain(vlc, picture, said.text, 'words')
    assert said.words == read.labels and said.text == ' '.join(said.words)
    assert torch.allclose(said.maps, read.maps(**vlc.pointing('words')), atol=1e-6) and said.maps.shape == (len(said.words), 6, 6)
    for question in ('is there a ring ?', 'what colour is the leftmost thing ?'):
        why, best = answers.why(picture, question), next(iter(answers.ask(picture, question)[0]))
        assert why.words == [best] and best in why.text
        assert torch.allclose(why.maps, explain(vlc, picture, question, best).maps(**vlc.pointing('answer'))[:1], atol=1e-6)


def test_asking_why_leaves_no_trace(answers, vlc):
    learns, before = [p.requires_grad for p in vlc.model.parameters()], answers.ask(answers.gallery[0], 'is there a ring ?')
    answers.why(answers.gallery[0], 'is there a ring ?')
    assert [p.requires_grad for p in vlc.model.parameters()] == learns and all(p.grad is None for p in vlc.model.parameters())
    assert all(getattr(m, 'recorder', None) is None for m in vlc.model.modules()) and answers.ask(answers.gallery[0], 'is there a ring ?') == before


def test_unknown_words_are_named(vlc):
    assert strange(vlc.tokenizer, 'Is there a DOG or a ring?') == ['dog']
    assert strange(vlc.tokenizer, 'is there a ring ?') == []


@pytest.mark.parametrize('evil', ['<img src=x onerror=alert(1)>', '</p><script>alert(1)</script>', '"><b>'])
def test_what_a_visitor_writes_is_escaped(answers, evil):
    said = remark(answers, f'is there a {evil} ?', 'yes', evil)
    assert not re.search(r'<(img|script|b)\b', said) and set(re.findall(r'<(/?\w+)', said)) <= {'p', '/p'}


def test_small_things():
    assert list(truth_of(.2)) == ['false', 'true'] and average([]) == {}


@pytest.mark.parametrize('ask, words', [
    (lambda d: d.ask(None, 'is it red ?'), 'no picture yet'), (lambda d: d.ask(d.gallery[0], ''), 'no question yet'), (lambda d: d.ask(d.gallery[0], None), 'no question yet'),
    (lambda d: d.ask(d.gallery[0], 'red '*200), '800 characters'), (lambda d: d.ask(d.gallery[0], 'is it '*40), 'tokens'), (lambda d: d.judge(d.gallery[0], None, 'x'), 'no picture yet'),
    (lambda d: d.judge(d.gallery[0], d.gallery[1], ' '), 'no statement yet'), (lambda d: d.find(''), 'no sentence yet'), (lambda d: d.fill(d.gallery[0], 'a red ring'), 'no gap'),
    (lambda d: d.fill(None, 'a [MASK]'), 'no picture yet'), (lambda d: d.why(None, 'is it red ?'), 'no picture yet'), (lambda d: d.why(d.gallery[0], ' '), 'no question yet'), (lambda d: d.roll('question', 'sky'), 'sky')], ids=range(13))
def test_mistakes_are_one_sentence(answers, ask, words):
    with pytest.raises(ValueError, match=words) as e: ask(answers)
    assert '\n' not in str(e.value)


# ---- through the endpoints ----

def test_seven_endpoints(client):
    assert set(client.view_api(return_format='dict')['named_endpoints']) == {'/ask', '/question', '/judge', '/pair', '/find', '/fill', '/gaps'}


def test_roll_and_ask(client, answers):
    path, question, number = client.predict('pair', 5, api_name='/question')
    (image,), text, there, _ = answers.roll('question', 'pair', 5)
    assert (question, number) == (text, 5) and (np.array(Image.open(path)) == np.array(image)).all(), 'the rolled picture reaches the model as it is'
    seen, blind, note, why = client.predict(handle_file(path), question, api_name='/ask')
    mine = answers.ask(image, text)
    for label, found in zip((seen, blind), mine):
        assert label['label'] == next(iter(found)) and confident(label) == pytest.approx(dict(list(found.items())[:5]), abs=1e-4)
    assert true_answer(text, there) in note
    best = html.escape(seen['label'])
    assert f'Why {best}?' in why and why.count('name="vlq-word"') == 2 and re.search(r'class="vlt-word w1"><input [^>]*checked', why), 'its map is what one sees first'


def test_judge(client, answers, pictures):
    *files, text, number = client.predict(8, api_name='/pair')
    assert text == answers.roll('statement_pair', 'pair', 8)[1] and number == 8
    seen, blind, _ = client.predict(*map(handle_file, files), text, api_name='/judge')
    mine, others = answers.judge(*files, text)
    assert confident(seen) == pytest.approx(mine, abs=1e-4) and confident(blind) == pytest.approx(others, abs=1e-4)


def test_find(client, answers):
    wall, note = client.predict(answers.captions[3], api_name='/find')
    order = answers.find(answers.captions[3])
    assert [row['caption'] for row in wall] == [f'{k} · {score:.2f}' for k, (_, score) in enumerate(order, 1)]
    assert (np.array(Image.open(wall[0]['image']).convert('RGB')) == answers.gallery[order[0][0]].permute(1, 2, 0).numpy()).all()
    place = [i for i, _ in order].index(3) + 1
    assert re.search(rf'number {place} of 60|number \d+ of 60', note)


def test_fill(client, answers):
    path, text, number = client.predict(7, api_name='/gaps')
    line, view = client.predict(handle_file(path), text, api_name='/fill')
    said = answers.fill(path, text)
    assert ''.join(m['token'] for m in line).split() == said.words
    assert [i for i, m in enumerate(line) if m['class_or_confidence']] == [i for i, _ in said.gaps] == [i for i, w in enumerate(text.split()) if w == '[MASK]']
    assert view.count('name="vla-word"') == 1 + len(said.words) and 'class="vlt-word w3' in view


@pytest.mark.parametrize('content, words', [(b'I am a text', 'not a JPEG, PNG, WebP or BMP'), (b'', 'empty')])
def test_a_bad_file_gets_one_sentence(client, tmp_path, content, words):
    (tmp_path/'x.png').write_bytes(content)
    for name, data in (('/ask', ['is it red ?']), ('/fill', ['a [MASK]'])):
        with pytest.raises(AppError) as e: client.predict(handle_file(tmp_path/'x.png'), *data, api_name=name)
        said = str(e.value)
        assert words in said and '\n' not in said and 'Traceback' not in said and '/tmp' not in said


def test_no_file_and_no_text_get_one_sentence(client, pictures):
    with pytest.raises(AppError, match='no picture yet'): client.predict(None, 'is it red ?', api_name='/ask')
    with pytest.raises(AppError, match='no question yet'): client.predict(handle_file(pictures[0]), ' ', api_name='/ask')
    with pytest.raises(AppError, match='characters'): client.predict('x'*10_000, api_name='/find')
    with pytest.raises(AppError) as e: client.predict(handle_file(pictures[0]), '<b>hallo</b>', api_name='/fill')
    assert '<b>' not in str(e.value) and 'gap' in str(e.value)


@pytest.mark.parametrize('path', ['/etc/passwd', '../../../../etc/passwd', '%2e%2e/%2e%2e/etc/passwd', 'settings.ini', '{root}/settings.ini'])
def test_no_other_file_is_served(answer_page, path):
    from house import root
    assert httpx.get(f'{answer_page.local_url}gradio_api/file={path.format(root=root)}').status_code in (403, 404)


def test_served_to_this_machine_only(answer_page):
    assert answer_page.local_url.startswith('http://127.0.0.1:') and answer_page.share_url is None and not answer_page.share
    assert answer_page.config['analytics_enabled'] is False and answer_page.max_file_size == 10*2**20 and not answer_page.allowed_paths
    big = httpx.post(f'{answer_page.local_url}gradio_api/upload', files={'files': ('big.png', b'0'*(11*2**20))})
    assert big.status_code == 413


def test_thirty_visitors_at_once(answer_page, pictures, answers):
    def visit(_):
        with httpx.Client(base_url=answer_page.local_url, timeout=120) as web:
            sent = web.post('gradio_api/upload', files={'files': ('scene.png', pictures[0].read_bytes())}).raise_for_status().json()[0]
            data = [dict(path=sent, orig_name='scene.png', meta={'_type': 'gradio.FileData'}), 'is there a ring ?']
            event = web.post('gradio_api/call/ask', json=dict(data=data)).raise_for_status().json()['event_id']
            stream = web.get(f'gradio_api/call/ask/{event}').text
        assert 'event: complete' in stream, stream[-300:]
        return json.loads(stream.split('data: ')[-1])[0]['label']
    started = time.time()
    with futures.ThreadPoolExecutor(30) as pool: said = set(pool.map(visit, range(30)))
    assert said == {next(iter(answers.ask(pictures[0], 'is there a ring ?')[0]))} and time.time() - started < 100


# ---- in a browser ----

@pytest.fixture
def visit(watch, answer_page):
    "Open the page, and wait for its first answer"
    def open_page(*screen):
        tab = watch(answer_page.local_url, *screen)
        tab.locator('#ask-seen h2').wait_for(timeout=60_000)
        return tab
    return open_page


def value(tab, name): return tab.locator(f'#{name} textarea').input_value()
def go(tab, name): tab.get_by_role('tab', name=name, exact=True).click()
def best(tab, name, text): tab.wait_for_function('([n, t]) => document.querySelector(`#${n} h2`)?.textContent.trim() === t', arg=[name, text], timeout=60_000)


def test_type_a_question(visit, answers):
    tab = visit()
    (image,), question, there, _ = answers.roll('question', 'pair', 28)
    assert value(tab, 'question') == question
    tab.locator('#question textarea').fill('how many rings are there?')
    tab.locator('#ask').click()
    seen, blind = answers.ask(image, 'how many rings are there?')
    best(tab, 'ask-seen', next(iter(seen)))
    best(tab, 'ask-blind', next(iter(blind)))
    tab.wait_for_function('t => document.querySelector("#ask-view .vlt-text").textContent === t', arg=f'Why {next(iter(seen))}?')
    tab.mouse.move(1, 1)
    tab.wait_for_function('getComputedStyle(document.querySelector("#ask-view .vlt-stage .f1")).opacity === "1"')               # its map, unasked
    tab.locator('#ask-view .vlt-word').first.click()
    tab.mouse.move(1, 1)
    tab.wait_for_function('getComputedStyle(document.querySelector("#ask-view .vlt-stage .f1")).opacity === "0"')
    tab.wait_for_function('t => document.querySelector("#ask-note").textContent.includes(t)', arg=true_answer('how many rings are there?', there))
    tab.locator('#question textarea').fill('where is the dog?')
    tab.keyboard.press('Enter')
    tab.wait_for_function('() => /never read:.*dog/.test(document.querySelector("#ask-note").textContent)', timeout=60_000)


def test_roll_try_and_upload(visit, answers, pictures):
    tab = visit()
    before = value(tab, 'question')
    for _ in range(3):
        tab.locator('#ask-roll').click()
        tab.wait_for_timeout(1500)
        if value(tab, 'question') != before: break
    assert value(tab, 'question') != before
    tab.locator('#ask-picture').get_by_label(re.compile('Clear|Remove')).first.click()
    tab.locator('#ask-picture input[type=file]').set_input_files(pictures[1])
    tab.locator('#ask-picture img').wait_for(timeout=60_000)
    tab.locator('#question textarea').fill('is there a star ?')
    tab.locator('#ask').click()
    best(tab, 'ask-seen', next(iter(answers.ask(pictures[1], 'is there a star ?')[0])))
    tab.wait_for_function('() => !document.querySelector("#ask-note").textContent.includes("answer")')          # nobody knows the truth about it


def test_draw_and_ask(visit):
    tab = visit()
    go(tab, 'Draw')
    draw(tab, '#ask-board')
    tab.locator('#ask-drawn').click()
    tab.locator('#ask-picture img').wait_for(timeout=60_000, state='visible')
    tab.wait_for_function('() => document.querySelector("#ask-picture img").naturalWidth > 300', timeout=60_000)
    shown = np.array(Image.open(io.BytesIO(tab.locator('#ask-picture img').screenshot())).convert('RGB')).astype(int)
    assert red(shown) > .01, 'the drawn stroke is not in the picture'


def test_two_pictures(visit, answers):
    tab = visit()
    go(tab, 'Two pictures')
    pair, text, there, _ = answers.roll('statement_pair', 'pair', 5)
    tab.wait_for_function('t => document.querySelector("#statement textarea").value === t', arg=text)
    best(tab, 'pair-seen', next(iter(answers.judge(*pair, text)[0])))
    tab.locator('#statement textarea').fill('both pictures show a ring')
    tab.locator('#judge').click()
    best(tab, 'pair-seen', next(iter(answers.judge(*pair, 'both pictures show a ring')[0])))
    truth = true_answer('both pictures show a ring', there)
    tab.wait_for_function('t => document.querySelector("#pair-note").textContent.includes(t)', arg=truth)


def test_find_in_words(visit, answers):
    tab = visit()
    go(tab, 'Find')
    tab.locator('#query textarea').fill(answers.captions[9])
    tab.locator('#find').click()
    first = f'1 · {answers.find(answers.captions[9])[0][1]:.2f}'
    tab.wait_for_function('t => document.querySelector("#wall .caption-label")?.textContent.trim() === t', arg=first, timeout=60_000)
    assert tab.locator('#wall .caption-label').count() == 60 and 'of 60' in tab.locator('#find-note').inner_text()


def test_fill_and_pick(visit, answers):
    tab = visit()
    go(tab, 'Fill in')
    tab.locator('#fill-view .vlt-stage').wait_for(timeout=60_000)
    picture, text, _, _ = answers.roll_gaps(7)
    assert tab.locator('#fill-view .vlt-text').inner_text() == answers.fill(picture, text).text
    tab.locator('#fill-view .vlt-word').nth(3).click()
    tab.mouse.move(1, 1)
    tab.wait_for_function('getComputedStyle(document.querySelector("#fill-view .vlt-stage .f3")).opacity === "1"')
    tab.locator('#gaps textarea').fill('a red ring')
    tab.locator('#fill').click()
    toast = tab.locator('.toast-body.error').first
    toast.wait_for(timeout=60_000)
    assert 'has no gap' in toast.inner_text() and 'Traceback' not in toast.inner_text()


@pytest.mark.parametrize('width, dark', [(1280, False), (390, True)])
def test_it_fits_the_screen(visit, tmp_path, width, dark):
    tab = visit(width, 844, dark)
    for name in ('Ask', 'Two pictures', 'Find', 'Fill in'):
        go(tab, name)
        tab.wait_for_timeout(600)
        assert tab.evaluate('document.documentElement.scrollWidth') <= width, name
        tab.screenshot(path=tmp_path/f'{name}_{width}.png', full_page=True)
        assert (tmp_path/f'{name}_{width}.png').stat().st_size > 15_000


def test_all_pages_in_one(watch, tool, vlc, answers, desk):
    "Both pages work side by side, each with its own names"
    from copy import deepcopy
    from vl_tutor.demos.answering import launch_page
    demo = launch_page('all', deepcopy(tool), deepcopy(vlc), wait=False)
    try:
        assert set(Client(demo.local_url, verbose=False).view_api(return_format='dict')['named_endpoints']) == {
            '/caption', '/roll', '/ask', '/question', '/judge', '/pair', '/find', '/fill', '/gaps'}
        tab = watch(demo.local_url)
        tab.locator('.vlt-text').first.wait_for(timeout=60_000)                                       # the captioner's first caption
        go(tab, 'Questions')
        tab.locator('#ask-seen h2').wait_for(timeout=60_000)
        names = tab.evaluate('[...document.querySelectorAll("[id]")].map(e => e.id).filter(id => !/^component|^range|^svelte/.test(id))')
        mine = [n for n in names if n in ('ask', 'question', 'board', 'ask-board', 'upload', 'roll', 'caption', 'view', 'wall')]
        assert len(mine) == len(set(mine)), mine
    finally: demo.close()


def test_a_page_that_is_none():
    from vl_tutor.demos.answering import launch_page
    with pytest.raises(ValueError, match='shop'): launch_page('shop')


# ---- with the bundled weights ----

def test_the_bundled_weights_look_and_find():
    "The one test here that depends on what was learned: right answers need the picture, captions find theirs"
    from vl_tutor.recipes.vlc import load_vlc
    desk = AnswerDesk(load_vlc())
    told = []
    for n in range(80):
        (image,), question, there, _ = desk.roll('question', 'pair', n)
        seen, blind = desk.ask(image, question)
        truth = true_answer(question, there)
        told.append((next(iter(seen)) == truth, next(iter(blind)) == truth))
    seen, blind = map(sum, zip(*told))
    assert seen >= 52 and seen >= blind + 16, (seen, blind)
    assert sum(desk.find(desk.captions[i])[0][0] == i for i in range(10)) >= 6

"The page through its endpoints: captions, scenes, bad files, fifty visitors, and nothing served that is not its own"
import concurrent.futures as futures
import io
import json
import os
import socket
import subprocess
import sys
import time
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image


@pytest.fixture(scope='module')
def client(page): return Client(page.local_url, verbose=False)


def test_two_endpoints_and_no_more(client):
    assert set(client.view_api(return_format='dict')['named_endpoints']) == {'/caption', '/roll'}


def test_a_caption(client, scene, tool, desk):
    text, html = client.predict(handle_file(scene[0]), 'greedy', 4, 1., .9, 0, api_name='/caption')
    said, = tool.caption([scene[0]], decoding='greedy', max_words=30)
    assert text == said.text and 'class="vlt-word' in html
    assert html.count('type="radio"') == 1 + len(said.words)


def test_a_scene(client, desk):
    truth, number, path = client.predict('digits', 'pair', 5, api_name='/roll')
    image, expected, _ = desk.roll('digits', 'pair', 5)
    assert truth == expected and number == 5
    assert (np.array(Image.open(path)) == np.array(image)).all()


def test_another_scene_every_time(desk):
    assert len({desk.roll('shapes', 'pair', -1)[2] for _ in range(8)}) > 1


def test_a_seed_repeats_a_draw(client, scene):
    draw = lambda seed: client.predict(handle_file(scene[0]), 'nucleus', 4, 2., 1., seed, api_name='/caption')[0]
    assert draw(1) == draw(1) and len({draw(k) for k in range(5)}) > 1


def broken(kind):
    file = io.BytesIO()
    if kind == 'text.png': return b'I am a text'
    if kind == 'empty.png': return b''
    if kind == 'bomb.png':
        Image.new('1', (30_000, 30_000)).save(file, 'PNG')
        return file.getvalue()
    Image.effect_noise((200, 200), 50).save(file, 'GIF' if kind.endswith('gif') else 'JPEG')
    return file.getvalue()[:1500] if kind == 'cut.jpg' else file.getvalue()


@pytest.mark.parametrize('name, words', [('text.png', 'not a JPEG, PNG, WebP or BMP'), ('empty.png', 'empty'), ('bomb.png', 'million'),
                                         ('cut.jpg', 'damaged'), ('moving.gif', 'not a JPEG, PNG, WebP or BMP')])
def test_a_bad_file_gets_one_sentence(client, tmp_path, name, words):
    path = tmp_path/name
    path.write_bytes(broken(name))
    with pytest.raises(AppError) as e: client.predict(handle_file(path), 'greedy', 4, 1., .9, 0, api_name='/caption')
    said = str(e.value)
    assert words in said and name in said and '\n' not in said and 'Traceback' not in said and '/tmp' not in said


def test_no_file_gets_one_sentence(client):
    with pytest.raises(AppError, match='no picture yet'): client.predict(None, 'greedy', 4, 1., .9, 0, api_name='/caption')


def test_a_file_name_is_text(client, tmp_path):
    path = tmp_path/'<img src=x onerror=alert(1)>.png'
    path.write_bytes(b'no picture')
    with pytest.raises(AppError) as e: client.predict(handle_file(path), 'greedy', 4, 1., .9, 0, api_name='/caption')
    assert '<' not in str(e.value)


@pytest.mark.parametrize('mode', ['L', 'P', 'CMYK', 'RGBA', 'I;16', '1'])
def test_every_kind_of_picture(client, tmp_path, mode):
    path = tmp_path/('x.jpg' if mode == 'CMYK' else 'x.png')
    grey = Image.effect_noise((64, 48), 60)
    image = Image.fromarray(np.array(grey).astype(np.uint16)*256) if mode == 'I;16' else grey.convert('RGB').convert(mode)
    image.save(path)
    assert isinstance(client.predict(handle_file(path), 'greedy', 4, 1., .9, 0, api_name='/caption')[0], str)


def test_an_upload_has_a_limit(page):
    big = httpx.post(f'{page.local_url}gradio_api/upload', files={'files': ('big.png', b'0'*(11*2**20))})
    assert big.status_code == 413


@pytest.mark.parametrize('path', ['/etc/passwd', '../../../../etc/passwd', '..%2f..%2f..%2fetc%2fpasswd', '%2e%2e/%2e%2e/etc/passwd', 'settings.ini',
                                  'vl_tutor/__init__.py', '{root}/settings.ini', '{root}/vl_tutor/../settings.ini', 'C:/Windows/win.ini', '//etc/passwd'])
def test_no_other_file_is_served(page, path):
    from house import root
    r = httpx.get(f'{page.local_url}gradio_api/file={path.format(root=root)}', follow_redirects=False)
    assert r.status_code in (403, 404), (r.status_code, r.text[:200])


def test_no_picture_is_read_from_this_machine_by_its_path(page):
    "A visitor may send files, not name ours"
    from house import root
    r = httpx.post(f'{page.local_url}gradio_api/call/caption', json=dict(data=[dict(path=str(root/'docs/images/x.png'), meta={'_type': 'gradio.FileData'}), 'greedy', 4, 1, .9, 0]))
    if r.status_code == 200:
        stream = httpx.get(f'{page.local_url}gradio_api/call/caption/{r.json()["event_id"]}', timeout=30).text
        assert 'event: error' in stream and 'event: complete' not in stream
    else: assert r.status_code >= 400


def test_served_to_this_machine_only(page):
    assert page.local_url.startswith('http://127.0.0.1:') and page.share_url is None and not page.share
    assert page.config['analytics_enabled'] is False and os.environ['GRADIO_ANALYTICS_ENABLED'] == 'False'
    assert page.max_file_size == 10*2**20 and not page.allowed_paths
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)} - {'127.0.0.1', '127.0.1.1', '::1'}
    for host in others:
        with socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET) as s:
            s.settimeout(2)
            assert s.connect_ex((host, page.server_port)) != 0, f'the page answers at {host}'


def visit(url, picture):
    "One visitor, from upload to caption: what the page's own script does"
    with httpx.Client(base_url=url, timeout=120) as web:
        sent = web.post('gradio_api/upload', files={'files': ('scene.png', picture)}).raise_for_status().json()[0]
        data = [dict(path=sent, orig_name='scene.png', meta={'_type': 'gradio.FileData'}), 'greedy', 1, 1., .9, 0]
        event = web.post('gradio_api/call/caption', json=dict(data=data)).raise_for_status().json()['event_id']
        stream = web.get(f'gradio_api/call/caption/{event}').text
    assert 'event: complete' in stream, stream[-300:]
    return json.loads(stream.split('data: ')[-1])[0]


def test_fifty_visitors_at_once(page, scene, tool):
    started, picture = time.time(), scene[0].read_bytes()
    with futures.ThreadPoolExecutor(50) as pool: said = list(pool.map(lambda _: visit(page.local_url, picture), range(50)))
    assert set(said) == {tool.caption([scene[0]], decoding='greedy', max_words=30)[0].text}
    assert time.time() - started < 100


def test_nothing_is_looked_up_outside():
    "Building and serving the page asks for no other host"
    code = '''
import socket
asked, real = set(), socket.getaddrinfo
def watch(host, *a, **k):
    asked.add(host.decode() if isinstance(host, bytes) else host); return real(host, *a, **k)
socket.getaddrinfo = watch
import torch
from vl_tutor.models.captioner import SIZES, Captioner
from vl_tutor.recipes.captioner import CaptionTool
from vl_tutor.world.language import world_tokenizer
from vl_tutor.demos.captioning import launch_demo
demo = launch_demo(CaptionTool(Captioner(SIZES['tiny']).eval(), world_tokenizer(), {}), wait=False)
demo.close()
assert asked <= {'127.0.0.1', 'localhost', '0.0.0.0', None, ''}, asked
'''
    env = {k: v for k, v in os.environ.items() if k != 'GRADIO_ANALYTICS_ENABLED'}
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=180, env=env)
    assert r.returncode == 0, r.stderr[-1500:]


def test_one_visitor_at_a_time_watches_the_model(desk, scene, tool):
    "Word maps of captions made in parallel are the maps of captions made one by one"
    alone = desk.caption(scene[0])
    with futures.ThreadPoolExecutor(4) as pool: assert all(r == alone for r in pool.map(lambda _: desk.caption(scene[0]), range(8)))
    assert all(getattr(m, 'recorder', None) is None for m in tool.model.modules())


@pytest.mark.parametrize('how, words', [(dict(skin='cats'), 'cats'), (dict(level='sky'), 'sky')])
def test_a_wrong_scene_gets_one_sentence(desk, how, words):
    with pytest.raises(ValueError, match=words): desk.roll(**how)


@pytest.mark.parametrize('skin', ['shapes', 'digits'])
def test_the_bundled_weights_read_what_the_page_rolls(skin):
    from vl_tutor.demos.captioning import CaptionDesk
    from vl_tutor.recipes.captioner import load_captioner
    desk = CaptionDesk(load_captioner())
    right = []
    for number in range(20):
        image, truth, _ = desk.roll(skin, 'pair', number)
        text, html = desk.caption(image, 'greedy', truth=truth)
        right.append(text == truth)
        assert ('word for word' in html) == (text == truth)
    assert sum(right) >= 12

"Untrained models, running pages on them, a watched browser: shared by all tests of the demos"
import re
import pytest
import torch


@pytest.fixture(scope='session')
def tool():
    "A captioner that never learned anything: what is tested is the page, not the captions"
    from vl_tutor.models.captioner import SIZES, Captioner
    from vl_tutor.recipes.captioner import CaptionTool
    from vl_tutor.world.language import world_tokenizer
    torch.manual_seed(0)
    model = Captioner(SIZES['tiny']).eval()
    with torch.no_grad():
        for block in model.gated.values(): block.gate_attn.fill_(.5)      # doors open, so that words look somewhere
    return CaptionTool(model, world_tokenizer(), {})


@pytest.fixture(scope='session')
def desk(tool):
    from vl_tutor.demos.captioning import CaptionDesk
    return CaptionDesk(tool)


@pytest.fixture(scope='session')
def page(tool):
    "A running demo, on a copy of the captioner: the page has it to itself, and tests may use theirs meanwhile"
    from copy import deepcopy
    from vl_tutor.demos.captioning import launch_demo
    demo = launch_demo(deepcopy(tool), wait=False)
    yield demo
    demo.close()


@pytest.fixture(scope='session')
def scene(tmp_path_factory, desk):
    "A scene on disk, and the truth about it"
    path = tmp_path_factory.mktemp('pictures')/'scene.png'
    image, truth, _ = desk.roll('shapes', 'pair', 3)
    image.resize((240, 240), 0).save(path)
    return path, truth


@pytest.fixture(scope='session')
def vlc():
    "A VLC that never learned anything: what is tested is the page, not the answers"
    from dataclasses import replace
    from vl_tutor.models.vlc import VLC, init_vlc
    from vl_tutor.recipes.train_vlc import TINY
    from vl_tutor.recipes.vlc import VLCTool
    from vl_tutor.world.questions import ANSWERS
    from vl_tutor.world.tasks import task_tokenizer
    words = task_tokenizer()
    model = init_vlc(VLC(replace(TINY, vocab_size=words.vocab_size)), 0).eval()
    with torch.no_grad():
        for head in (model.heads['vqa'], model.heads['nlvr2']): head[-1].weight.mul_(20)      # far from even, so that the order of answers is no accident of rounding
    return VLCTool(model, words, list(ANSWERS), {})


@pytest.fixture(scope='session')
def answers(vlc):
    from vl_tutor.demos.answer_desk import AnswerDesk
    return AnswerDesk(vlc)


@pytest.fixture(scope='session')
def answer_page(vlc):
    "The answering page, running, on a copy of the model"
    from copy import deepcopy
    from vl_tutor.demos.answering import launch_page
    demo = launch_page('answer', vlc=deepcopy(vlc), wait=False)
    yield demo
    demo.close()


@pytest.fixture
def watch(browser):
    "Open a page in the browser; afterwards nothing may have gone wrong, and nobody else may have been asked"
    contexts, seen = [], []
    def open_page(url, width=1280, height=900, dark=False):
        context = browser.new_context(viewport=dict(width=width, height=height), color_scheme='dark' if dark else 'light')
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        tab.on('request', lambda r: seen.append(('request', r.url)) if not re.match(r'data:|blob:|http://127\.0\.0\.1[:/]', r.url) else None)
        tab.on('pageerror', lambda e: seen.append(('page error', str(e))))
        tab.on('console', lambda m: seen.append(('console', m.text)) if m.type == 'error' and 'status of 4' not in m.text else None)
        tab.goto(url + ('?__theme=dark' if dark else ''))
        return tab
    yield open_page
    for context in contexts: context.close()
    assert not seen, seen

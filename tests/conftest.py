"Tests run without a network, without a screen and on few threads; two of them need a copy of the project, made once."
import os
import shutil
import pytest
import torch
from house import make, root

for name, value in dict(OMP_NUM_THREADS='2', MPLBACKEND='Agg', HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', GRADIO_ANALYTICS_ENABLED='False',
                        HF_HUB_DISABLE_TELEMETRY='1', TOKENIZERS_PARALLELISM='false').items(): os.environ.setdefault(name, value)


@pytest.fixture
def one_thread():
    "The same sums on every machine"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def project(tmp_path_factory):
    "A copy of everything but the tests, free to be changed"
    copy = tmp_path_factory.mktemp('project')
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'Makefile', 'README.md', 'LICENSE'): shutil.copy(root/name, copy)
    skip = shutil.ignore_patterns('__pycache__', '_build', '.ipynb_checkpoints')
    for name in ('nbs', 'vl_tutor', 'docs'): shutil.copytree(root/name, copy/name, ignore=skip)
    return copy


@pytest.fixture(scope='session')
def site(project):
    "The built site, made by the README's command"
    make('docs', cwd=project)
    return project/'docs'/'_build'/'html'


@pytest.fixture(scope='session')
def browser():
    "One Chromium for all: playwright runs once in a process"
    from playwright.sync_api import sync_playwright
    chromium = os.environ.get('VL_TUTOR_CHROMIUM') or shutil.which('chromium') or '/usr/bin/chromium'
    assert os.path.exists(chromium), f'no browser at {chromium}: apt-get install chromium'
    with sync_playwright() as p:
        one = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--use-gl=swiftshader', '--disable-dev-shm-usage'])
        yield one
        one.close()

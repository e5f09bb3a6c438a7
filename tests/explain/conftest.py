"Three explanations of one picture: a caption's words, hidden words, a match"
import pytest
from one_scene import IMAGE, TEXT
from vl_tutor.explain.one_call import explain
from vl_tutor.recipes.captioner import load_captioner
from vl_tutor.recipes.vlc import load_vlc


@pytest.fixture(scope='module')
def said(): return explain(load_captioner(), IMAGE, TEXT)
@pytest.fixture(scope='module')
def hidden(): return explain(load_vlc(), IMAGE, TEXT)
@pytest.fixture(scope='module')
def match(): return explain(load_vlc(), IMAGE, TEXT, 'match')

"Anything with the usual field names can be drawn; nobody who does not look does better than the commonest answer."
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import pytest
import torch
from vl_tutor.world.gallery import GAP, blind, boxes_of, pictures_of, quiz, show_sample, show_tasks, strip, words_of
from vl_tutor.world.scenes import LEVELS
from vl_tutor.world.tasks import TASKS, make_task


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def strip_ref(pictures):
    "Pixel by pixel"
    n, _, h, w = pictures.shape
    out = torch.full((3, h, n*(w + GAP) - GAP), 255, dtype=torch.uint8)
    for i in range(n):
        for x in range(w): out[:, :, i*(w + GAP) + x] = pictures[i, :, :, x]
    return out


@pytest.mark.parametrize('n', [1, 2, 8])
def test_strip(n):
    pictures = torch.randint(256, (n, 3, 5, 7), dtype=torch.uint8)
    assert strip(pictures).equal(strip_ref(pictures))


@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('name', list(TASKS))
def test_every_task_is_shown_with_its_truth(name, level):
    sample = make_task(name, level, skin='mixed')[3]
    ax = show_sample(sample)
    n, _, h, w = pictures_of(sample).shape
    assert ax.images[0].get_array().shape[:2] == (h, n*(w + GAP) - GAP)
    assert len(boxes_of(sample)) > 0 and len(ax.patches) == len(boxes_of(sample)) + ('box' in sample)
    for frame in ax.patches: assert -1 <= frame.get_x() and frame.get_x() + frame.get_width() <= n*(w + GAP) and 0 < frame.get_height() <= h
    assert ax.get_title().replace('\n', ' ').replace(' ', '') == words_of(sample).replace(' ', '') != ''
    assert not show_sample(sample, truth=False).patches


def test_the_true_box_is_drawn_last_and_twice():
    ax = show_sample(make_task('referring')[0])
    assert [p.get_edgecolor()[:3] for p in ax.patches[-2:]] == [(1, 1, 1), (0, 0, 0)]
    box = make_task('referring')[0]['box']
    assert abs(ax.patches[-1].get_x() - float(box[0]) + .5) < 1e-5 and abs(ax.patches[-1].get_width() - float(box[2] - box[0])) < 1e-5


def test_samples_from_files_are_shown_too():
    "No scenes, other sizes, boxes as a list of things"
    image = torch.zeros(3, 20, 33, dtype=torch.uint8)
    assert show_sample(dict(image=image, caption='black', captions=['black'])).get_title() == 'black'
    ax = show_sample(dict(image=image, expression='it', box=torch.tensor([1., 2, 9, 9]), boxes=torch.tensor([[1., 2, 9, 9], [0, 0, 0, 0]])))
    assert len(ax.patches) == 3                                                                # one known box, the true one twice
    assert show_sample(dict(pair=torch.stack([image]*2), text='same', label=torch.tensor(1))).get_title().endswith('true')


@pytest.mark.parametrize('level', LEVELS)
def test_show_tasks(level):
    fig = show_tasks(level=level, skin='mixed')
    assert sorted(ax.get_title().split('\n')[0].replace(' ', '_') for ax in fig.axes) == sorted(TASKS)
    assert len(show_tasks(['label'], level).axes) == 1


def test_nothing_to_show():
    with pytest.raises(ValueError, match='fields text, label has nothing to show'): show_sample(dict(text='a', label=1))


@pytest.mark.parametrize('name', [n for n in TASKS if n not in ('caption', 'paraphrase', 'clip_caption')])
def test_nobody_answers_without_looking(name):
    got = blind(name, 'pair', n=6000, new=3000, skin='mixed')
    assert 0 < got['majority'] < .6 and got['text'] <= got['majority'] + .02 + 2*(.25/3000)**.5, got


def test_quiz():
    found = make_task('question', 'few').texts(range(20))
    assert quiz(found) == (found['question'], found['answer'], found['answer_type'])
    found = make_task('clip_question', 'pair').texts(range(40))
    assert all(o[i] == a for o, i, a in zip(found['options'], quiz(found)[1], found['answer']))
    assert quiz(make_task('label').texts(range(3)))[0] == ['']*3

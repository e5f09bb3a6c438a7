"The viewer without a browser: values are set, bytes are compared with figures made by hand"
import io
import numpy as np
import pytest
import torch
from one_scene import BOXES
from PIL import Image
from vl_tutor.explain.figures import show_explanation, show_patch, times_even
from vl_tutor.explain.one_call import METHODS, TABLE, explain
from vl_tutor.explain.viewer import SHARP, GateViewer, Viewer, gate_runs, gate_steps, knobs, png_bytes, show_gates, usable


def by_hand(viewer, **how):
    "What the pictures must be"
    method = viewer.method.value
    one = show_explanation(viewer.ex, method, words=[viewer.word.value], across=2, boxes=viewer.boxes, **how)
    return png_bytes(one, dpi=SHARP), png_bytes(show_patch(viewer.ex, viewer.row.value, viewer.column.value, method=method, **how))


def shown(viewer): return viewer.map.value, viewer.words.value


@pytest.mark.parametrize('which', ['said', 'hidden', 'match'])
def test_it_begins_with_relevance_and_the_largest_patch(which, request):
    ex = request.getfixturevalue(which)
    viewer = Viewer(ex, boxes=BOXES)
    best = ex.maps('relevance')[0]
    assert shown(viewer) == by_hand(viewer) and viewer.method.value == 'relevance'
    assert divmod(best.argmax().item(), 6) == (viewer.row.value, viewer.column.value)
    assert [name for name, _ in viewer.word.options] == ex.labels


@pytest.mark.parametrize('method', METHODS)
def test_every_choice_is_drawn_as_by_hand(said, method):
    viewer = Viewer(said)
    viewer.word.value, viewer.row.value, viewer.column.value = 9, 2, 4
    viewer.method.value = method
    assert shown(viewer) == by_hand(viewer)
    has, how = knobs(said, method), {}
    if has['layers']: viewer.layer.value = how['layer'] = has['layers'] - 1
    if has['heads']: viewer.head.value = how['head'] = 1
    if has['looks']: viewer.depth.value = how['depth'] = 7
    assert shown(viewer) == by_hand(viewer, **how) and viewer.chosen() == how
    assert (viewer.layer.disabled, viewer.head.disabled, viewer.depth.disabled) == tuple(not has[k] for k in ('layers', 'heads', 'looks'))


def test_each_control_changes_what_it_should(hidden):
    viewer = Viewer(hidden, method='attention')
    for name, value, changes in (('word', 3, (1, 0)), ('row', 4, (0, 1)), ('column', 0, (0, 1)), ('layer', 2, (1, 1)), ('head', 1, (1, 1))):
        before = shown(viewer)
        if getattr(viewer, name).value == value: value += 1
        getattr(viewer, name).value = value
        assert tuple(int(a != b) for a, b in zip(before, shown(viewer))) == changes, name


def test_setting_the_same_value_draws_nothing(hidden, monkeypatch):
    viewer, drawn = Viewer(hidden), []
    monkeypatch.setattr(Viewer, 'draw', lambda self: drawn.append(1))
    viewer.word.value = viewer.word.value; assert not drawn
    viewer.word.value = 2; assert len(drawn) == 1
    viewer.method.value = 'attention'; assert len(drawn) == 2                  # new layers and heads are no reason to draw again
    with viewer.still_while(): viewer.word.value = 5
    assert len(drawn) == 2


def test_a_choice_is_kept_where_it_still_exists(said):
    viewer = Viewer(said, method='gradcam')
    viewer.layer.value = 3
    viewer.method.value = 'attention'; assert viewer.layer.value is None       # attention has layers 0 and 1
    viewer.layer.value = 1
    viewer.method.value = 'gradient'; assert viewer.layer.value == 1
    viewer.method.value = 'rollout'; viewer.depth.value = 6
    viewer.method.value = 'relevance'; assert viewer.depth.value == 6
    viewer.method.value = 'attention'; viewer.method.value = 'rollout'; assert viewer.depth.value == len(said.looks)


def test_depth_without_a_way_is_said_and_not_raised(said):
    viewer = Viewer(said, method='rollout')
    viewer.depth.value = 1
    assert 'reaches' in viewer.told.value
    assert np.array(Image.open(io.BytesIO(viewer.map.value)).convert('L')).min() == 255
    viewer.depth.value = viewer.depth.max
    assert shown(viewer) == by_hand(viewer) and 'reaches' not in viewer.told.value


def test_the_sentence_tells_word_patch_and_share(hidden):
    viewer = Viewer(hidden, method='attention')
    viewer.word.value, viewer.row.value, viewer.column.value = 3, 1, 1
    share = times_even(hidden, 'attention')[3, 1, 1]
    assert viewer.told.value.startswith(f'star: patch (1, 1) gets {share:.1f} times an even share. Attention, largest patch')


def test_words_are_foreign_text(hidden):
    ex = explain(hidden.case)
    case = ex.case.__class__(**{**vars(ex.case), 'labels': ['<script>', *ex.labels[1:]]})
    ex.case = case
    viewer = Viewer(ex)
    assert '&lt;script&gt;' in viewer.told.value and '<script>' not in viewer.told.value


def test_the_largest_patch_is_found_again(hidden):
    viewer = Viewer(hidden)
    viewer.word.value = 3; viewer.point()
    assert divmod(hidden.maps()[3].argmax().item(), 6) == (viewer.row.value, viewer.column.value)


def test_usable_leaves_out_what_has_no_map(said):
    blind = [i for i, l in enumerate(said.looks) if l.asks == 'text']
    only_text = explain(said.case, looks=blind)
    assert usable(said) == list(METHODS) and usable(only_text) == []
    with pytest.raises(ValueError, match='no way to a patch'): Viewer(only_text)
    with pytest.raises(ValueError, match='no map by'): Viewer(said, method='magic')


@pytest.mark.parametrize('method', [None, 'relevance', 'gradient'])
def test_a_model_that_has_changed_is_told(method):
    from test_figures import changed
    ex = changed()
    viewer = Viewer(ex, method=method)
    assert viewer.told.value == 'the model has changed since it was run: explain it again'
    assert np.array(Image.open(io.BytesIO(viewer.map.value)).convert('L')).min() == 255
    viewer.method.value = 'attention'
    assert shown(viewer) == by_hand(viewer) and 'changed' not in viewer.told.value


def test_knobs(said, hidden):
    assert knobs(said, 'attention') == dict(layers=2, heads=4, looks=0) and knobs(said, 'gradcam') == dict(layers=4, heads=0, looks=0)
    for method in TABLE: assert knobs(hidden, method) == dict(layers=0, heads=4, looks=6)


def test_the_panel_holds_every_control_and_both_pictures(hidden):
    viewer = Viewer(hidden)
    above, pictures, told = viewer.panel.children
    assert [w for box in above.children for w in box.children] == viewer.controls and pictures.children == (viewer.map, viewer.words) and told is viewer.told


def test_a_still_shows_both_pictures(hidden):
    viewer = Viewer(hidden)
    page = np.array(Image.open(io.BytesIO(viewer.still())))
    left, right = (np.array(Image.open(io.BytesIO(v)).convert('RGB')) for v in shown(viewer))
    top = (page.shape[0] - left.shape[0])//2
    assert (page[top:top + left.shape[0], :left.shape[1]] == left).all() and page.shape[1] == left.shape[1] + right.shape[1]


def test_it_shows_itself_in_a_notebook(hidden, monkeypatch):
    seen = []
    monkeypatch.setattr('IPython.display.display', seen.append)
    Viewer(hidden)._ipython_display_(); GateViewer()._ipython_display_()
    assert [type(w).__name__ for w in seen] == ['VBox', 'VBox']


def test_it_leaves_the_model_alone(hidden):
    model = hidden.case.model
    before = [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]
    viewer = Viewer(hidden)
    for method in METHODS: viewer.method.value = method
    assert before == ([(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()])


# ---- gates ----

def test_recorded_runs_have_a_reading_for_every_step():
    runs = gate_runs()
    assert len(runs) == 12 and all(len(gate_steps(run)) == len(run['gates']) for run in runs.values())
    assert all(set(map(abs, run['gates'][0])) == {0.} for name, run in runs.items() if not name.startswith('open_gates'))


def test_the_figure_draws_the_recorded_gates():
    run = gate_runs()['both, seed 1']
    left, right = show_gates(run, 7).axes
    for k, line in enumerate(zip(*run['gates'])): assert tuple(left.lines[k].get_ydata()) == line
    assert [b.get_width() for b in right.patches] == [abs(g) for g in run['gates'][7]] and left.lines[4].get_xdata()[0] == gate_steps(run)[7] == 300


def test_gate_viewer_follows_run_and_step():
    doors = GateViewer()
    seen = {doors.picture.value}
    for name in ('both, seed 0', 'one_layer, seed 2'):
        for at in (0, 1, 31):
            doors.run.value, doors.step.value = name, at
            assert doors.picture.value == png_bytes(show_gates(doors.runs[name], at)); seen.add(doors.picture.value)
    assert len(seen) == 7 and doors.told.value.startswith('step 1500, loss ')


def test_a_shorter_run_cuts_the_slider():
    long = gate_runs()['both, seed 0']
    short = dict(long, steps=100, gates=long['gates'][:4], losses=long['losses'][:3])
    doors = GateViewer(dict(long=long, short=short))
    doors.step.value = 20; doors.run.value = 'short'
    assert doors.step.value == 3 and doors.told.value.startswith('step 100, ') and doors.picture.value == png_bytes(show_gates(short, 3))


def test_wrong_use_is_told():
    with pytest.raises(ValueError, match='no runs'): GateViewer({})
    with pytest.raises(ValueError, match='rows of gates'): gate_steps(dict(steps=300, gates=[[0.]]))


# ---- films ----

def test_a_film_has_frames_to_choose_from():
    from test_figures import film
    viewer = Viewer(film(), method='attention')
    assert [name for name, _ in viewer.frame.options] == ['all', '0', '1', '2'] and not viewer.frame.disabled
    pictures = set()
    for frame in (None, 0, 1, 2):
        viewer.frame.value = frame
        assert shown(viewer) == by_hand(viewer, **({} if frame is None else dict(frame=frame)))
        pictures.add(viewer.words.value)
    assert len(pictures) == 4


def test_a_picture_has_none(said): assert Viewer(said).frame.disabled

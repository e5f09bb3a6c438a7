"Layouts: they refuse what cannot be, and every model's layout is held against what the model does."
from dataclasses import replace
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vl_tutor.explain.one_call import at_rest, record_tokens
from vl_tutor.models.backbones import GPTConfig, ViTConfig
from vl_tutor.models.bridge import MapperConfig, ResamplerConfig
from vl_tutor.models.captioner import Captioner, CaptionerConfig, CrossConfig
from vl_tutor.models.vlc import VLC, VLCConfig
from vl_tutor.primitives.attention import Attention, record
from vl_tutor.primitives.layout import Case, Layout, Look, Span
from vl_tutor.primitives.notation import expect_fail
from vl_tutor.recipes.captioner import load_captioner
from vl_tutor.recipes.vlc import load_vlc

few = settings(max_examples=12, deadline=None)
TINY = CaptionerConfig(ViTConfig(24, 8, 16, 2, 2, 24), GPTConfig(23, 24, 16, 2, 2, 32, bos_id=1, eos_id=2), MapperConfig(hidden=12),
                       ResamplerConfig(2, 2, 4, 3, 5, 1), CrossConfig(2, 4))
CAPTIONERS = dict(both=TINY, mapper=replace(TINY, resampler=None), resampler=replace(TINY, mapper=None), every=replace(TINY, cross=CrossConfig(2, 4, every=2)))
READER = VLCConfig(image_size=24, patch_size=8, width=16, layers=3, heads=2, hidden=24, vocab_size=23, text_len=12, decoder_width=8, decoder_layers=1,
                   decoder_heads=2)


def captioner(kind, frames, words, seed=0):
    torch.manual_seed(seed)
    model = Captioner(CAPTIONERS[kind]).eval()
    video, ids = torch.randn(1, frames, 3, 24, 24), torch.randint(3, 23, (1, words))
    return model, model.layout(words=words, frames=frames), lambda: model(video, ids), video, ids


def reader(words, seed=0):
    torch.manual_seed(seed)
    model = VLC(READER).eval()
    image, ids = torch.randn(1, 3, 24, 24), torch.randint(3, 23, (1, words))
    return model, model.layout(words=words), lambda: model(image, ids), image, ids


# ---- tables that cannot be ----

@pytest.mark.parametrize('start, stop', [(-1, 3), (4, 3)])
def test_a_span_has_a_beginning_and_an_end(start, stop):
    with expect_fail(f"'image' from {start} to {stop}"): Span('image', start, stop)


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 90))
def test_a_grid_has_as_many_cells_as_the_span_has_tokens(rows, cols, n):
    if rows*cols == n: assert Span('image', 5, 5 + n, (rows, cols)).grid == (rows, cols)
    else:
        with expect_fail(f'({rows}, {cols}) patches in {n} tokens'): Span('image', 5, 5 + n, (rows, cols))


@pytest.mark.parametrize('look', [Look('a', 'nobody', ('text',)), Look('a', 'text', ('text', 'nobody'))])
def test_a_look_names_streams_that_exist(look):
    with expect_fail("a: no stream 'nobody' among text, media"): Layout(dict(text=[Span('text', 0, 2)], media=[]), [look])


def test_length_spans_and_streams():
    a, b, c = Span('cls', 0, 1), Span('image', 1, 5, (2, 2), 0), Span('image', 6, 10, (2, 2), 1)
    layout = Layout(dict(media=[a, b, c], text=[Span('text', 0, 3)], empty=[]))
    assert [layout.length(s) for s in layout.streams] == [10, 3, 0]
    assert layout.spans('image') == [('media', b), ('media', c)] and layout.spans('latents') == []
    assert layout.stream_of('image') == 'media' and layout.stream_of('text') == 'text'
    with expect_fail("no 'latents' tokens in the streams media, text, empty"): layout.stream_of('latents')


def test_layouts_can_be_compared_and_not_changed():
    model = Captioner(TINY)
    assert model.layout(words=4) == model.layout(words=4) != model.layout(words=5)
    with pytest.raises(AttributeError): model.layout(words=4).looks[0].path = 'x'


# ---- sizes, order and paths, against what was recorded ----

def check_sizes(model, layout, run):
    paths = [l.path for l in layout.looks]
    with torch.no_grad(), record(model) as seen: run()
    assert list(seen) == paths                                             # every attention, in the order of the computation
    assert all(isinstance(model.get_submodule(p), Attention) for p in paths)
    frames = len({s.frame for _, s in layout.spans('image')})
    for l in layout.looks:
        b, _, n, m = seen.calls(l.path)[l.call].shape
        assert b in (1, frames) and (b*n, b*m) == (layout.length(l.asks), sum(layout.length(s) for s in l.answers)), l
        if l.gate: assert model.get_parameter(l.gate).numel() == 1
    with at_rest(model), record_tokens(model, {l.norm for l in layout.looks if l.norm}) as tokens: run()
    for l in layout.looks:
        if l.norm: assert tokens[l.norm][l.call].flatten(0, 1).shape[0] == layout.length(l.asks), l


@few
@given(st.sampled_from(list(CAPTIONERS)), st.integers(1, 3), st.integers(1, 6))
def test_captioners_layout_has_the_sizes_of_what_was_recorded(kind, frames, words):
    model, layout, run, *_ = captioner(kind, frames, words)
    check_sizes(model, layout, run)


@few
@given(st.integers(1, 9))
def test_readers_layout_has_the_sizes_of_what_was_recorded(words):
    model, layout, run, *_ = reader(words)
    check_sizes(model, layout, run)


# ---- which token is what: change one thing and see which token moves ----

def moved(model, run, path, change):
    "Tokens that entered the module at `path` and are different after the change"
    both = []
    for step in (lambda: None, change):
        step()
        with at_rest(model), record_tokens(model, {path}) as seen: run()
        both.append(seen[path][0].detach())
    return (both[0] != both[1]).any(-1).flatten().nonzero().flatten().tolist()             # rows are frames: one long stream


@pytest.mark.parametrize('row, col', [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)])
@pytest.mark.parametrize('frame', [0, 1])
def test_a_patch_of_the_captioner_is_where_the_layout_says(row, col, frame):
    model, layout, run, video, _ = captioner('both', 2, 3)
    def change(): video[0, frame, :, 8*row:8*row + 8, 8*col:8*col + 8] += 1
    span = next(s for _, s in layout.spans('image') if s.frame == frame)
    assert moved(model, run, layout.looks[0].norm, change) == [span.start + row*span.grid[1] + col]


@pytest.mark.parametrize('row, col', [(0, 0), (0, 2), (1, 1), (2, 2)])
def test_a_patch_of_the_reader_is_where_the_layout_says(row, col):
    model, layout, run, image, _ = reader(4)
    def change(): image[0, :, 8*row:8*row + 8, 8*col:8*col + 8] += 1
    (_, span), = layout.spans('image')
    assert moved(model, run, layout.looks[0].norm, change) == [span.start + row*span.grid[1] + col]


@pytest.mark.parametrize('k', range(4))
def test_a_word_is_where_the_layout_says(k):
    for (model, layout, run, _, ids), path in ((reader(4), 'trunk.encoder.blocks.0.norm1'), (captioner('mapper', 2, 4), 'lm.decoder.blocks.0.norm1')):
        def change(): ids[0, k] = 3 + (ids[0, k] - 2)%20
        (_, span), = layout.spans('text')
        assert moved(model, run, path, change) == [span.start + k]


# ---- cases of the bundled tools ----

def test_the_captioner_reads_a_word_before_it_has_seen_it():
    tool, picture = load_captioner(), torch.full((3, 48, 48), 120, dtype=torch.uint8)
    a, b = tool.case(picture, 'red star'), tool.case(picture, 'red circle')
    with torch.no_grad():
        assert torch.equal(a.run()[0], b.run()[0]) and a.run()[1] != b.run()[1]
    assert a.origins == [dict(text=1), dict(text=2)] and a.scores == [0, 1] and (a.rows, a.whole) == (1, 0)


def test_a_case_has_a_place_and_a_score_for_every_label():
    tool, picture = load_vlc(), torch.full((3, 48, 48), 120, dtype=torch.uint8)
    for target in (None, 'match', 'rank', 'answer', 'red'):
        case = tool.case(picture, 'a red star', target)
        assert isinstance(case, Case) and len(case.labels) == len(case.origins) == len(case.scores)
        with torch.no_grad(): scores = case.run()
        assert max(case.scores) < len(scores) and case.rows in (1, len(scores))
        assert all(place < case.layout.length(stream) for at in case.origins for stream, place in at.items())

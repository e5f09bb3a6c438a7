"Pictures of explanations: what the pixels and the lines say is what the maps say"
import io
from dataclasses import replace
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from one_scene import IMAGE, TEXT
from PIL import Image
from vl_tutor.data.transforms import normalised
from vl_tutor.explain.figures import (SCALES, alt_text, carried, seen_pixels, lay_map, place_name, show_explanation, show_flow, show_methods,
                                      show_patch, show_text, times_even, token_names)
from vl_tutor.explain.one_call import METHODS, explain
from vl_tutor.models.backbones import GPTConfig, ViTConfig
from vl_tutor.models.bridge import CrossConfig, ResamplerConfig
from vl_tutor.models.captioner import Captioner, CaptionerConfig
from vl_tutor.primitives.notation import PALETTE
from vl_tutor.recipes.captioner import load_captioner
from vl_tutor.recipes.vlc import load_vlc

torch.manual_seed(0)


def film():
    "A captioner that reads three frames, with open gates"
    torch.manual_seed(1)
    config = CaptionerConfig(vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, hidden=32),
        text=GPTConfig(vocab_size=12, positions=16, width=16, layers=2, heads=2, hidden=32), mapper=None,
        resampler=ResamplerConfig(1, 2, 8, 4, 8, 1), cross=CrossConfig(2, 8, 1))
    model = Captioner(config).eval()
    for block in model.gated.values(): block.gate_attn.data.fill_(1.); block.gate_mlp.data.fill_(1.)
    words = torch.tensor([[1, 4, 5, 6]])
    run = lambda m, video, ids: m(video, ids)[0].log_softmax(-1)[torch.arange(1, 4), ids[0, 1:]]
    video = torch.randn(1, 3, 3, 16, 16)
    return explain(model, video, words, run, labels=['x', 'y', 'z'], origins=[dict(text=3 + k) for k in range(3)])


def png(figure):
    file = io.BytesIO()
    figure.savefig(file)
    return np.array(Image.open(file).convert('RGB'))


# ---- the picture ----

@pytest.mark.parametrize('mean, std', SCALES)
def test_the_picture_comes_back_from_any_scale(mean, std):
    x = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    assert abs(seen_pixels(normalised(x, mean, std))*255 - x.permute(1, 2, 0).numpy()).max() < .01


def test_the_picture_of_a_tool_is_the_picture_it_was_given(said, hidden):
    for ex in (said, hidden): assert abs(seen_pixels(ex.case.picture)*255 - IMAGE.permute(1, 2, 0).numpy()).max() < .01


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'P'])
def test_pil_pictures_of_any_mode(mode):
    seen = seen_pixels(Image.new('RGB', (5, 1), (255, 255, 255)).convert(mode))
    assert seen.shape == (1, 5, 3) and (seen == 1).all()


def test_a_picture_out_of_no_scale_is_still_drawn():
    seen = seen_pixels(torch.randn(3, 4, 4)*9)
    assert seen.min() >= 0 and seen.max() <= 1


# ---- fog ----

def opacity(ax): return np.asarray(ax.images[1].get_array())[..., 3]


@pytest.mark.parametrize('scale', [1, 1e-12, 1e12])
def test_fog_is_the_map_upside_down_whatever_its_scale(scale):
    ax, w = Figure().subplots(), torch.rand(5, 7)
    lay_map(ax, seen_pixels(IMAGE), w*scale)
    assert abs(opacity(ax) - (.88*(1 - (w - w.min())/(w.max() - w.min()))).numpy()).max() < 1e-4


def test_the_frame_is_around_the_largest_patch():
    w = torch.rand(4, 6); w[2, 5] = 2
    ax = Figure().subplots()
    lay_map(ax, seen_pixels(IMAGE), w)
    assert ax.lines[0].get_xydata().min(0).tolist() == [5, 2] and ax.lines[0].get_xydata().max(0).tolist() == [6, 3]


@pytest.mark.parametrize('w', [torch.zeros(3, 3), torch.full((2, 5), .2), torch.tensor([[7.]])])
def test_a_constant_map_is_all_fog_without_a_frame(w):
    ax = Figure().subplots()
    lay_map(ax, seen_pixels(IMAGE), w)
    assert not ax.lines and np.allclose(opacity(ax), .88)


def test_what_is_no_map_is_refused():
    with pytest.raises(ValueError, match=r'\(2, 3, 3\)'): lay_map(Figure().subplots(), seen_pixels(IMAGE), torch.ones(2, 3, 3))


# ---- the strip ----

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('which', ['said', 'hidden', 'match'])
def test_the_strip_shows_the_maps(method, which, request):
    ex = request.getfixturevalue(which)
    fig, maps = show_explanation(ex, method), ex.maps(method)
    cells = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title() for ax in cells[1:]] == ex.labels
    for ax, m in zip(cells[1:], maps): assert opacity(ax).argmin() == m.argmax()
    assert [ax.title.get_color() == 'k' for ax in cells[1:]] == [i < ex.case.whole for i in range(len(ex.labels))]


def test_bars_tell_the_size_of_the_map(said):
    fig, sums = show_explanation(said), said.maps().sum((1, 2))
    bars = [ax.lines[-1].get_xdata() for ax in fig.axes[1:] if ax.images]
    assert np.allclose([(b[1] - b[0])/6 for b in bars], sums/sums.max(), atol=1e-5)


def test_words_layers_heads_and_frames_are_passed_on(said):
    fig = show_explanation(said, 'attention', words=['star', 2], layer=1, head=3, across=3)
    want = said.maps('attention', layer=1, head=3)[[3, 2]]
    for ax, w in zip(fig.axes[1:], want): assert opacity(ax).argmin() == w.argmax()
    with pytest.raises(ValueError, match='no label'): show_explanation(said, words=['blue'])
    with pytest.raises(ValueError, match='no method'): show_explanation(said, 'magic')
    with pytest.raises(ValueError, match='layers 0 to 1'): show_explanation(said, 'attention', layer=9)


def test_true_boxes_are_where_they_are(said):
    fig = show_explanation(said, words=[0], boxes=[[8, 16, 24, 48]])
    for ax in fig.axes[:2]:
        box = ax.lines[-1].get_xydata()
        assert box.min(0).tolist() == [1, 2] and box.max(0).tolist() == [3, 6]


def test_boxes_of_a_wide_picture(said):
    fig = show_explanation(said, words=[0], boxes=[[24, 6, 48, 12]], picture=Image.new('RGB', (96, 24)))
    box = fig.axes[1].lines[-1].get_xydata()
    assert box.min(0).tolist() == [1.5, 1.5] and box.max(0).tolist() == [3, 3]


def test_another_picture_may_be_drawn(said):
    red = Image.new('RGB', (96, 96), (255, 0, 0))
    fig = show_explanation(said, words=[0], picture=red)
    assert (np.asarray(fig.axes[0].images[0].get_array())[0, 0] == [1, 0, 0]).all()


def test_callers_without_autograd(said):
    with torch.no_grad(): show_explanation(explain(load_captioner(), IMAGE, TEXT))
    with torch.inference_mode(): show_explanation(said)


# ---- side by side ----

def test_all_methods_side_by_side(said):
    fig = show_methods(said, 'star', 'circle')
    axes = np.array(fig.axes).reshape(2, len(METHODS))
    for k, method in enumerate(METHODS):
        maps = said.maps(method)
        for ax, i in zip(axes[:, k], (3, 9)): assert opacity(ax).argmin() == maps[i].argmax()


def test_a_method_that_has_no_map_says_so(said):
    some = explain(load_captioner(), IMAGE, TEXT, looks=[i for i, l in enumerate(said.looks) if 'latents' not in l.answers or l.asks == 'latents'])
    fig = show_methods(some, 0, methods=['gradcam', 'attention'])
    assert fig.axes[0].images and [t.get_text() for t in fig.axes[1].texts][0] == 'no such map'


# ---- one patch ----

def test_shares_have_mean_one_and_an_empty_map_stays_empty(said):
    times = times_even(said, 'attention')
    assert torch.allclose(times.mean((1, 2)), torch.ones(len(said.labels)), atol=1e-5)
    class Half:
        def maps(self, method, **how): return torch.stack([torch.zeros(2, 2), torch.eye(2)*1e-9])
    assert torch.equal(times_even(Half())[0], torch.zeros(2, 2)) and torch.allclose(times_even(Half())[1], 2*torch.eye(2))


def test_bars_of_a_patch_are_its_column(hidden):
    fig = show_patch(hidden, 1, 4, method='attention')
    widths = [b.get_width() for b in fig.axes[1].patches]
    assert np.allclose(widths, times_even(hidden, 'attention')[:, 1, 4], atol=1e-6)
    assert fig.axes[0].lines[0].get_xydata().min(0).tolist() == [4, 1]


@pytest.mark.parametrize('row, column', [(-1, 0), (6, 0), (0, 6)])
def test_a_patch_must_be_in_the_grid(hidden, row, column):
    with pytest.raises(ValueError, match='grid of 6 by 6'): show_patch(hidden, row, column)


# ---- text ----

def test_tokens_have_the_names_of_the_words(said, hidden, match):
    words = TEXT.split()
    assert token_names(said) == ['·', *words] and token_names(hidden) == token_names(match) == ['·', *words, '·']


@pytest.mark.parametrize('told', [True, False])
@pytest.mark.parametrize('load, target, want', [(load_captioner, 'words', ['·', 'ring']), (load_vlc, 'words', ['·', 'ring', '·']),
                                                (load_vlc, 'match', ['·', 'ring', '·'])])
def test_one_word_has_its_name_at_its_place(load, target, want, told):
    ex = explain(load(), IMAGE, 'ring', target)
    if not told: ex.case.names = None
    assert token_names(ex) == want


def test_a_case_names_its_tokens(said):
    ex = explain(said.case)
    ex.case = replace(ex.case, names=[f'${i}' for i in range(11)])
    assert token_names(ex) == ex.case.names
    assert [t.get_text() for t in show_text(ex).axes[0].get_xticklabels()] == ex.case.names and png(show_text(ex)).std() > 5


@pytest.mark.parametrize('origins', [[dict(media=0), dict(media=1), dict(media=2)], [dict(text=3)]*3])
def test_labels_read_elsewhere_or_all_at_one_place_name_no_token(origins):
    ex = film()
    ex.case.origins = origins
    assert token_names(ex) == ['·']*4


def clip(ids=(0, 5, 6, 7, 63), target='match'):
    "A small CLIP of transformers: every word is read at the end of the text"
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = CLIPTextConfig(**sizes, vocab_size=64, max_position_embeddings=16, bos_token_id=0, eos_token_id=63, pad_token_id=1)
    eye = CLIPVisionConfig(**sizes, image_size=24, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=eye.to_dict(), projection_dim=8)).eval()
    return explain(model, torch.randn(1, 3, 24, 24), torch.tensor([ids]), target)


def test_clip_of_transformers_is_drawn_as_well():
    ex = clip()
    assert token_names(ex) == ['·', '5', '6', '7', '·']
    assert carried(ex, 0)[0].shape == (1, 3, 3) and len(carried(ex, 0)[1]) == 5
    for fig in (show_explanation(ex), show_text(ex), show_flow(ex), show_patch(ex, 0, 2), show_methods(ex, 0)): assert png(fig).std() > 5


@pytest.mark.parametrize('target', ['match', 'words'])
def test_one_word_of_clip(target): assert token_names(clip((0, 7, 63), target)) == ['·', '7', '·']


def test_scores_that_are_no_words_name_no_token():
    ex = film()
    ex.case.labels = ['score 0', 'score 1', 'score 2']
    assert token_names(ex) == ['·']*4


def test_names_of_a_film(): assert token_names(film()) == ['·', 'x', 'y', 'z']


def test_text_table_rows_end_at_one_and_own_places_are_left_out(said, hidden):
    for ex, at in ((said, range(10)), (hidden, range(1, 11))):
        shown = np.ma.filled(show_text(ex).axes[0].images[0].get_array(), np.nan)
        assert all(np.isnan(shown[i, j]) for i, j in enumerate(at)) and np.isnan(shown).sum() == 10
        rest = ex.reach('relevance', 'text').detach().numpy().copy()
        for i, j in enumerate(at): rest[i, j] = 0
        top = rest.max(1)
        assert all(abs(np.nanmax(shown[i]) - 1) < 1e-5 for i in range(10) if top[i] > 0)


# ---- flow ----

@pytest.mark.parametrize('method', ['attention', 'gradient', 'attention_gradcam'])
def test_ways_add_up_to_the_map(said, hidden, method):
    for ex in (said, hidden):
        through, heard = carried(ex, 9, method)
        assert abs(through.sum().item() - 1) < 1e-5 and (through >= 0).all() and len(heard) == len(token_names(ex))
    if method == 'attention':
        want = said.maps('attention')[9]
        assert torch.allclose(carried(said, 9)[0].sum(0), (want/want.sum()).float(), atol=1e-6)


def test_ways_of_a_film_are_summed_over_frames():
    ex = film()
    through, heard = carried(ex, 'z')
    want = ex.maps('attention')[2]
    assert through.shape == (4, 2, 2) and torch.allclose(through.sum(0), want/want.sum(), atol=1e-6)
    assert heard[-1] == 0 and heard[0] > 0                                     # the last word is not read to write it


def test_layer_and_head_choose_patches_and_the_figure_says_that_words_are_the_mean(said, hidden):
    for ex in (said, hidden):
        plain, chosen = carried(ex, 3), carried(ex, 3, layer=1, head=2)
        assert (plain[0] - chosen[0]).abs().max() > 1e-3
        for _, heard in (plain, chosen): assert torch.equal(heard, ex.reach('attention', 'text')[3])
        title = show_flow(ex, 3, layer=1, head=2).axes[0].get_title(loc='left')
        assert 'layer 1, head 2' in title and 'words: mean of all layers' in title
        assert 'mean' not in show_flow(ex, 3).axes[0].get_title(loc='left')


def widths(fig, kind): return [l.get_linewidth() for l in fig.axes[0].lines if l.get_color() == PALETTE[kind] and l.get_linestyle() == '-']


def test_lines_are_as_wide_as_the_flow(said):
    fig = show_flow(said, 'circle', most=10)
    through = carried(said, 'circle')[0]
    want = through.flatten().sort(descending=True).values[:10]
    assert np.allclose(sorted(widths(fig, 'image'), reverse=True), 18*want.numpy(), atol=1e-4)
    assert np.allclose(sorted(w for w in widths(fig, 'latent')), sorted(18*through.sum((1, 2)).numpy()), atol=1e-4)
    assert fig.axes[0].get_title(loc='left').endswith(f'carry {want.sum():.0%}')


def test_without_latents_patches_speak_at_once(hidden):
    fig = show_flow(hidden, 'star', most=10_000)
    assert len(widths(fig, 'image')) == 36 and not widths(fig, 'latent') and fig.axes[0].get_title(loc='left').endswith('100%')


def test_wrong_use_is_told(said):
    with pytest.raises(ValueError, match='no label'): show_flow(said, 'blue')
    for across in (0, -1, 2.5):
        with pytest.raises(ValueError, match='number of pictures'): show_explanation(said, across=across)
    with pytest.raises(ValueError, match='nothing to show'): show_explanation(said, words=[])
    for boxes in ([0, 0, 9, 9], [[1, 2, 3]], torch.ones(1, 1, 4)):
        for draw in (show_explanation, show_methods):
            with pytest.raises(ValueError, match=r'boxes are \(o 4\)'): draw(said, boxes=boxes)


def test_a_model_that_has_changed_is_told_and_not_drawn_around():
    ex = changed()
    with pytest.raises(ValueError, match='model has changed'): show_methods(ex, 0)


def changed():
    "An explanation whose model took a step before any gradient was read"
    tool = load_vlc()
    ex = explain(tool, IMAGE, TEXT)
    with torch.no_grad():
        for p in tool.model.parameters(): p.mul_(2)
    return ex


# ---- ears ----

@pytest.mark.parametrize('row, col, name', [(0, 0, 'upper left'), (0, 3, 'top'), (2, 2, 'centre'), (3, 5, 'right'), (5, 2, 'bottom'), (3, 0, 'left'),
                                            (5, 5, 'lower right'), (5, 0, 'lower left'), (1, 4, 'upper right')])
def test_nine_places(row, col, name):
    w = torch.zeros(6, 6); w[row, col] = 1
    assert place_name(w) == name


def test_one_row_has_places(): assert [place_name(torch.tensor(w)) for w in ([[0., 1.]], [[1., 0., 0.]], [[0., 1., 0.]])] == ['right', 'left', 'centre']
def test_nowhere(): assert place_name(torch.ones(3, 3)) == 'nowhere'


def test_alternative_text_names_every_word_and_the_right_place(hidden):
    told, maps = alt_text(hidden, 'attention_gradcam'), hidden.maps('attention_gradcam')
    assert told.startswith('Attention gradcam, ') and told.endswith('.') and told.count(',') == len(hidden.labels)
    for word, m in zip(hidden.labels, maps): assert f' {word} {place_name(m)}' in told


# ---- pixels ----

def test_a_file_is_written_and_differs_where_maps_differ(hidden, tmp_path):
    one, two = (png(show_explanation(hidden, m, words=[9])) for m in ('relevance', 'gradcam'))
    assert one.shape == two.shape and (one != two).any() and one.std() > 10
    show_explanation(hidden).savefig(tmp_path/'x.png')
    assert (tmp_path/'x.png').read_bytes()[:4] == b'\x89PNG'

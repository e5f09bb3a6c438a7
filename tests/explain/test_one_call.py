"explain(): one pass is the loop, gradients are gradients, nothing is left behind, and a layout is all a model owes."
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Thread
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from vl_tutor.explain.one_call import METHODS, at_rest, bare_case, explain, gradients, gradients_ref, record_tokens, side_by_side, run_watched
from vl_tutor.models.captioner import Captioner, CaptionerConfig, CrossConfig, MapperConfig, ResamplerConfig
from vl_tutor.models.backbones import GPTConfig, ViTConfig
from vl_tutor.primitives.attention import Attention, record
from vl_tutor.primitives.layout import Case, Layout, Look, Span
from vl_tutor.primitives.notation import expect_fail
from vl_tutor.primitives.transformer import Block, FeedForward
from vl_tutor.recipes.captioner import load_captioner
from vl_tutor.recipes.vlc import load_vlc
from vl_tutor.world.language import captions
from vl_tutor.world.scenes import World

IDS = torch.tensor([[1, 5, 7, 9, 11]])
PICTURE = Path(__file__).resolve().parents[2]/'docs'/'images'/'scene.png'


def close(got, want, atol=1e-6, rtol=1e-5): torch.testing.assert_close(got, want, atol=atol, rtol=rtol)


# ---- models ----

def captioner(seed=0, *, resampler=True, mapper='mlp'):
    "A random captioner with its gates open"
    torch.manual_seed(seed)
    model = Captioner(CaptionerConfig(ViTConfig(24, 8, 16, 2, 2, 32), GPTConfig(20, 16, 16, 2, 2, 32, bos_id=1, eos_id=2),
        mapper and MapperConfig(mapper, 8, 2, 2), ResamplerConfig(2, 2, 8, 3, 4, 1) if resampler else None, CrossConfig(2, 8)))
    for p in model.parameters(): p.data += .3*torch.randn_like(p)
    return model.eval()


def said(model, video, ids):
    "Log-probability of each word"
    at = torch.arange(1, ids.shape[1])
    return model(video, ids)[0].log_softmax(-1)[at, ids[0, at]]


def said_case(model, frames=3, seed=1):
    video = torch.randn(1, frames, 3, 24, 24, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    origins = [dict(text=frames + j - 1) for j in range(1, IDS.shape[1])]
    return bare_case(model, video, IDS, said, origins=origins, labels=list('wxyz'))


class TwoStream(nn.Module):
    "As SIMLA: a picture stream and a text stream; one fusion layer serves both directions, so it is called twice"
    def __init__(self, dropout=.3):
        super().__init__()
        self.patches, self.words, self.norm = nn.Linear(6, 8), nn.Embedding(12, 8), nn.LayerNorm(8)
        self.see, self.read = Block(8, 2, hidden=8, attn_dropout=dropout), Block(8, 2, hidden=8, attn_dropout=dropout)
        self.fuse, self.out, self.batch = Attention(8, 2, dim_context=8, dropout=dropout), nn.Linear(8, 2), nn.BatchNorm1d(2)

    def forward(self, patches, ids, keep=None):
        image, text = self.see(self.patches(patches), keep=keep), self.read(self.words(ids))
        text = text + self.fuse(self.norm(text), image, keep=keep)
        image = image + self.fuse(self.norm(image), text)
        text = text + self.read.attn(self.read.norm1(text))
        return self.batch(self.out(text[:, 0] + image.mean(1)))

    def layout(self, words):
        image, text = [Span('image', 0, 6, (2, 3))], [Span('text', 0, words)]
        looks = [Look('see.attn', 'image', ('image',), 'see.norm1'), Look('read.attn', 'text', ('text',), 'read.norm1', call=0),
                 Look('fuse', 'text', ('image',), 'norm', call=0), Look('fuse', 'image', ('text',), 'norm', call=1),
                 Look('read.attn', 'text', ('text',), 'read.norm1', call=1)]
        return Layout(dict(image=image, text=text), looks)


class Queried(nn.Module):
    "As Perceiver-VL: latents of another width read text and picture twice and talk; decoder queries read the latents"
    def __init__(self):
        super().__init__()
        self.patches, self.words = nn.Linear(6, 8), nn.Embedding(12, 8)
        self.latents, self.queries = nn.Parameter(torch.randn(1, 3, 10)), nn.Parameter(torch.randn(1, 2, 4))
        self.norm, self.ask_norm = nn.LayerNorm(10), nn.LayerNorm(4)
        self.reads = nn.ModuleList(Attention(10, 2, dim_context=8) for _ in range(2))
        self.talk, self.ask = Block(10, 2, hidden=10), Attention(4, 2, dim_context=10)
        self.out = nn.Linear(4, 2)

    def forward(self, patches, ids, keep=None):
        inputs, latents = torch.cat([self.words(ids), self.patches(patches)], 1), self.latents
        keep = None if keep is None else torch.cat([torch.ones_like(ids, dtype=torch.bool), keep], 1)
        for read in self.reads: latents = self.talk(latents + read(self.norm(latents), inputs, keep=keep))
        queries = self.queries + self.ask(self.ask_norm(self.queries), latents)
        return self.out(queries).diagonal(dim1=1, dim2=2)                        # query i gives score i

    def layout(self, words):
        inputs, looks = [Span('text', 0, words), Span('image', words, words + 6, (2, 3))], []
        for i in range(2):
            looks += [Look(f'reads.{i}', 'latents', ('inputs',), 'norm', call=0), Look('talk.attn', 'latents', ('latents',), 'talk.norm1', call=i)]
        looks.append(Look('ask', 'queries', ('latents',), 'ask_norm'))
        return Layout(dict(inputs=inputs, latents=[Span('latents', 0, 3)], queries=[Span('query', 0, 2)]), looks)


PATCHES = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(4))

def small(kind, seed=0, keep=None):
    "A model of a later system's shape, and its case, made by the layout alone"
    torch.manual_seed(seed)
    model = kind().eval()
    for p in model.parameters(): p.data += .4*torch.randn_like(p)
    origins = [dict(text=0, image=0)]*2 if kind is TwoStream else [dict(queries=i) for i in range(2)]
    target = lambda m, patches, ids: m(patches, ids, keep)[0]
    return model, bare_case(model, PATCHES, IDS, target, labels=['no', 'yes'], origins=origins)


@cache
def tools(): return load_captioner(), load_vlc()

@cache
def scene(i=0):
    world = World('pair', 'test', skin='mixed', image_size=48)
    scenes = world.scenes(torch.tensor([i]))
    return world.draw(scenes)[0], captions(scenes)[0]


# ---- one pass is the loop ----

def alone(case, i):
    "The same question about one score"
    return replace(case, run=lambda: case.run()[case.scores[i]][None], labels=[case.labels[i]], origins=[case.origins[i]], scores=[0],
                   whole=int(i < case.whole))


def defined(case):
    "The methods that a layout allows: where patches never ask, nothing yields them on their way"
    return [m for m in METHODS if m != 'gradcam' or explain(case).readers(m)]


def compare(case, loop, methods=METHODS, kinds=('image', 'text')):
    "All labels in one pass against explain() for each"
    together = explain(case)
    for method in methods:
        for kind in kinds:
            if method == 'gradcam' and kind == 'text': continue
            got, want = together.reach(method, kind), torch.cat([one.reach(method, kind) for one in loop])
            assert got.shape == want.shape and (got >= 0).all() and got.isfinite().all()
            close(got, want)
            close(got/got.amax().clamp(min=1e-12), want/want.amax().clamp(min=1e-12), atol=1e-4)    # small maps too
    return together


def test_captioner_words_are_the_loop():
    case = tools()[0].case(*scene())
    compare(case, [explain(alone(case, i)) for i in range(len(case.labels))])


def test_vlc_words_are_the_loop():
    tool, (image, text) = tools()[1], scene()
    (ids, mask), pixels = tool.texts([text]), tool.images([image])
    case = tool.case(image, text)
    def one(i):
        run = lambda: tool.hidden_words(pixels, ids, mask, [case.origins[i]['joint']])
        return explain(replace(case, run=run, labels=[case.labels[i]], origins=[case.origins[i]], scores=[0], rows=1))
    compare(case, [one(i) for i in range(len(case.labels))])


def test_labels_that_share_a_score_are_the_loop():
    case = tools()[1].case(*scene(1), 'match')
    loop = [explain(alone(case, i)) for i in range(len(case.labels))]
    ex = compare(case, loop)
    assert ex.scores.shape == (1,) and len(ex.labels) == 1 + len(scene(1)[1].split())


@pytest.mark.parametrize('mapper', ['mlp', 'transformer', None])
def test_a_video_is_the_loop(mapper):
    case = said_case(captioner(mapper=mapper))
    ex = compare(case, [explain(alone(case, i)) for i in range(4)], kinds=('image', 'text', 'latents'))
    assert ex.maps().shape == (4, 3, 3) and ex.reach('relevance', 'latents').shape == (4, 3)
    frames = torch.stack([ex.maps(frame=i) for i in range(3)])
    close(frames.sum(0), ex.maps()); assert (frames.amax((1, 2, 3)) > 0).all()


def test_without_latents_only_the_patches_speak():
    case = said_case(captioner(resampler=False))
    compare(case, [explain(alone(case, i)) for i in range(4)], ['gradcam'], ['image'])
    compare(case, [explain(alone(case, i)) for i in range(4)], ['attention', 'rollout', 'relevance'], ['text'])
    for method in set(METHODS) - {'gradcam'}:
        with pytest.raises(ValueError, match='image'): explain(case).maps(method)


@pytest.mark.parametrize('kind', [TwoStream, Queried])
def test_later_systems_by_their_layout_alone(kind):
    _, case = small(kind)
    methods = defined(case)
    ex = compare(case, [explain(alone(case, i)) for i in range(2)], methods)
    assert set(METHODS) - set(methods) == ({'gradcam'} if kind is Queried else set())     # there patches never ask
    for method in methods:
        maps = ex.maps(method)
        assert maps.shape == (2, 2, 3) and maps.std() > 0, method


def test_batched_gradients_are_the_loop():
    x, y, unused = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    scores = torch.stack([(x*y).sum(), x.exp().sum(), (x @ y.T).trace(), y[0, 0]])
    for got, want in zip(gradients(scores, [x, y, unused]), gradients_ref(scores, [x, y, unused]), strict=True): close(got, want)
    assert gradients(scores, [unused])[0].shape == (4, 3, 4) and x.grad is None


# ---- gradients are gradients ----

def nudged(case, look, place, step):
    "The scores when one weight of one call of a look is a little larger"
    part, calls = case.model.get_submodule(look.path), []
    def push(weights):
        calls.append(1)
        if len(calls) - 1 != max(look.call, 0): return weights
        weights = weights.clone()
        weights[place] += step
        return weights
    part.recorder = push
    try:
        with torch.no_grad(): return case.run()
    finally: part.recorder = None


def differences(case, places=6, eps=1e-5):
    "Every look's slopes against central differences, at a few places each"
    ex, rng = explain(case), random.Random(0)
    for k, look in enumerate(ex.looks):
        f, h, n, m = ex.weights[k].shape
        slopes = ex.slope('weights', k)                                          # (t h f·n f·m)
        for _ in range(places):
            place = tuple(rng.randrange(s) for s in (f, h, n, m))
            slope = (nudged(case, look, place, eps) - nudged(case, look, place, -eps))/(2*eps)
            close(slopes[:, place[1], place[0]*n + place[2], place[0]*m + place[3]].double(), slope, atol=1e-6, rtol=1e-5)
        assert slopes.abs().max() > 1e-6


@pytest.mark.parametrize('mapper', ['mlp', 'transformer'])
def test_slopes_are_differences_in_a_captioner(mapper):
    with at_rest(model := captioner(mapper=mapper).double()): differences(said_case(model, frames=2))


@pytest.mark.parametrize('kind', [TwoStream, Queried])
def test_slopes_are_differences_in_later_systems(kind):
    model, case = small(kind)
    model.double()
    patches = PATCHES.double()
    differences(replace(case, run=lambda: model(patches, IDS)[0]), places=12)


def test_token_slopes_are_differences():
    model, case = small(TwoStream)
    ex = explain(case)
    for k, look in enumerate(ex.looks):
        bump = torch.zeros_like(ex.tokens[k]); bump[0, 1, 2] = 1e-2
        calls = []
        def push(_, __, out):
            calls.append(1)
            return out + bump*sign if len(calls) - 1 == look.call % 2 else out
        once = look.path == 'see.attn'
        found = []
        for sign in (1, -1):
            calls.clear()
            if once: calls.append(1)                                             # one call, which is the last
            hook = model.get_submodule(look.norm).register_forward_hook(push)
            with torch.no_grad(): found.append(case.run())
            hook.remove()
        close(ex.slope('tokens', k)[:, 1, 2], (found[0] - found[1])/2e-2, atol=2e-4, rtol=1e-3)


def test_recorded_weights_are_those_of_record():
    model, case = small(TwoStream)
    with record(model) as seen, torch.no_grad(): case.run()
    for weights, look in zip(explain(case).weights, case.layout.looks): close(weights, seen.calls(look.path)[look.call])


def test_a_hidden_patch_never_lights_up():
    keep = torch.ones(1, 6, dtype=torch.bool); keep[0, 4] = False
    for kind in (TwoStream, Queried):
        ex = explain(small(kind, keep=keep)[1])
        for method in set(METHODS) - {'gradcam'}:
            maps = ex.maps(method).flatten(1)
            assert (maps[:, 4] == 0).all() and (maps[:, [0, 1, 2, 3, 5]].sum(1) > 0).all(), (kind, method)


# ---- only what is needed ----

def test_looks_recorded_alone_say_the_same():
    case = said_case(captioner())
    everything = explain(case)
    for k in everything.readers('attention_gradcam'):
        some = explain(case, looks={k})
        close(some.maps('attention_gradcam'), everything.maps('attention_gradcam', layer=everything.readers('attention_gradcam').index(k)))
    assert len(explain(case, looks=[0, 3]).weights) == 2


def test_a_slope_is_made_once_and_only_where_it_is_read():
    ex = explain(said_case(captioner()))
    ex.maps('attention'); ex.maps('rollout')
    assert not ex.slopes
    ex.maps('attention_gradcam')
    assert {k for _, k in ex.slopes} == set(ex.readers('attention_gradcam'))
    kept = dict(ex.slopes)
    ex.maps('relevance')
    assert len(ex.slopes) == len(ex.looks) and all(ex.slopes[key] is kept[key] for key in kept)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_maps_are_single_precision_whatever_the_model_is(dtype):
    want, got = explain(said_case(captioner())), explain(said_case(captioner().to(dtype)))
    assert got.scores.dtype == dtype
    for method in METHODS:
        assert got.maps(method).dtype == torch.float32
        if dtype == torch.float64: close(got.maps(method), want.maps(method), atol=1e-5, rtol=1e-3)
        else: assert got.maps(method).isfinite().all()


# ---- no trace ----

HOOKS = [name for name in vars(nn.Module()) if 'hooks' in name]

def trace(model):
    "All that explaining might have changed"
    parts = {}
    for name, part in model.named_modules():
        parts[name] = part.training, getattr(part, 'recorder', None), [list(vars(part)[h]) for h in HOOKS], sorted(vars(part))
    params = {name: (p.requires_grad, p.grad is None, id(p.grad)) for name, p in model.named_parameters()}
    return parts, params, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def values(model):
    "Every number the model has, gradients and random states included"
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    rng = torch.from_numpy(np.random.get_state()[1].astype('int64')), torch.tensor(random.getstate()[1])
    return [t.clone() for t in (*model.state_dict().values(), *grads, torch.get_rng_state(), *rng)]


class Unchanged:
    "Passes only if a model is as it was, to the bit"
    def __init__(self, model): self.model = model
    def __enter__(self): self.before = trace(self.model), values(self.model)
    def __exit__(self, *_):
        assert trace(self.model) == self.before[0]
        for got, want in zip(values(self.model), self.before[1], strict=True): assert torch.equal(got, want)


def unruly(model):
    "Some parts train, some do not; some parameters learn and have gradients, others neither; hooks of the owner's"
    model.train()
    for i, part in enumerate(model.modules()): part.training = i%3 > 0
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i%2 == 0)
        if i%4 == 0: p.grad = torch.full_like(p, .5)
    for part in list(model.modules())[::4]: part.register_forward_hook(lambda *_: None)
    return model


def ask_everything(case):
    ex = explain(case)
    for method in METHODS:
        if ex.readers(method): ex.maps(method)
    return ex


@pytest.mark.parametrize('make', [lambda: said_case(captioner()), lambda: small(TwoStream)[1], lambda: small(Queried)[1]])
@pytest.mark.parametrize('caller', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_behind(make, caller):
    want, case = ask_everything(make()), make()
    unruly(case.model)
    with caller(), Unchanged(case.model): ex = ask_everything(case)
    for method in defined(case): close(ex.maps(method), want.maps(method))        # nor does it matter how the model was


@pytest.mark.parametrize('caller', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('which', [0, 1])
def test_tools_leave_nothing_behind(which, caller):
    tool = tools()[which]
    want, modes = ask_everything(tool.case(*scene(2))), [part.training for part in tool.model.modules()]
    tool.model.train()
    try:
        with caller(), Unchanged(tool.model):
            ex = explain(tool, *scene(2))
            for method in METHODS: close(ex.maps(method), want.maps(method))
            if which == 0: assert explain(tool, scene(2)[0]).labels               # its own caption, written in evaluation mode
    finally:
        for part, mode in zip(tool.model.modules(), modes): part.training = mode


def test_a_function_as_target_is_counted_at_rest():
    model = small(TwoStream)[0].train()                                           # dropout and running means
    with Unchanged(model): ex = explain(model, PATCHES, IDS, lambda m, x, y: m(x, y)[0])
    assert ex.labels == ['score 0', 'score 1']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['run', 'see.attn', 'fuse', 'out'])
def test_nothing_is_left_behind_by_failure(error, where):
    model, case = small(TwoStream)
    def fail(*_): raise error('on purpose')
    if where == 'run': case = replace(case, run=fail)
    else: model.get_submodule(where).register_forward_hook(fail)
    unruly(model)
    with Unchanged(model), pytest.raises(error, match='on purpose'): explain(case)


def test_a_recording_around_it_goes_on():
    model, case = small(TwoStream)
    with record(model) as outer:
        explain(case)
        assert not len(outer)                                                     # the explanation had its own
        case.run()
    assert len(outer.calls('fuse')) == 2


def test_weights_of_an_explanation_hold_no_gradients():
    ex = ask_everything(said_case(captioner()))
    assert all(w.grad is None for w in ex.weights if w.is_leaf) and not any(w.retains_grad for w in ex.weights if not w.is_leaf)


def test_threads_share_a_model():
    tool, wrong = tools()[0], []
    want = [explain(tool, *scene(i)).maps() for i in range(4)]
    stop = []
    def ask(i):
        for _ in range(3):
            try: close(explain(tool, *scene(i)).maps(), want[i])
            except BaseException as error: wrong.append(error)
    def caption():
        while not stop: tool.caption([scene()[0]], decoding='greedy')
    with Unchanged(tool.model):
        threads, other = [Thread(target=ask, args=(i,)) for i in range(4)], Thread(target=caption)
        for t in (*threads, other): t.start()
        for t in threads: t.join()
        stop.append(1); other.join()
    assert not wrong, wrong[0]


# ---- mistakes ----

def test_mistakes_are_told():
    case = said_case(captioner())
    ex = explain(case)
    for words, mistake in {
        'no method': lambda: ex.maps('magic'), 'layers 0 to 1': lambda: ex.maps('attention', layer=7), 'head 9 of 2': lambda: ex.maps(head=9),
        'relevance has no layer': lambda: ex.maps(layer=1), 'gradient has no depth': lambda: ex.maps('gradient', depth=2),
        'gradcam has no head': lambda: ex.maps('gradcam', head=0), 'one look is read by': lambda: ex.between('rollout', 'text', 'media'),
        'no label': lambda: ex.label('dog'), 'a flow is': lambda: ex.flow('gradient'), "no 'audio' tokens": lambda: ex.reach(kind='audio'),
        'none of the': lambda: explain(case, looks=[]), 'no case': lambda: explain(nn.Linear(2, 2), 0, 0, said), 'no case()': lambda: explain('a path'),
        'has no case': lambda: explain(captioner(), 0, IDS), '4 labels but 1 origins': lambda: bare_case(captioner(), torch.zeros(1, 1, 3, 24, 24), IDS, said,
            labels=list('wxyz'), origins=[dict(text=1)]),
        'one for each label': lambda: explain(replace(case, run=lambda: case.run()[None])),
        'no recorded look': lambda: explain(replace(case, run=lambda: case.run().detach())).maps(),
        'no recorded look leads': lambda: explain(case, looks=[0]).maps('attention'),
        'nothing of': lambda: explain(case, looks=[0]).maps('rollout'),
    }.items():
        with pytest.raises(ValueError) as told: mistake()
        assert words in str(told.value) and '\n' not in str(told.value), (words, told.value)


def test_a_model_trained_meanwhile_is_told():
    model, case = small(TwoStream)
    ex = explain(case)
    ex.maps('attention')
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1.1)
    assert ex.maps('attention').isfinite().all()                                  # tables are written down, slopes are not yet
    with pytest.raises(ValueError, match='explain it again'): ex.maps('gradient')


# ---- pieces ----

def test_frames_side_by_side_are_blocks():
    x = torch.rand(2, 3, 4, 5)                                                    # two frames, three heads
    wide = side_by_side(x, 1, True)
    assert wide.shape == (1, 3, 8, 10)
    for h in range(3): close(wide[0, h], torch.block_diag(*x[:, h]))
    tokens = torch.rand(6, 4, 5)                                                  # three rows of two frames
    close(side_by_side(tokens, 3, False), tokens.reshape(3, 8, 5))
    assert side_by_side(x, 2, True) is x


def test_tokens_of_every_call_are_kept():
    model, case = small(TwoStream)
    with record_tokens(model, ['norm', 'out']) as seen:
        other = Thread(target=case.run); other.start(); other.join()              # not ours to keep
        case.run()
    assert [t.shape[1] for t in seen['norm']] == [5, 6] and len(seen['out']) == 1
    close(model.batch(seen['out'][0]), case.run()[None])
    assert all(t.requires_grad for t in seen['norm'])


def test_explaining_a_case_twice_is_the_same():
    case = tools()[1].case(scene()[0], 'is there a star ?', 'answer')
    first, second = ask_everything(case), run_watched(case, case.layout.looks)
    for method in METHODS: assert torch.equal(first.maps(method), second.maps(method))
    assert isinstance(case, Case) and first.labels[0] in ('(yes)', '(no)')


@pytest.mark.parametrize('how, sentence', [
    (dict(method='relevance', depth=-1), 'relevance has depths 1 to 6, not -1'), (dict(method='rollout', depth=0), 'rollout has depths 1 to 6, not 0'),
    (dict(method='relevance', depth=2.5), 'not 2.5'), (dict(method='attention', layer='0'), "attention has layers 0 to 5, not '0'"),
    (dict(method='attention', frame=99), 'the video has frames 0 to 0, not 99'), (dict(method='attention', head='x'), 'head x of 4')])
def test_numbers_that_stand_for_nothing(how, sentence):
    ex = explain(load_vlc(), PICTURE, 'a ring', 'match')
    with expect_fail(sentence): ex.maps(**how)


def test_between_has_layers_too():
    ex = explain(load_vlc(), PICTURE, 'a ring', 'match')
    with expect_fail('attention has layers 0 to 5, not 9'): ex.between('attention', 'joint', 'joint', layer=9)


@pytest.mark.parametrize('image, text, sentence', [
    ('scene', None, 'VLC explains a caption or a question, not None'), ('scene', '[MASK]', "'[MASK]' has no word that the model knows"),
    (torch.zeros(1, 3, 48, 48, dtype=torch.uint8), 'a ring', 'expected uint8 pixels (h, w, 3), got uint8 (1, 3, 48, 48)'),
    (torch.zeros(48, 48), 'a ring', 'got float32 (48, 48)'), (Image.new('RGB', (0, 5)), 'a ring', 'no pixels: it is 0×5')])
def test_what_vlc_cannot_explain(image, text, sentence):
    with expect_fail(sentence): explain(load_vlc(), PICTURE if isinstance(image, str) else image, text)


@pytest.mark.parametrize('text, sentence', [('<bos>', "no word in the caption '<bos>'"), (' ', 'no word in the caption'), (7, 'a caption is a text, not 7'),
                                            ('ring '*90, 'a caption of 90 words; the language model reads 62')])
def test_what_the_captioner_cannot_explain(text, sentence):
    with expect_fail(sentence): explain(load_captioner(), PICTURE, text)


def test_a_bare_model_is_told_what_it_reads():
    vlc = load_vlc()
    image, ids, match = vlc.images([PICTURE]), vlc.texts(['a ring'])[0], lambda m, x, i: m.match(x, i)[:, 1]
    ask = lambda image=image, ids=ids, target=match, **more: explain(vlc.model, image, ids, target, **more)
    assert ask().case.picture.shape == (3, 48, 48)
    for sentence, wrong in {
        'one row of pixels (1 3 h w), not PosixPath': lambda: ask(PICTURE), 'not (2, 3, 48, 48)': lambda: ask(image[[0, 0]]),
        'one row of ids (1 n), not str': lambda: ask(ids='a ring'), 'ids (1 n), not (4,)': lambda: ask(ids=ids[0]),
        'target returns scores (t), not ()': lambda: ask(target=lambda *a: match(*a)[0]), 'not NoneType': lambda: ask(target=lambda *a: None),
        '0 labels': lambda: ask(labels=[]), "no token 0 in a stream 'foo'": lambda: ask(origins=[dict(foo=0)]),
        'VLC reads single pictures, not a clip (1, 3, 3, 48, 48)': lambda: ask(image[:, None].expand(-1, 3, -1, -1, -1)), '1 labels but 1 origins': lambda: ask(origins=[{}]),
        'no token 999': lambda: ask(origins=[dict(joint=999)]), 'no token -1': lambda: ask(origins=[dict(joint=-1)]),
    }.items():
        with expect_fail(sentence): wrong()


@pytest.mark.parametrize('load, text', [(load_vlc, 'a ring'), (load_captioner, 'a large ring')])
def test_tools_in_double(load, text):
    tool = load()
    want = explain(tool, PICTURE, text).maps()
    tool.model.double()
    close(explain(tool, PICTURE, text).maps(), want, atol=1e-5, rtol=1e-2)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode(): tool = load_vlc()
    with expect_fail('torch.inference_mode()'): explain(tool, PICTURE, 'a ring')


def test_a_model_of_another_type_since():
    tool = load_vlc()
    ex = explain(tool, PICTURE, 'a ring')
    tool.model.half()
    with expect_fail('has changed since it was run'): ex.maps()


def test_a_compiled_model_is_a_model():
    "It has no length, as a module of modules has: `if body` would ask for it"
    tool = load_vlc()
    want = explain(tool, PICTURE, 'a ring', 'match').maps()
    tool.model.__class__ = type('VLC', (type(tool.model),), dict(__len__=lambda self: 0))
    close(explain(tool, PICTURE, 'a ring', 'match').maps(), want)

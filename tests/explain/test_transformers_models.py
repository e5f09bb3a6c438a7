"CLIP, ViLT and BLIP of transformers under explain(): our own VLC, output_attentions and autograd by hand as oracles; nothing left behind; words and pictures through processors."
from threading import Thread
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from vl_tutor.explain.one_call import METHODS, explain
from vl_tutor.explain.transformers_models import MODELS, in_reading_order, record_dropouts, record_interface, transformers_case
from vl_tutor.models.parity import first_difference
from vl_tutor.models.vilt import load_vilt
from vl_tutor.primitives.layout import Case
from vl_tutor.primitives.notation import expect_fail

BODY = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20)
SIGHT, TEXT = dict(BODY, image_size=12, patch_size=4), dict(BODY, vocab_size=30, max_position_embeddings=9, pad_token_id=0, bos_token_id=1)
DROP = dict(hidden_dropout_prob=.4, attention_probs_dropout_prob=.4)
IDS, PIXELS = torch.tensor([[1, 7, 8, 9, 5, 29]]), torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(3))
ALL = [name for name in MODELS]


def shake(model, by=.2):
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(by*torch.randn(p.shape, generator=gen))
    return model


def config_for(name, **more):
    if name.startswith('Vilt'): return transformers.ViltConfig(**SIGHT, vocab_size=30, max_position_embeddings=9, num_labels=6, **{**DROP, **more})
    if name.startswith('CLIP'):
        sight, text = dict(SIGHT, attention_dropout=.4), dict(TEXT, attention_dropout=.4, eos_token_id=29)
        return transformers.CLIPConfig(text_config={**text, **more}, vision_config=sight, projection_dim=8)
    text = dict(TEXT, encoder_hidden_size=12, sep_token_id=2, eos_token_id=2, **DROP)
    return transformers.BlipConfig(text_config={**text, **more}, vision_config=dict(SIGHT, attention_dropout=.4), image_text_hidden_size=8)


def build(name, **more):
    torch.manual_seed(0)
    return shake(getattr(transformers, name)(config_for(name, **more)))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "Every class, saved and loaded again, as a user would meet it: with dropout, in evaluation mode"
    found = {}
    for name in ALL:
        folder = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(folder)
        found[name] = getattr(transformers, name).from_pretrained(folder)
    return found


def asked(name): return dict(mask_id=4) if name == 'ViltForMaskedLM' else dict(target=IDS[:, :4]) if name == 'BlipForQuestionAnswering' else {}


def same(ours, theirs, atol=1e-5):
    assert (found := first_difference(dict(tensor=ours), dict(tensor=theirs), atol=atol)) is None, str(found)


# ---- every class, every method ----

@pytest.mark.parametrize('name', ALL)
def test_six_methods_draw_finite_maps_that_are_not_flat(name, saved):
    ex = explain(saved[name], PIXELS, IDS, **asked(name))
    words = 2 if name == 'BlipForQuestionAnswering' else 4
    assert len(ex.labels) == words + ('match' in MODELS[name] or name == 'ViltForQuestionAnswering')
    for method in METHODS:
        maps = ex.maps(method)
        assert maps.shape == (len(ex.labels), 3, 3) and maps.isfinite().all() and (maps >= 0).all()
        live = maps.flatten(1)
        flat = live.std(1) <= 1e-3*live.mean(1)
        assert not flat[live.sum(1) > 0].any() and (live.sum(1) > 0).float().mean() > .7, (method, live.sum(1))
    assert ex.reach('relevance', 'text').isfinite().all()


@pytest.mark.parametrize('name', ALL)
def test_layer_counts_and_grids_come_from_the_configuration(name, saved):
    case = transformers_case(saved[name], PIXELS, IDS, **asked(name))
    assert isinstance(case, Case)
    (_, span), = case.layout.spans('image')
    assert span.grid == (3, 3) and span.stop - span.start == 9
    looks = {'V': 2, 'C': 4}.get(name[0], 10 if 'Question' in name else 6)
    assert len(case.layout.looks) == looks == len({l.path for l in case.layout.looks})


# ---- our own VLC, weights copied ----

def twins(name, folder):
    theirs = build(name).eval()
    for path, layer in theirs.named_modules():                                  # the authors' in the trunk; transformers writes 1e-12 everywhere
        if isinstance(layer, torch.nn.LayerNorm) and not ('text_embeddings' in path or 'mlm_score' in path or 'classifier' in path): layer.eps = 1e-6
    theirs.save_pretrained(folder)
    return theirs, load_vilt(folder)


def everything_equal(ours, theirs):
    same(ours.scores.detach(), theirs.scores.detach())
    for method in METHODS:
        for how in ({}, dict(layer=0), dict(head=1)) if method not in ('rollout', 'relevance', 'gradcam') else ({},):
            assert how or theirs.maps(method).sum() > 0
            same(ours.maps(method, **how), theirs.maps(method, **how))
    same(ours.reach('relevance', 'text'), theirs.reach('relevance', 'text'))


@pytest.mark.parametrize('name, score', [('ViltForImageAndTextRetrieval', lambda m, x, ids: m.rank(x, ids)[:1]),
                                         ('ViltForQuestionAnswering', lambda m, x, ids: m.answer(x, ids).max(1).values)])
def test_vilt_has_the_maps_of_our_vlc(name, score, tmp_path):
    theirs, ours = twins(name, tmp_path)
    target = lambda model, image, ids: score(model, image, ids).reshape(1)
    mine = explain(ours, PIXELS[None], IDS, target, origins=[dict(joint=0)], labels=['whole'])
    yours = explain(theirs, PIXELS, IDS)
    yours.case.labels, yours.case.origins, yours.case.scores, yours.case.whole = ['whole'], [dict(joint=0)], [0], 0
    everything_equal(mine, yours)


def test_hidden_words_of_vilt_have_the_maps_of_our_vlc(tmp_path):
    theirs, ours = twins('ViltForMaskedLM', tmp_path)
    rows, at = torch.arange(4), torch.arange(1, 5)
    hidden = IDS.repeat(4, 1)
    hidden[rows, at] = 4
    run = lambda: ours.head('mlm')(ours(ours.see(PIXELS[None])[0*rows], hidden).text[rows, at]).log_softmax(-1)[rows, IDS[0, at]]
    mine = explain(Case(ours, ours.layout(words=6), run, list('abcd'), [dict(joint=int(i)) for i in at], [0, 1, 2, 3], 4))
    everything_equal(mine, explain(theirs, PIXELS, IDS, mask_id=4))


# ---- weights and gradients of transformers' own eager code ----

def theirs_attentions(name, model):
    "output_attentions of the eager code in the order of our looks, and the score, in one graph"
    model.set_attn_implementation('eager')
    if name == 'CLIPModel':
        out = model(input_ids=IDS, pixel_values=PIXELS[None], output_attentions=True)
        return [*out.vision_model_output.attentions, *out.text_model_output.attentions], out.logits_per_image[0]
    if name.startswith('Vilt'):
        with in_reading_order(model): out = model(input_ids=IDS, pixel_values=PIXELS[None], output_attentions=True)
        return list(out.attentions), out.logits[0, :1]
    see = model.vision_model(pixel_values=PIXELS[None], output_attentions=True)
    if name == 'BlipForImageTextRetrieval':
        out = model.text_encoder(input_ids=IDS, encoder_hidden_states=see.last_hidden_state, output_attentions=True)
        score = model.itm_head(out.last_hidden_state[:, 0])[:, 1]
    else:
        ids = IDS[:, :-1].clone()
        out = model.text_decoder(input_ids=ids[:, :-1], encoder_hidden_states=see.last_hidden_state, output_attentions=True, use_cache=False)
        score = out.logits[0].log_softmax(-1)[torch.arange(4), ids[0, 1:]]
    both = [t for pair in zip(out.attentions, out.cross_attentions) for t in pair]
    return [*see.attentions, *both], score


@pytest.mark.parametrize('name', ['CLIPModel', 'ViltForImageAndTextRetrieval', 'BlipForImageTextRetrieval', 'BlipForConditionalGeneration'])
def test_weights_and_gradients_are_those_of_the_eager_code(name):
    model = build(name).eval()
    ex = explain(model, PIXELS, IDS)
    wanted, scores = theirs_attentions(name, model)
    assert len(wanted) == len(ex.weights)
    for mine, yours in zip(ex.weights, wanted): same(mine.detach(), yours.detach(), 1e-6)
    same(ex.scores[:len(scores)].detach(), scores.detach())
    for k, yours in enumerate(torch.autograd.grad(scores[-1], wanted, materialize_grads=True)):
        same(ex.slope('weights', k)[len(scores) - 1], yours[0])


def test_clip_words_are_similarities_lost():
    model = build('CLIPModel').eval()
    ex = explain(model, PIXELS, IDS)
    for i in range(1, 5):
        keep = torch.ones_like(IDS)
        keep[0, i] = 0
        with torch.no_grad():
            whole, less = (model(input_ids=IDS, pixel_values=PIXELS[None], attention_mask=m).logits_per_image.item() for m in (torch.ones_like(IDS), keep))
        assert abs(ex.scores[i].item() - (whole - less)) < 1e-5 and abs(whole - less) > 1e-3
    same(explain(model, PIXELS, IDS, 'words').maps(), ex.maps()[1:])
    assert (ex.maps()[1] - ex.maps()[2]).abs().max() > 1e-4                     # words have maps of their own


def test_old_clips_read_at_the_largest_number():
    same(explain(build('CLIPModel', eos_token_id=2).eval(), PIXELS, IDS).maps(), explain(build('CLIPModel').eval(), PIXELS, IDS).maps())
    with expect_fail('first end marker 2'): explain(build('CLIPModel', eos_token_id=2), PIXELS, IDS.flip(1))


def test_blip_answers_add_up_to_its_loss():
    model = build('BlipForQuestionAnswering').eval()
    ex = explain(model, PIXELS, IDS, IDS[:, :4])
    said = torch.tensor([[1, 7, 8]])
    with torch.no_grad(): loss = model(input_ids=IDS, pixel_values=PIXELS[None], labels=said).loss.item()
    assert abs(loss + ex.scores.mean().item()) < 1e-5
    assert ex.labels == ['7', '8'] and ex.reach('relevance', 'text').shape == (2, 6)


@pytest.mark.parametrize('name', ['BlipForConditionalGeneration', 'BlipForQuestionAnswering'])
def test_blip_begins_with_its_own_marker(name):
    model, other = build(name).eval(), torch.tensor([[11, 7, 8, 29]])               # 11: what a BERT tokeniser begins with, not BLIP's decoder
    begin = lambda ids: explain(model, PIXELS, *((ids,) if 'Cond' in name else (IDS, ids)))
    want = torch.tensor([[1, 7, 8, 29]])
    same(begin(other).maps(), begin(want).maps(), 1e-7)
    assert begin(other).labels == ['7', '8']


def test_blip_speaks_for_itself():
    model = build('BlipForConditionalGeneration').eval()
    ex = explain(model, PIXELS, None)
    with torch.no_grad(): said = model.generate(PIXELS[None], max_new_tokens=8, num_beams=1, do_sample=False)[0, 1:].tolist()
    assert ex.labels == [str(i) for i in said if i != 2]
    answers = build('BlipForQuestionAnswering').eval()
    assert explain(answers, PIXELS, IDS).labels == explain(answers, PIXELS, IDS, 'answer').labels != []


def test_an_answer_can_be_defended_by_name():
    model = build('ViltForQuestionAnswering', id2label={i: n for i, n in enumerate('no yes two red blue green'.split())}).eval()
    best = explain(model, PIXELS, IDS)
    logits = [explain(model, PIXELS, IDS, name).scores.item() for name in 'no yes two red blue green'.split()]
    assert best.scores.item() == max(logits) and len(set(logits)) == 6
    assert best.labels[0] == f'({"no yes two red blue green".split()[logits.index(max(logits))]})'


# ---- ViLT's lot ----

def test_patches_stand_in_reading_order(monkeypatch):
    model = build('ViltForImageAndTextRetrieval').eval()
    pixels = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(5))  # 2 × 4 patches
    maps = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        maps.append(explain(model, pixels, IDS).maps('attention'))
    assert maps[0].shape == (5, 2, 4) and torch.equal(maps[0], maps[1])
    monkeypatch.setattr(torch, 'multinomial', lambda weights, n, replacement=False: torch.arange(n) % len(weights))     # their dice: reading order
    case = transformers_case(model, pixels, IDS)
    with torch.no_grad(), record_dropouts(model, only={l.path for l in case.layout.looks}) as seen:
        model(input_ids=IDS, pixel_values=pixels[None], pixel_mask=torch.ones(1, 8, 16))
    table = torch.stack([seen[l.path].mean(1) for l in case.layout.looks]).mean(0)[0]
    same(maps[0][0].flatten(), table[:6, 7:].mean(0), 1e-6)


def test_a_lot_that_throws_patches_away_is_refused():
    with expect_fail('max_image_length=5'): explain(build('ViltForImageAndTextRetrieval', max_image_length=5), PIXELS, IDS)


# ---- no trace ----

def state_of(model):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as kernels
    return dict(modes=[m.training for m in model.modules()], learns=[p.requires_grad for p in model.parameters()], grads=[p.grad for p in model.parameters()],
                hooks=[(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
                kernels=[getattr(m.config, '_attn_implementation', None) for m in model.modules() if hasattr(m, 'config')],
                names=(sorted(kernels), sorted(masks)), own=[sorted(vars(m)) for m in model.modules()], dice=torch.get_rng_state().tolist(),
                grad=(torch.is_grad_enabled(), torch.is_inference_mode_enabled()))


@pytest.mark.parametrize('name', ALL)
def test_nothing_is_left_behind(name):
    model = build(name).train()
    list(model.modules())[3].training = False
    list(model.parameters())[2].requires_grad_(False)
    quiet = explain(build(name).eval(), PIXELS, IDS, **asked(name)).scores
    before = state_of(model)
    same(explain(model, PIXELS, IDS, **asked(name)).scores.detach(), quiet.detach())         # dropout .4 did not happen
    assert state_of(model) == before
    with torch.no_grad(): explain(model, PIXELS, IDS, **asked(name)).maps('relevance')
    if 'answer' in MODELS[name]: explain(model, PIXELS, IDS)                                  # the model chooses the answer
    assert state_of(model) == before
    last = [m for path, m in model.named_modules() if path.split('.')[-1] in ('output', 'mlp')][-1]
    hook = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError('in the middle')))
    with pytest.raises(RuntimeError, match='in the middle'): explain(model, PIXELS, IDS, **asked(name))
    hook.remove()
    assert state_of(model) == before


@pytest.mark.parametrize('name', ALL)
def test_callers_in_inference_mode_and_half_precision(name):
    model = build(name).eval()
    want = explain(model, PIXELS, IDS, **asked(name))
    with torch.inference_mode():
        found = explain(model, PIXELS.clone(), IDS.clone(), **asked(name))
        for method in METHODS: same(found.maps(method), want.maps(method), 1e-6)
    half = explain(model.bfloat16(), PIXELS, IDS, **asked(name))
    assert half.weights[0].dtype == torch.bfloat16 and half.maps('relevance').isfinite().all()
    same(half.maps('attention'), want.maps('attention'), .03)


@pytest.mark.parametrize('kind', ['eager', 'sdpa'])
def test_each_tower_gets_its_own_kernel_back(kind):
    model = build('CLIPModel').eval()
    model.set_attn_implementation(dict(text_config=kind, vision_config='sdpa'))
    want = explain(build('CLIPModel').eval(), PIXELS, IDS).maps()
    same(explain(model, PIXELS, IDS).maps(), want)
    assert (model.text_model.config._attn_implementation, model.vision_model.config._attn_implementation) == (kind, 'sdpa')


def test_two_recordings_of_two_models_do_not_mix():
    one, two = build('CLIPModel').eval(), shake(build('CLIPModel')).eval()
    path = 'vision_model.encoder.layers.0.self_attn'
    with torch.no_grad(), record_interface(one, only={path}) as a, record_interface(two, only={path}) as b:
        one.vision_model(PIXELS[None])
        two.vision_model(PIXELS[None])
    assert len(a.calls(path)) == len(b.calls(path)) == 1 and (a[path] - b[path]).abs().max() > 1e-4
    same(a[path].sum(-1), torch.ones(1, 3, 10))


@pytest.mark.parametrize('name, watch, path', [
    ('CLIPModel', record_interface, 'vision_model.encoder.layers.0.self_attn'),
    ('ViltForQuestionAnswering', record_dropouts, 'vilt.encoder.layer.0.attention.attention')])
def test_what_other_threads_run_is_not_recorded(name, watch, path):
    model = build(name).eval()
    ask = lambda px: model(input_ids=IDS, pixel_values=px[None], **dict(pixel_mask=torch.ones(1, 12, 12)) if 'Vilt' in name else {})
    with torch.no_grad(), watch(model, only={path}) as seen:
        other = Thread(target=lambda: ask(PIXELS*2))
        other.start(); other.join()
        assert not len(seen)
        ask(PIXELS)
    assert len(seen.calls(path)) == 1
    with torch.no_grad(), watch(model, only={path}) as alone: ask(PIXELS)
    if name == 'CLIPModel': same(seen[path], alone[path], 1e-6)           # ViLT draws the order of its patches by lot


# ---- names of tokens ----

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('ids', [IDS, IDS[:, [0, 1, 5]]])
def test_every_text_token_has_its_own_name(name, ids, saved):
    target = dict(target=torch.tensor([[1, 11, 12, 29]])) if name == 'BlipForQuestionAnswering' else asked(name)
    case = transformers_case(saved[name], PIXELS, ids, **target)
    (_, span), = case.layout.spans('text')
    words = [str(i) for i in ids[0, 1:-1].tolist()]
    assert len(case.names) == span.stop - span.start
    assert case.names == (['·', *words[:-1]] if name == 'BlipForConditionalGeneration' else ['·', *words, '·'])


# ---- words and pictures through processors ----

def tokenizer_for(**marks):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = ['[PAD]', '[CLS]', '[UNK]', '[SEP]', '[MASK]', 'a', 'red', 'star', 'blue', 'ring', 'is', 'it', 'yes', 'no']
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, '[UNK]'))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]', special_tokens=[('[CLS]', 1), ('[SEP]', 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token='[PAD]', unk_token='[UNK]', mask_token='[MASK]', cls_token='[CLS]', sep_token='[SEP]')


def processor_for(name):
    size = dict(height=12, width=12)
    if name.startswith('CLIP'): return transformers.CLIPProcessor(transformers.CLIPImageProcessor(size=dict(shortest_edge=12), crop_size=size), tokenizer_for())
    if name.startswith('Vilt'): return transformers.ViltProcessor(transformers.ViltImageProcessor(size=dict(shortest_edge=12), size_divisor=4), tokenizer_for())
    return transformers.BlipProcessor(transformers.BlipImageProcessor(size=size), tokenizer_for())


@pytest.mark.parametrize('name', ALL)
def test_processors_bring_words_and_pictures(name, tmp_path):
    model, processor = build(name, **dict(eos_token_id=3) if name == 'CLIPModel' else {}).eval(), processor_for(name)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))
    target = 'yes' if name.startswith('BlipForQ') else None
    ex = explain(model, picture, 'a red star', target, processor=processor)
    assert [w for w in ex.labels if not w.startswith('(')] == (['yes'] if target else ['a', 'red', 'star'])
    pixels = processor.image_processor(images=picture, return_tensors='pt')['pixel_values']
    ids = torch.tensor([[1, 5, 6, 7, 3]])
    again = explain(model, pixels, ids, torch.tensor([1, 12, 3]) if target else None, **dict(mask_id=4) if 'Masked' in name else {})
    same(ex.maps(), again.maps(), 1e-6)
    picture.save(tmp_path/'p.png')
    bytes_ = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for other in (str(tmp_path/'p.png'), bytes_): same(explain(model, other, 'a red star', target, processor=processor).maps(), ex.maps(), 1e-6)


# ---- refusals ----

def test_refusals(saved):
    clip, vilt, caption = saved['CLIPModel'], saved['ViltForMaskedLM'], saved['BlipForConditionalGeneration']
    with expect_fail('ViTModel is none of CLIPModel'): explain(transformers.ViTModel(transformers.ViTConfig(**SIGHT)), PIXELS, IDS)
    with expect_fail("CLIPModel explains 'match' or 'words', not 'rank'"): explain(clip, PIXELS, IDS, 'rank')
    with expect_fail('needs a text'): explain(clip, PIXELS, None)
    with expect_fail('a text needs processor='): explain(clip, PIXELS, 'a star')
    with expect_fail('a picture needs processor='): explain(clip, Image.new('RGB', (12, 12)), IDS)
    with expect_fail('a picture needs processor='): explain(clip, Image.new('RGB', (12, 12)), 'a star', processor=tokenizer_for())     # a tokeniser is none
    with expect_fail('12×12 pixels, not 16×12'): explain(clip, torch.randn(3, 16, 12), IDS)
    with expect_fail('12×12 pixels, not 8×12'): explain(caption, torch.randn(3, 8, 12), IDS)
    with expect_fail('one picture is (3 h w)'): explain(clip, torch.randn(2, 3, 12, 12), IDS)
    with expect_fail('has 11 tokens, but the model reads at most 9'): explain(clip, PIXELS, torch.arange(11))
    with expect_fail('an empty text'): explain(clip, PIXELS, IDS[:, :2])
    with expect_fail('one text is whole numbers (n) or (1 n), not torch.int64 (2, 6)'): explain(clip, PIXELS, IDS[[0, 0]])
    with expect_fail('not torch.float32 (1, 6)'): explain(clip, PIXELS, IDS.float())
    with expect_fail("ViltForQuestionAnswering explains 'answer', not 'match'"): explain(saved['ViltForQuestionAnswering'], PIXELS, IDS, 'match')
    with expect_fail('first end marker 29'): explain(clip, PIXELS, IDS[:, :5])
    with expect_fail('give mask_id='): explain(vilt, PIXELS, IDS)
    with expect_fail("no answer 'purple' among the model's 6"): explain(saved['ViltForQuestionAnswering'], PIXELS, IDS, 'purple')
    with expect_fail('never sees the picture'): explain(build('BlipForImageTextRetrieval', is_decoder=False), PIXELS, IDS)

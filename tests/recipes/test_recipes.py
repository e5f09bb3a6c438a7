"Recipes: samples by number, towers, bridge and tool, on models of a few thousand numbers; and the bundled weights."
import csv
import pytest
import torch
from tensors import same
from torch import tensor
from vl_tutor.explain.one_call import explain
from vl_tutor.models.backbones import GPT2, GPTConfig, ViT, ViTConfig
from vl_tutor.models.bridge import CrossConfig, MapperConfig, ResamplerConfig
from vl_tutor.models.captioner import Captioner, CaptionerConfig
from vl_tutor.primitives.attention import record
from vl_tutor.primitives.words import WordTokenizer, byte_pair_tokenizer
from vl_tutor.recipes.captioner import (BUNDLED, DECODINGS, CaptionTool, captioned, captioning_by_ear, evaluate_captioner,
                                        load_captioner, load_published, load_towers, train_captioner)
from vl_tutor.recipes.pretraining import (PatchReader, Recipe, Samples, fresh_tower, labelled_patches, mishear, next_word_smoothed, normalise,
                                          patch_accuracy, pretrain_language, pretrain_vision, surprise, text_windows)
from vl_tutor.training.checkpoints import read_card, read_tensors, save_model
from vl_tutor.world.language import captions, world_tokenizer
from vl_tutor.world.scenes import World

pytestmark = pytest.mark.usefixtures('one_thread')
EYE, PEN = ViTConfig(48, 16, 16, 1, 2, 32), GPTConfig(64, 64, 16, 2, 2, 32, bos_id=1, eos_id=2)
TINY = CaptionerConfig(EYE, PEN, MapperConfig(hidden=8), ResamplerConfig(2, 2, 8, 4, 4, 1), CrossConfig(2, 8, 1))
BLIND = CaptionerConfig(EYE, PEN, MapperConfig(hidden=8), None)


@pytest.fixture
def tool():
    torch.manual_seed(0)
    model = Captioner(TINY).eval()
    for block in model.gated.values():
        for gate in (block.gate_attn, block.gate_mlp): torch.nn.init.constant_(gate, .7)
    return CaptionTool(model, world_tokenizer(), {})


def pictures(n, split='test'):
    world = World('pair', split)
    return [*world.draw(world.scenes(range(n)))]


@pytest.mark.parametrize('make', [
    lambda: labelled_patches(World('pair', skin='mixed'), 16, grey=.5), lambda: captioned(World('pair', skin='mixed'), world_tokenizer()),
    lambda: text_windows(World('pair'), 12, texts=300)], ids=['patches', 'captions', 'windows'])
def test_a_sample_depends_on_its_number_alone(make):
    alone, data = make()(tensor([7])), Samples(make(), 20)
    assert len(data) == 20 and same(data.batch([3, 7, 4]), data.batch([3, 7, 4]))
    row = lambda batch, i: {k: row(v, i) if isinstance(v, dict) else v[i:i + 1] for k, v in batch.items()}
    assert same(row(data.batch([3, 7, 4]), 1), alone)
    assert not same(alone, make()(tensor([8])))


def test_normalise_is_clips():
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = tensor([0.48145466, 0.4578275, 0.40821073]), tensor([0.26862954, 0.26130258, 0.27577711])
    assert torch.allclose(normalise(x), ((x.double()/255 - mean[:, None, None])/std[:, None, None]).float(), atol=1e-5)


def test_grey_pictures_have_no_colour_and_are_not_asked_for_it():
    plain, some = (labelled_patches(World('pair'), 16, grey=g)(torch.arange(400)) for g in (0., .25))
    grey = (some['image'][:, 0] == some['image'][:, 2]).flatten(1).all(1)
    assert .18 < grey.float().mean() < .32                                          # 4 sigma of a quarter of 400 is .087
    colour = some['patch_labels']['colour']
    assert (colour[grey] == -1).all() and torch.equal(colour[~grey], plain['patch_labels']['colour'][~grey])
    assert torch.equal(some['image'][~grey], plain['image'][~grey])
    for name in ('kind', 'size', 'present'): assert torch.equal(some['patch_labels'][name], plain['patch_labels'][name])


@pytest.mark.parametrize('rate', [0., .3, 1.])
def test_mishear_keeps_the_first_word_and_its_rate(rate):
    ids = torch.arange(30_000).reshape(1500, 20)
    heard = mishear(ids, torch.arange(1500), rate)
    wrong = heard != ids
    assert not wrong[:, 0].any() and abs(wrong[:, 1:].float().mean() - rate) < .012
    assert torch.equal(heard[wrong], ids.roll(1, 0)[wrong])                          # a word of the text above, same place
    assert torch.equal(heard, mishear(ids, torch.arange(1500), rate))


def test_windows_begin_anywhere_and_are_misheard_only_if_asked():
    read = text_windows(World('pair'), 16, texts=1000)(torch.arange(1000))
    assert torch.equal(read['ids'], read['heard'])
    assert ((read['ids'] == 1).float().mean(0) > .03).all()                          # <bos> at every place
    noisy = text_windows(World('pair'), 16, texts=1000, misheard=.5)(torch.arange(1000))
    assert torch.equal(noisy['ids'], read['ids']) and not torch.equal(noisy['heard'], read['heard'])


def test_smoothed_loss_is_a_mixture_and_surprise_is_plain():
    torch.manual_seed(0)
    model, ids = GPT2(PEN).eval(), torch.randint(5, 40, (3, 9))
    logp = model(ids)[:, :-1].log_softmax(-1)
    true = -logp.gather(2, ids[:, 1:, None]).mean()
    batch = dict(ids=ids, heard=ids)
    assert surprise(model, batch) == pytest.approx(true.item(), abs=1e-5)
    mixed = .9*true - .1*logp.mean()
    assert next_word_smoothed(model, batch)['word'].item() == pytest.approx(mixed.item(), abs=1e-5)


def test_reader_names_patches_not_the_class_token():
    reader = PatchReader(fresh_tower(EYE)).eval()
    out = reader(torch.randn(2, 3, 48, 48))
    assert {k: tuple(v.shape) for k, v in out.items()} == dict(kind=(2, 9, 16), colour=(2, 9, 6), size=(2, 9, 2), present=(2, 9, 2))
    right = patch_accuracy(reader, World('pair', 'test'), n=20)
    assert right.keys() == out.keys() and all(0 <= r <= 1 for r in right.values())


def test_pretraining_leaves_what_load_model_reads(tmp_path):
    eye = pretrain_vision(EYE, Recipe(32, batch_size=16), tmp_path/'eye', level='one', skin='shapes')
    pretrain_language(PEN, Recipe(32, batch_size=16), tmp_path/'pen')
    assert read_card(tmp_path/'eye')['class'] == 'ViT' and read_card(tmp_path/'pen')['recipe']['samples'] == 32
    made = train_captioner(tmp_path/'eye', tmp_path/'pen', TINY, Recipe(16, batch_size=16), tmp_path/'cap', tokenizer=world_tokenizer())
    assert torch.equal(made.model.vision.cls, eye.cls)                               # towers are copied in, and frozen
    assert load_captioner(tmp_path/'cap').tokenizer.vocab_size == world_tokenizer().vocab_size
    with pytest.raises(ValueError, match='vocabulary of 8'): pretrain_language(GPTConfig(8, 64, 16, 2, 2), Recipe(32), tmp_path/'no')
    assert not (tmp_path/'no').exists()


def test_captioning_reads_what_is_heard_and_writes_what_is_true(tool):
    batch = captioned(World('pair'), world_tokenizer(), misheard=.5)(torch.arange(6))
    want = tool.model.loss(batch['video'], batch['ids'], mask=batch['mask'])
    assert captioning_by_ear(tool.model, {**batch, 'heard': batch['ids']})['caption'].item() == pytest.approx(want.item(), abs=1e-5)
    assert captioning_by_ear(tool.model, batch)['caption'].item() != pytest.approx(want.item(), abs=1e-5)


def test_the_maps_of_a_caption_are_what_explain_finds(tool):
    "One map a word, none negative, each summing to 1: what `explain` reads from the same words as `pointing` says"
    images = pictures(2)
    for image, said in zip(images, tool.caption(images, maps=True, max_words=5)):
        case = tool.written(tool.video([image]), said.ids)
        want = explain(case).maps(**tool.pointing())
        assert case.labels == said.words and said.maps.shape == want.shape == (len(said.ids), 3, 3) and (said.maps >= 0).all()
        assert torch.allclose(said.maps, want/want.sum((1, 2), keepdim=True), atol=1e-6)
        assert not torch.allclose(want[0]/want[0].sum(), torch.full((3, 3), 1/9), atol=1e-3)


def test_maps_are_the_last_gated_block_through_the_latents(tool):
    "Word k was written one token before it is read; its look at the latents times their mean look at the patches"
    words, video = [9, 12, 7], tool.video(pictures(1))
    with record(tool.model) as seen: tool.model(video, tensor([[1, *words]]))
    last = max(tool.model.gated, key=int)
    looked = seen[f'gated.{last}.attn'][0].mean(0)[1:4]                                        # prefix, then <bos> and the words
    layers = [seen[f'resampler.layers.{l}.attn'][0].mean(0) for l in range(len(tool.model.resampler.layers))]
    patches = (looked @ torch.stack(layers).mean(0))[:, 1:10]                                  # token 0 is no patch
    assert torch.allclose(tool.where(video, words).flatten(1), patches/patches.sum(1, keepdim=True), atol=1e-5)


def test_no_words_and_no_latents_have_no_maps(tool):
    assert tool.finish(tool.video(pictures(1)), [], True, True).maps.shape == (0, 1, 1)
    blind = CaptionTool(Captioner(BLIND).eval(), world_tokenizer(), {})
    assert blind.caption(pictures(1), maps=True, decoding='greedy')[0].maps is None
    video = blind.video(pictures(1))
    with pytest.raises(ValueError, match='image'): explain(blind.written(video, [9, 12])).maps('attention')
    want = explain(blind.written(video, [9, 12])).maps('gradcam')               # by way of the prefix, which is no look
    assert torch.allclose(blind.where(video, [9, 12]), want/want.sum((1, 2), keepdim=True).clamp(min=1e-30))


def test_asking_for_maps_leaves_no_trace(tool):
    learns = [p.requires_grad for p in tool.model.parameters()]
    with torch.no_grad(): tool.caption(pictures(1), maps=True, max_words=4)
    assert [p.requires_grad for p in tool.model.parameters()] == learns and not tool.model.training
    assert all(p.grad is None for p in tool.model.parameters()) and all(getattr(m, 'recorder', None) is None for m in tool.model.modules())


@pytest.mark.parametrize('decoding', DECODINGS)
def test_captions_by_every_decoding(tool, decoding):
    said = tool.caption(pictures(2), decoding=decoding, max_words=6, maps=True, seed=3)
    again = tool.caption(pictures(2), decoding=decoding, max_words=6, seed=3)
    for one, two in zip(said, again):
        assert one.ids == two.ids and len(one.words) == len(one.ids) == len(one.maps) <= 6 and one.score < 0
        assert torch.allclose(one.maps.sum((1, 2)), torch.ones(len(one.ids)), atol=1e-5)


def test_beam_of_one_is_greedy(tool):
    a, b = (tool.caption(pictures(3), decoding=d, width=1, max_words=6) for d in ('beam', 'greedy'))
    assert [c.ids for c in a] == [c.ids for c in b]


@pytest.mark.parametrize('images, options, words', [
    (1, dict(decoding='best'), "no decoding 'best'"), (1, dict(width=0), 'at least 1 beam'), (0, {}, 'no pictures'),
    (1, dict(decoding='nucleus', temperature=0.), 'temperature')])
def test_mistakes_are_one_sentence(tool, images, options, words):
    with pytest.raises(ValueError, match=words) as caught: tool.caption(pictures(images) if images else [], **options)
    assert '\n' not in str(caught.value)


def test_folders_that_are_no_captioner(tmp_path, tool):
    with pytest.raises(ValueError, match='nowhere is no directory'): load_captioner(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='card.json does not exist'): load_captioner(tmp_path)
    save_model(ViT(EYE), tmp_path)
    world_tokenizer().save(tmp_path)
    with pytest.raises(ValueError, match='holds a ViT, not a captioner'): load_captioner(tmp_path)
    other = tmp_path/'other'
    save_model(tool.model, other)
    WordTokenizer([f'w{i}' for i in range(99)]).save(other)
    with pytest.raises(ValueError, match='does not fit') as caught: load_captioner(other)
    assert str(other) in str(caught.value) and '\n' not in str(caught.value)


@pytest.fixture(scope='module')
def towers(tmp_path_factory):
    "A CLIP and a GPT-2 of a few thousand numbers, saved by transformers"
    from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel
    folder = tmp_path_factory.mktemp('towers')
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    CLIPModel(CLIPConfig(vision_config=dict(small, image_size=48, patch_size=16), text_config=dict(small, vocab_size=50),
                         projection_dim=16)).save_pretrained(folder/'clip')
    words = byte_pair_tokenizer([])
    words.save(folder/'gpt2')
    GPT2LMHeadModel(GPT2Config(vocab_size=words.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=words.bos_id,
                               eos_token_id=words.eos_id)).save_pretrained(folder/'gpt2')
    return folder


def test_towers_as_transformers_saves_them(towers):
    made = load_towers(towers/'clip', towers/'gpt2', config=TINY)
    assert made.card['trained'] is False and made.model.config.vision.width == 32
    [said] = made.caption(pictures(1), decoding='greedy', max_words=5, maps=True)
    assert len(said.ids) == 5 or said.ids == [] or len(said.words) == len(said.maps)
    assert isinstance(said.text, str)
    with pytest.raises(ValueError, match='not a CLIP'): load_towers(towers/'gpt2', towers/'gpt2', config=TINY)
    with pytest.raises(ValueError): load_published(towers/'clip'/'model.safetensors', towers/'gpt2')


class Halt(Exception): pass


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    from vl_tutor.training import learner
    torch.manual_seed(0)
    eye, pen, recipe = fresh_tower(EYE), GPT2(PEN), Recipe(64, batch_size=8)        # 8 steps
    fit = lambda name: train_captioner(eye, pen, TINY, recipe, tmp_path/name, tokenizer=world_tokenizer())
    fit('whole')
    often = lambda folder, every=500: Checkpoints(folder, 3)
    Checkpoints = learner.Checkpoints
    monkeypatch.setattr(learner, 'Checkpoints', often)
    step, count = learner.DictLearner._step, []
    def stop(self):
        count.append(1)
        if len(count) == 6: raise Halt
        step(self)
    monkeypatch.setattr(learner.DictLearner, '_step', stop)
    with pytest.raises(Halt): fit('halves')
    assert not (tmp_path/'halves'/'model.safetensors').exists()
    fit('halves')
    assert len(count) == 6 + 5                                                       # from step 3, not from 0
    a, b = (read_tensors(tmp_path/name/'model.safetensors')[0] for name in ('whole', 'halves'))
    assert same(a, b)
    assert not torch.equal(a['gated.0.gate_attn'], torch.zeros(1, dtype=a['gated.0.gate_attn'].dtype))


def test_the_bundled_scores_come_out_again():
    "200 scenes against the card's 1,000, within 4 sigma of a share measured on 200"
    tool = load_captioner()
    worlds = dict(shapes=('test', 'shapes'), digits=('test', 'digits'), combos_shapes=('combos', 'shapes'), combos_digits=('combos', 'digits'))
    for name, (split, skin) in worlds.items():
        p = tool.card['scores'][name]['exact']
        got = evaluate_captioner(tool, World('pair', split, skin=skin), n=200)['exact']
        assert abs(got - p) <= 4*(p*(1 - p)/200)**.5 + .005, (name, got, p)
    shuffled = evaluate_captioner(tool, World('pair', 'test'), n=200, shuffled=True)
    assert shuffled['exact'] <= .02 and shuffled['kind'] < .4
    best = max(captions(World('pair', 'test').scenes(range(200))), key=captions(World('pair', 'test').scenes(range(200))).count)
    assert captions(World('pair', 'test').scenes(range(200))).count(best)/200 < tool.card['scores']['shapes']['exact'] - .5


def test_bundled_files_are_small_and_complete():
    assert sum(p.stat().st_size for p in BUNDLED.iterdir()) < 3e6
    card = read_card(BUNDLED)
    assert {'commands', 'data', 'scores', 'made', 'weights'} <= card.keys()
    for log in ('vision', 'language', 'captioner'):
        rows = [float(r['loss']) for r in csv.DictReader((BUNDLED/f'{log}_log.csv').open()) if r['loss']]
        assert rows[-1] < .8*rows[0]

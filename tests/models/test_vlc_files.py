"Files of VLC and its relatives: there and back, sizes from shapes, what is made, copied, stretched, left out; and refusals in one sentence."
import json
import re
import sys
import types
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensors import same
from vl_tutor.models.classifier import SIZES as CLASSIFIERS, Classifier, ClassifierConfig
from vl_tutor.models.mae import MAE, ViTTrunk
from vl_tutor.models.vlc import SIZES, VLC, VLCConfig
from vl_tutor.models.vlc_files import Official, classifier_sizes, kind_of, load_vlc_weights, mae_keys, official_tensors, open_official, read_classifier, read_vlc, save_official, vlc_sizes

GOLDEN = Path(__file__).resolve().parents[1]/'golden'/'vlc'
TINY = VLCConfig(16, 8, 12, 2, 3, 20, 30, 6, 8, 1, 2, decoder_hidden=12)
HEADS = dict(heads=3, decoder_heads=2)


def build(config=TINY, seed=0):
    "Random numbers everywhere, tables of places included"
    torch.manual_seed(seed)
    model = (VLC if isinstance(config, VLCConfig) else Classifier)(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p))
    return model


# ---- there and back ----

@pytest.mark.parametrize('config', [
    TINY, replace(TINY, tasks=('mlm', 'itm', 'vqa', 'nlvr2', 'rank'), modalities=3, answers=5), replace(TINY, tasks=()), replace(TINY, image_size=(16, 24)), replace(TINY, image_size=(8, 32)),
    replace(TINY, decoder_layers=0, decoder_width=512, decoder_heads=16, decoder_hidden=None), replace(TINY, decoder_layers=0, decoder_width=512, decoder_heads=16, decoder_hidden=None, positions='learned')], ids=str)
def test_our_own_file_tells_everything(tmp_path, config):
    model = build(config)
    names = save_official(model, tmp_path/'theirs.safetensors')
    loaded = read_vlc(tmp_path/'theirs.safetensors')
    assert loaded.model.config == replace(config, answers=config.answers if 'vqa' in config.tasks else VLCConfig.answers)
    assert same(loaded.model.state_dict(), model.state_dict()) and not loaded.new + loaded.unused and not loaded.changed
    assert set(names) == set(load_file(tmp_path/'theirs.safetensors')) and loaded.kind == ('vlc' if config.decoder_layers else 'vilt')
    assert [p.requires_grad for p in loaded.model.parameters()] == [p.requires_grad for p in model.parameters()] and not loaded.model.training


@pytest.mark.parametrize('pool', ['gap', 'cls'])
def test_classifier_there_and_back(tmp_path, pool):
    model = build(ClassifierConfig(16, 8, 12, 2, 3, 20, 7, pool, 0.))
    save_official(model, tmp_path/'c.safetensors')
    loaded = read_classifier(tmp_path/'c.safetensors', drop_path=0.)
    assert loaded.model.config == model.config and same(loaded.model.state_dict(), model.state_dict()) and loaded.kind == 'classifier'
    other = read_classifier(tmp_path/'c.safetensors', classes=4, image_size=(16, 32))
    assert sorted(other.new) == sorted(other.unused) == ['head.bias', 'head.weight'] and other.changed == {'pos_embed': 'stretched from 2×2 to 2×4'}


def test_sizes_of_the_published_lists():
    shapes = lambda name: Official({k: torch.empty(v, device='meta') for k, v in json.loads((GOLDEN/f'manifest_{name}.json').read_text()).items()})
    for name, ours in dict(vlc_base_pretrain_384='base', vlc_large_pretrain_384='large', vlc_base_vqa_576='vqa', vlc_base_nlvr2_384='nlvr2', vlc_base_irtr_384='retrieval', vilt_b32_mlm_itm_384='vilt',
                           vilt_b32_vqa_384='vilt_vqa', vilt_b32_nlvr2_384='vilt_nlvr2', vilt_b32_irtr_384='vilt_retrieval').items(): assert vlc_sizes(shapes(name)) == SIZES[ours], name
    assert vlc_sizes(shapes('mae_base_224')) == replace(SIZES['base'], image_size=224)
    for name, ours in dict(imagenet_base_gap_224='base', imagenet_base_gap_384='base_384').items(): assert classifier_sizes(shapes(name), '') == CLASSIFIERS[ours]


# ---- lightning ----

def lightning_like(path: Path, tensors: dict, **settings):
    "What lightning writes: callbacks keyed by classes, optimiser states, settings; the classes are gone when it is read"
    home, names = types.ModuleType('vanished_lightning'), ('ModelCheckpoint', 'Settings')
    for name in names: setattr(home, name, type(name, (dict,) if name == 'Settings' else (), dict(__module__='vanished_lightning')))
    sys.modules['vanished_lightning'] = home
    try: torch.save(dict(epoch=3, callbacks={home.ModelCheckpoint: dict(best=torch.tensor(.5))}, optimizer_states=[dict(state={0: torch.ones(2)}, owner=home.ModelCheckpoint())],
                         state_dict=OrderedDict(tensors), hparams_name='kwargs', hyper_parameters=dict(config=settings), extra=home.Settings(a=1)), path)
    finally: del sys.modules['vanished_lightning']


def test_lightning_file_with_unknown_classes(tmp_path):
    model = build()
    lightning_like(tmp_path/'saved.ckpt', official_tensors(model), num_heads=3, hidden_size=12)
    with pytest.raises(Exception): torch.load(tmp_path/'saved.ckpt', weights_only=True)
    loaded = read_vlc(tmp_path/'saved.ckpt', decoder_heads=2)
    assert loaded.model.config == TINY and same(loaded.model.state_dict(), model.state_dict())
    assert same(open_official(tmp_path/'saved.ckpt').tensors, official_tensors(model))
    assert 'text_embeddings.position_ids' in official_tensors(loaded.model)


def test_published_widths_go_before_lightnings_settings():
    "The authors' trunk ignores num_heads, so a large model may say 12"
    shape = Official({}, dict(num_heads=12))
    from vl_tutor.models.vlc_files import attention_heads
    assert attention_heads(shape, 1024) == 16 and attention_heads(shape, 24) == 12 and attention_heads(shape, 1024, given=4) == 4
    for beside in (dict(num_heads='seven'), dict(num_heads=7), dict(heads=-3), dict(num_heads=[12])):
        with pytest.raises(ValueError, match='heads'): attention_heads(Official({}, beside), 24)


# ---- what is made, copied, stretched, left out ----

def test_pairs_get_a_row_and_ranking_a_head_of_its_own():
    source = build()
    loaded = read_vlc(official_tensors(source), tasks=('itm', 'nlvr2', 'rank'), **HEADS)
    model = loaded.model
    assert torch.equal(model.modality.weight[:2], source.modality.weight) and torch.equal(model.modality.weight[2], source.modality.weight[1])
    assert torch.equal(model.heads['rank'].weight[0], source.heads['itm'].weight[1]) and torch.equal(model.heads['rank'].bias[0], source.heads['itm'].bias[1])
    with torch.no_grad(): model.heads['rank'].weight.zero_()
    assert torch.equal(model.heads['itm'].weight, source.heads['itm'].weight), 'a copy, not a view'
    assert set(loaded.changed) == {'token_type_embeddings.weight', 'rank_output.weight', 'rank_output.bias'}
    assert loaded.new == [f'nlvr2_classifier.{i}.{kind}' for i in (0, 1, 3) for kind in ('weight', 'bias')] and {k.split('.')[0] for k in loaded.unused} == {'mlm_score'}
    only = read_vlc(official_tensors(source), tasks=('rank',), **HEADS)
    assert torch.equal(only.model.heads['rank'].weight[0], source.heads['itm'].weight[1]) and not only.new


@pytest.mark.parametrize('size', [32, (16, 24), (24, 8), 8])
def test_both_tables_are_stretched(size):
    source = build()
    loaded = read_vlc(official_tensors(source), image_size=size, **HEADS)
    assert same(loaded.model.state_dict(), source.resized(size).state_dict()) and loaded.model.config.image_size == size
    assert set(loaded.changed) == {'transformer.pos_embed', 'transformer.decoder_pos_embed'} and torch.equal(loaded.model.trunk.positions[0], source.trunk.positions[0])
    again = read_vlc(official_tensors(loaded.model), config=loaded.model.config)
    assert same(again.model.state_dict(), loaded.model.state_dict()) and not again.changed


def test_another_list_of_answers_makes_a_new_head():
    theirs = official_tensors(build(replace(TINY, tasks=('vqa',), answers=5)))
    before, state = read_vlc(theirs, **HEADS), torch.random.get_rng_state()
    assert before.model.config.answers == 5 and not before.new
    new = [read_vlc(theirs, answers=9, seed=s, **HEADS) for s in (0, 0, 1)]
    assert len(new[0].new) == len(new[0].unused) == 6 and new[0].model.config.answers == 9
    a, b, c = (loaded.model.heads['vqa'][0].weight for loaded in new)
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.random.get_rng_state()), 'the caller\'s dice are left alone'


def test_a_file_is_never_shared_nor_halved():
    theirs = official_tensors(build())
    kept = {k: t.clone() for k, t in theirs.items()}
    model = load_vlc_weights(theirs, **HEADS)
    with torch.no_grad():
        for p in model.parameters(): p.add_(1)
    assert same(theirs, kept)
    half = load_vlc_weights({k: t.half() if t.is_floating_point() else t for k, t in theirs.items()}, **HEADS)
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def mae(layers=1):
    torch.manual_seed(0)
    return MAE(ViTTrunk(image_size=16, patch_size=8, width=12, layers=2, heads=3, hidden=20), dim=8, layers=layers, heads=2)


def test_masked_auto_encoders_give_trunk_and_decoder(tmp_path):
    source = mae()
    torch.save(dict(model=official_tensors(source), epoch=9), tmp_path/'mae.pth')
    loaded = read_vlc(tmp_path/'mae.pth', config=replace(TINY, decoder_hidden=None, image_size=24))
    ours, theirs = loaded.model.state_dict(), source.state_dict()
    tables = {'trunk.positions', 'decoder.positions'}
    assert loaded.kind == 'mae' and all(torch.equal(ours[k], t) for k, t in theirs.items() if k not in tables)
    assert set(loaded.changed) == {'transformer.pos_embed', 'transformer.decoder_pos_embed'}
    assert {n.split('.')[0] for n in loaded.new} == {'text_embeddings', 'token_type_embeddings', 'pooler', 'mlm_score', 'itm_score'} and not loaded.unused
    assert loaded.model.heads['itm'].bias.eq(0).all() and 0 < loaded.model.text.words.weight.std() < .03


def test_an_encoder_alone_leaves_the_decoder_random():
    theirs = {k: t for k, t in official_tensors(mae()).items() if not k.startswith(('decoder_', 'mask_token'))}
    loaded = read_vlc(theirs, config=TINY)
    assert any(n.startswith('transformer.decoder_blocks') for n in loaded.new) and 'transformer.mask_token' in loaded.new
    assert torch.equal(loaded.model.decoder.positions, VLC(TINY).decoder.positions)
    part = theirs | {'mask_token': torch.zeros(1, 1, 8)}
    with pytest.raises(ValueError, match='decoder'): read_vlc(part, config=TINY)
    assert set(mae_keys().to_ours(official_tensors(mae()))) == set(mae().state_dict())


@pytest.mark.parametrize('pool, new', [('gap', ['fc_norm.bias', 'fc_norm.weight', 'head.bias', 'head.weight']), ('cls', ['head.bias', 'head.weight'])])
@pytest.mark.parametrize('kind', ['vlc', 'mae'])
def test_a_trunk_moves_into_the_classifier(pool, new, kind):
    source = build() if kind == 'vlc' else mae()
    loaded = read_classifier(official_tensors(source), classes=4, pool=pool, heads=3)
    prefix = 'transformer.' if kind == 'vlc' else ''
    beyond = [k.removeprefix(prefix) for k in official_tensors(source) if k.startswith(prefix) and re.match('mask_token|decoder_' + '|norm'*(pool == 'gap'), k.removeprefix(prefix))]
    assert sorted(loaded.new) == new and sorted(loaded.unused) == sorted(beyond) and loaded.kind == kind
    assert torch.equal(loaded.model.trunk.encoder.blocks[1].attn.to_qkv.weight, source.trunk.encoder.blocks[1].attn.to_qkv.weight)
    if pool == 'cls': assert torch.equal(loaded.model.norm.weight, source.trunk.norm.weight)
    taken = Classifier.from_vlc(source, 4, pool=pool)
    assert torch.equal(loaded.model.trunk.positions, taken.trunk.positions) and loaded.model.trunk.positions.requires_grad


def test_the_report_is_the_authors():
    "What their own code said when it loaded a VLC trunk, recorded in the fixtures"
    for folder in sorted(GOLDEN.glob('imagenet_*')):
        told = json.loads((folder/'config.json').read_text())
        c, said = told['config'], told['loading_vlc_transformer_weights']
        depth = len({k.split('.')[1] for k in said['unexpected'] if k.startswith('decoder_blocks.')})
        giver = build(VLCConfig(c['image_size'], c['patch_size'], c['hidden_size'], c['num_layers'], c['num_heads'], 4*c['hidden_size'], 9, 4, 8, depth, 2))
        loaded = read_classifier(official_tensors(giver), classes=c['num_classes'], pool='gap' if c['global_pool'] else 'cls', heads=c['num_heads'])
        assert sorted(loaded.new) == sorted(said['missing']) and sorted(loaded.unused) == sorted(said['unexpected'])


# ---- refusals ----

def refused(call, *words):
    with pytest.raises(ValueError) as found: call()
    said = str(found.value)
    assert '\n' not in said and all(str(w) in said for w in words), said


def changed(how: str) -> dict:
    theirs = official_tensors(build())
    if how == 'renamed': theirs['transformer.wings'] = theirs.pop('transformer.norm.weight')
    if how == 'shape': theirs['pooler.dense.weight'] = torch.zeros(12, 13)
    if how == 'no block': theirs = {k: t for k, t in theirs.items() if '.blocks.0.norm1' not in k}
    if how == 'half a head': del theirs['mlm_score.bias']
    if how == 'no table': del theirs['transformer.pos_embed']
    if how == 'no text': theirs = {k: t for k, t in theirs.items() if not k.startswith('text_embeddings.')}
    if how == 'odd table': theirs['transformer.pos_embed'] = torch.zeros(1, 4, 12)
    return theirs


@pytest.mark.parametrize('how, words', [('renamed', ['transformer.wings', 'transformer.norm.weight']), ('shape', ['pooler.weight', '(12, 13)']), ('no block', ['transformer.blocks.0.norm1.bias']),
                                        ('half a head', ['mlm_score.bias']), ('no table', ['lacks transformer.pos_embed']), ('no text', ['text_embeddings']), ('odd table', ['4 positions'])])
def test_a_file_that_does_not_fit(tmp_path, how, words):
    save_file(changed(how), tmp_path/'wrong.safetensors')
    torch.save(dict(state_dict=changed(how)), tmp_path/'wrong.ckpt')
    for name in ('wrong.safetensors', 'wrong.ckpt'): refused(lambda: read_vlc(tmp_path/name, **HEADS), tmp_path/name, *words)


@pytest.mark.parametrize('name', ['cut.ckpt', 'cut.safetensors', 'empty.ckpt', 'text.pth', 'none.ckpt'])
def test_a_file_that_is_none(tmp_path, name):
    lightning_like(tmp_path/'whole.ckpt', official_tensors(build()))
    save_official(build(), tmp_path/'whole.safetensors')
    if name.startswith('cut'): (tmp_path/name).write_bytes((tmp_path/name.replace('cut', 'whole')).read_bytes()[:-1500])
    elif name != 'none.ckpt': (tmp_path/name).write_bytes(b'' if name.startswith('empty') else b'no checkpoint')
    refused(lambda: read_vlc(tmp_path/name), tmp_path/name)


def test_files_of_somebody_else():
    refused(lambda: read_vlc({'weight': torch.zeros(2)}), 'none of VLC')
    refused(lambda: read_vlc(official_tensors(build(ClassifierConfig(16, 8, 12, 2, 3, 20, 7)))), 'classifier')
    refused(lambda: read_classifier({'weight': torch.zeros(2)}), 'no file')
    refused(lambda: read_classifier(official_tensors(build()), heads=3), 'classes=')
    refused(lambda: read_vlc(official_tensors(build())), 'heads=')
    refused(lambda: read_vlc(official_tensors(build()), heads=5), 'divide')
    refused(lambda: read_vlc(official_tensors(build()), image_size=20, **HEADS), '20')
    refused(lambda: read_vlc(official_tensors(build()), tasks=('dance',), **HEADS), 'dance')
    refused(lambda: read_vlc(official_tensors(build()), config=replace(TINY, width=24)), 'wrong shape')
    refused(lambda: official_tensors(torch.nn.Linear(2, 2)), 'Linear')
    assert kind_of(['some.key']) is None


def test_names_go_into_safetensors_only(tmp_path):
    refused(lambda: save_official(build(), tmp_path/'x.ckpt'), 'x.ckpt', '.safetensors')
    assert not list(tmp_path.iterdir())


def test_a_model_without_decoder_leaves_it_out():
    for source in (build(), mae()):
        loaded = read_vlc(official_tensors(source), config=replace(TINY, decoder_layers=0, image_size=24))
        assert loaded.model.decoder is None and 'transformer.mask_token' in loaded.unused and set(loaded.changed) == {'transformer.pos_embed'}

"`vl-tutor convert` knows files of VLC and its relatives: there and back, cards that tell, refusals that leave nothing behind."
import json
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensors import same
from test_mistakes import refused, snapshot
from vl_tutor.models.classifier import Classifier, ClassifierConfig
from vl_tutor.models.vlc import VLC, VLCConfig
from vl_tutor.models.vlc_files import official_tensors

LIGHTNING = Path(__file__).parents[1]/'golden'/'vlc'/'lightning_ckpt'


def test_lightning_there_and_back(run, tmp_path):
    (tmp_path/'heads.json').write_text('{"decoder_heads": 1}')
    r = run('convert', LIGHTNING/'saved.ckpt', tmp_path/'ours', '--config', tmp_path/'heads.json', '--json')
    assert r.code == 0, r.err
    card = json.loads((tmp_path/'ours'/'card.json').read_text())
    assert card['class'] == 'VLC' and card['kind'] == 'vlc' and card['config']['heads'] == 2 and not card['new'] + card['unused']
    r = run('convert', tmp_path/'ours', tmp_path/'theirs.safetensors')
    assert r.code == 0, r.err
    assert same(load_file(tmp_path/'theirs.safetensors'), load_file(LIGHTNING/'weights.safetensors'))
    r = run('convert', tmp_path/'theirs.safetensors', tmp_path/'again')              # our header tells the heads
    assert r.code == 0 and same(load_file(tmp_path/'again'/'model.safetensors'), load_file(tmp_path/'ours'/'model.safetensors')), r.err


@pytest.mark.parametrize('model', [VLC(VLCConfig(16, 8, 12, 1, 3, 20, 30, 6, decoder_layers=0, positions='learned')), Classifier(ClassifierConfig(16, 8, 12, 1, 3, 20, 7))], ids=['vilt', 'classifier'])
def test_relatives(run, tmp_path, model):
    torch.save(dict(state_dict=official_tensors(model)), tmp_path/'theirs.ckpt')
    (tmp_path/'heads.json').write_text('{"heads": 3}')
    r = run('convert', tmp_path/'theirs.ckpt', tmp_path/'ours', '--config', tmp_path/'heads.json')
    assert r.code == 0, r.err
    assert same(load_file(tmp_path/'ours'/'model.safetensors'), {k: t.detach() for k, t in model.state_dict().items()})
    assert run('convert', tmp_path/'ours', tmp_path/'back.safetensors').code == 0
    assert same(load_file(tmp_path/'back.safetensors'), official_tensors(model))


@pytest.mark.parametrize('config, word', [(None, 'decoder_heads'), ('{"decoder_heads": 3}', 'divide'), ('{"decoder_heads": "many"}', 'many'), ('{"heads": 2, "legs": 4}', 'lacks'),
                                          ('{"config": {"class": "ClassifierConfig"}}', 'ClassifierConfig'), ('{"config": 3}', 'config')])
def test_sizes_that_do_not_help(run, tmp_path, config, word):
    if config: (tmp_path/'sizes.json').write_text(config)
    before = snapshot(tmp_path)
    refused(run('convert', LIGHTNING/'saved.ckpt', tmp_path/'ours', *(['--config', tmp_path/'sizes.json'] if config else [])), word)
    assert snapshot(tmp_path) == before


def test_a_wrong_key_is_listed_and_nothing_written(run, tmp_path):
    theirs = load_file(LIGHTNING/'weights.safetensors')
    theirs['transformer.wings'] = theirs.pop('transformer.norm.bias')
    save_file(theirs, tmp_path/'wrong.safetensors')
    (tmp_path/'heads.json').write_text('{"heads": 2, "decoder_heads": 1}')
    before = snapshot(tmp_path)
    refused(run('convert', tmp_path/'wrong.safetensors', tmp_path/'ours', '--config', tmp_path/'heads.json'), 'wrong.safetensors', 'transformer.wings', 'transformer.norm.bias')
    assert snapshot(tmp_path) == before

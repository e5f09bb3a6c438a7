"VLC's claims: hard false pairs, every arm in a few steps, scores, the record, the costs."
from dataclasses import asdict, replace
import pytest
import torch
from vl_tutor.models.vlc import SIZES
from vl_tutor.recipes import vlc_claims as claims
from vl_tutor.recipes.two_worlds import pages
from vl_tutor.recipes.vlc_claims import (ARMS, PLAN, PROBE, VLCRun, caption_batch, claim_model, inside, multiply_adds, planned, pretrain_trunk,
                                         read_claims, record_claims, run_claim, score_claim, time_dropping)
from vl_tutor.training.vlc_objectives import match_labels

pytestmark = pytest.mark.usefixtures('one_thread')
TINY = dict(steps=2, train=64, test=16, batch=8, every=1)


@pytest.mark.parametrize('arm', ['hard', 'easy'])
def test_each_picture_is_told_truly_and_in_a_lie(arm):
    data, rows = pages('grid', 'train', 64), torch.arange(64)
    torch.manual_seed(0)
    pairs = caption_batch(data, rows, ARMS[arm])['pairs']
    assert match_labels(128, pairs['match_order']).tolist() == [1]*64 + [0]*64
    assert torch.equal(pairs['ids'][:64], data.ids) and torch.equal(pairs['image'][:64], pairs['image'][64:])
    swap = (pairs['ids'][64:] != data.ids).any(1)
    assert swap.float().mean() == pytest.approx(ARMS[arm].hard, abs=.15)
    assert torch.equal(pairs['ids'][64:][swap], data.swapped[swap])
    own = (pairs['false_image'][64:] == pairs['image'][64:]).all((1, 2, 3))
    assert own[swap].all() and own[~swap].float().mean() < .2


def test_an_ordinary_batch_is_told_once():
    batch = caption_batch(pages('grid', 'train', 64), torch.arange(8))
    assert 'pairs' not in batch and {len(v) for v in batch.values()} == {8}


@pytest.mark.parametrize('arm', ARMS)
def test_every_arm_runs_and_trains_what_it_says(arm):
    run = VLCRun(arm, 'grid', 0, **TINY)
    done = run_claim(run)
    assert {**asdict(run), **done} == done and len(done['scores']) == 2
    assert set(done['history'][0]) == {'step', *ARMS[arm].losses}
    assert bool(done['before']) == (ARMS[arm].start != 'random')
    assert ('mim_right' in done['scores'][0]) == (claim_model(run).decoder is not None)
    if 'itm' not in ARMS[arm].losses: assert 'wpa' in ARMS[arm].losses or ARMS[arm].losses == ('mlm',)


def test_starts_change_what_they_should():
    for arm, changed in (('mae', {'trunk', 'decoder'}), ('labels', {'trunk'})):
        run = VLCRun(arm, 'grid', 0, **TINY)
        model, before = claim_model(run).train(), claim_model(run).state_dict()
        pretrain_trunk(model, run)
        assert {n.split('.')[0] for n, p in model.state_dict().items() if not torch.equal(p, before[n])} == changed


def test_scoring_changes_nothing():
    data, model = pages('free', 'test', 16), claim_model(VLCRun('all', 'free', 0)).train()
    state = torch.get_rng_state()
    first, second = score_claim(model, data), score_claim(model, data)
    assert first == second and model.training and torch.equal(state, torch.get_rng_state())


def test_boxes_that_are_pointed_at():
    boxes = inside(pages('grid', 'test', 20), 4)
    assert (boxes.sum(2) == 4).all() and not (boxes[:, 0] & boxes[:, 1]).any()


def test_the_record_resumes(tmp_path, monkeypatch):
    path, plan = tmp_path/'runs.jsonl', (('mlm', 'grid', 1), ('all', 'free', 1))
    sizes = dict(train=32, test=8, batch=4)
    with pytest.raises(ValueError, match='no recorded runs'): read_claims(path)
    record_claims(path, seeds=(0,), plan=plan, **sizes)
    first = path.read_text()
    made = []
    monkeypatch.setattr(claims, 'run_claim', lambda run: made.append(run) or run_claim(run))
    runs = record_claims(path, seeds=(0, 1), plan=plan, **sizes)
    assert [(r.arm, r.seed) for r in made] == [('mlm', 1), ('all', 1)]
    assert path.read_text().startswith(first) and len(runs) == 4 and read_claims(path) == runs


def test_a_recorded_run_can_be_made_again():
    recorded = next(r for r in read_claims() if r['seed'] == PROBE.seed and r['steps'] == PROBE.steps)
    again = run_claim(PROBE)
    for name, value in recorded['history'][-1].items(): assert again['history'][-1][name] == pytest.approx(value, abs=2e-3), name
    assert again['scores'][-1]['mim_right'] == pytest.approx(recorded['scores'][-1]['mim_right'], abs=2e-3)


def test_the_record_is_the_plan():
    runs = read_claims()
    key = lambda d: (d['arm'], d['world'], d['seed'], d['steps'], d['batch'], d['lr'], d['train'], d['test'])
    assert {key(r) for r in runs} == {key(asdict(r)) for r in planned()}
    assert {arm for arm, *_ in PLAN} == {*ARMS, 'cost'}


@pytest.mark.parametrize('side,whole,dropped,painter', [(224, (237, 21.2), (119, 10.4), 5.3), (384, (617, 59.4), (271, 24.4), 17.2),
                                                        (576, (1337, 146.5), (559, 53.2), 46.4)])
def test_published_costs(side, whole, dropped, painter):
    config = replace(SIZES['base'], image_size=side)
    for ratio, (tokens, giga) in ((0., whole), (.6, dropped)):
        cost = multiply_adds(config, ratio)
        assert cost['tokens'] == tokens and round(cost['trunk']/1e9, 1) == giga and round(cost['decoder']/1e9, 1) == painter


def test_products_agree_with_the_counter():
    from torch.utils.flop_counter import FlopCounterMode
    config = replace(claims.COSTLY, width=64, hidden=256)
    model, words = claims.VLC(config).eval(), torch.full((1, 12), 5)
    images, noise = torch.randn(1, 3, 96, 96), torch.rand(1, 144)
    for ratio in (0., .6):
        seen = model.see(images, noise=noise, ratio=ratio)
        tokens = torch.cat([model.text(words), seen.tokens], 1)
        with FlopCounterMode(display=False) as counter: model.trunk(tokens)
        assert counter.get_total_flops()/2 == pytest.approx(multiply_adds(config, ratio)['trunk'], rel=.001)


def test_timing_tells_trunk_and_decoder_apart():
    small = replace(claims.COSTLY, image_size=32, width=16, heads=2, hidden=32, layers=1, decoder_width=16, decoder_heads=2)
    rows = time_dropping(config=small, ratios=(0., .5), batch=2)
    assert [r['tokens'] for r in rows] == [29, 21] and rows[0]['bytes'] > rows[1]['bytes']
    assert all(r['trunk_seconds'] > 0 < r['decoder_seconds'] for r in rows) and rows[0]['decoder'] == rows[1]['decoder']

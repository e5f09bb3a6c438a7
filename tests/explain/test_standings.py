"The standings: what is asked, how layers are chosen, one picture's scores, the record and its way to go on."
import json
from dataclasses import asdict, replace
import pytest
import torch
from vl_tutor.explain import standings
from vl_tutor.explain.one_call import METHODS, explain
from vl_tutor.explain.standings import (ENTRANTS, SURVEY, SYSTEMS, Entrant, ask_captions, ask_things, blind_captioner, choose_ways,
                                        mean_and_error, pointing_rows, read_standings, record_standings, run_entrant, score_picture,
                                        thing_asked, tools_of, ways)
from vl_tutor.explain.scoring import centre_map, pointing_game
from vl_tutor.recipes.captioner import load_captioner
from vl_tutor.recipes.vlc import load_vlc
from vl_tutor.world.questions import read_question
from vl_tutor.world.tasks import make_task, things

TINY = dict(valid=2, test=2, costly=1)
pytestmark = pytest.mark.usefixtures('one_thread')


def test_the_thing_asked_has_the_answer():
    batch, asked = make_task('question', 'pair', 'test').batch(range(400)), 0
    for question, answer, seen in zip(batch['question'], batch['answer'], things(batch['scenes'])):
        k = thing_asked(question, seen)
        said = read_question(question)
        assert (k is None) == (said['name'] not in ('value', 'place'))
        if k is None: continue
        asked += 1
        assert seen[k]['kind' if said['x'] in ('shape', 'digit') else said['x']] == answer
    assert asked > 40


def test_the_box_of_the_thing_asked_comes_first():
    for a in ask_things('test', 20):
        said = read_question(a.text)
        if said['name'] == 'place':
            side = ('leftmost', 'rightmost', 'topmost', 'lowest').index(said['e'])
            middle = (a.boxes[:, side//2] + a.boxes[:, side//2 + 2])*(-1 if side % 2 else 1)
            assert middle[0] < middle[1]
    assert len(ask_things('test', 20)) == 20


def test_rows_are_words_of_objects_or_the_answer():
    tool, (a,) = load_vlc(), ask_captions('test', 1, 'shapes')
    for target in ('words', 'match'):
        ex = explain(tool, a.picture, a.text, target)
        rows, whose = pointing_rows(ex, target)
        words = a.text.split()
        assert [ex.labels[i] for i in rows] == [*words[1:4], *words[-3:]] and whose.tolist() == [0]*3 + [1]*3
    (q,) = ask_things('test', 1)
    rows, whose = pointing_rows(explain(tool, q.picture, q.text, 'answer'), 'answer')
    assert (rows.tolist(), whose.tolist()) == ([0], [0])


@pytest.mark.parametrize('system', SYSTEMS)
def test_every_way_gives_a_map(system):
    target, load, ask = SYSTEMS[system]
    (a,) = ask('valid', 1)
    ex = explain(load(), a.picture, a.text, target)
    for method in METHODS:
        found = ways(ex, method)
        assert found and all(ex.maps(method, **way).shape[1:] == (6, 6) for way in found)
        if method not in ('rollout', 'relevance'):
            assert {w['layer'] for w in found if w} == set(range(len(ex.readers(method))))


def test_the_way_with_the_largest_margin_is_chosen():
    target, load, ask = SYSTEMS['words']
    chosen, found = choose_ways(load(), target, ask('valid', 3))
    assert set(chosen) == set(METHODS) == set(found)
    for method, rows in found.items():
        margin = {json.dumps(way): own - other for way, own, other in rows}
        assert margin[json.dumps(chosen[method])] == pytest.approx(max(margin.values()), abs=1e-6)


def test_truth_noise_and_middle_answer_as_they_must():
    target, load, ask = SYSTEMS['match']
    tool, (a,) = load(), ask('test', 1)
    chosen = {m: {} for m in METHODS}
    cheap = score_picture(tool, tool, a, target, chosen, 0, False)
    full = score_picture(tool, tool, a, target, chosen, 0, True)
    assert set(cheap) == {*METHODS, 'noise', 'centre', 'truth'} and set(cheap['noise']) == {'own', 'other', 'iou'}
    assert (full['truth']['own'], full['truth']['other']) == (1, 0) and full['truth']['iou'] < 1
    (_, whose), hits = pointing_rows(explain(tool, a.picture, a.text, target), target), pointing_game(centre_map(2, (6, 6)), a.boxes)
    assert hits.tolist() == [.25, 0] and (full['centre']['own'], full['centre']['other']) == (hits[whose].mean(), hits[1 - whose].mean())
    for m in METHODS: assert full[m]['sanity'] == pytest.approx(1, abs=1e-4) and cheap[m]['own'] == full[m]['own']
    assert abs(full['noise']['sanity']) < .5
    for m in ('relevance', 'truth'): assert 0 < full[m]['deletion'] < full['noise']['deletion'] < full['noise']['insertion'] < full[m]['insertion'] < 1


def test_the_blind_captioner_keeps_its_towers_and_its_seed():
    tool = load_captioner()
    before = {k: v.clone() for k, v in tool.model.state_dict().items()}
    blind, again = (blind_captioner(tool, steps=2, batch=4) for _ in range(2))
    for name, p in blind.model.state_dict().items():
        assert torch.equal(p, again.model.state_dict()[name])
        if name.startswith(('vision.', 'lm.')): assert torch.equal(p, before[name])
    assert not torch.equal(blind.model.gated['0'].gate_attn, before['gated.0.gate_attn']) and not blind.model.training
    assert all(torch.equal(v, before[k]) for k, v in tool.model.state_dict().items())


def test_impossible_entrants_get_one_sentence():
    with pytest.raises(ValueError, match='no entrant words with blind weights'): tools_of(Entrant('words', 'blind'))
    with pytest.raises(ValueError, match='no entrant words with old weights'): tools_of(Entrant('words', 'old'))


def test_mean_and_error():
    mean, error, n = mean_and_error([0., 1, 0, 1])
    assert (mean, n) == (.5, 4) and error == pytest.approx((1/3)**.5/2, abs=1e-4)


def test_the_record_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, made = tmp_path/'standings.jsonl', []
    answer, shuffled = Entrant('answer', **TINY), Entrant('answer', 'shuffled', **TINY)
    with pytest.raises(ValueError, match='trained weights, which come first'): record_standings(path, [shuffled])
    first = record_standings(path, [answer])
    real = standings.run_entrant
    monkeypatch.setattr(standings, 'run_entrant', lambda e, chosen=None: made.append((e, chosen)) or real(e, chosen))
    both = record_standings(path, [answer, shuffled])
    assert made == [(shuffled, first[0]['chosen'])] and len(both) == 2 == len(read_standings(path))
    assert read_standings(path)[0] == json.loads(json.dumps(first[0])) and both[1]['choices'] == {}
    with pytest.raises(ValueError, match='no standings'): read_standings(tmp_path/'none.jsonl')


def test_the_stored_survey_is_made_again():
    stored = next(r for r in read_standings() if r['seed'] == SURVEY.seed)
    again = json.loads(json.dumps(run_entrant(SURVEY)))
    assert stored['chosen'] == again['chosen'] and {k: stored[k] for k in asdict(SURVEY)} == asdict(SURVEY)
    for method, row in stored['scores'].items():
        for name, (mean, _, n) in row.items():
            assert again['scores'][method][name][0] == pytest.approx(mean, abs=2e-3) and again['scores'][method][name][2] == n


def test_the_record_is_complete_and_precise():
    runs = [r for r in read_standings() if r['seed'] == 0]
    assert {(r['system'], r['weights']) for r in runs} == {(e.system, e.weights) for e in ENTRANTS if e.seed == 0}
    for r in runs:
        assert set(r['scores']) == {*METHODS, 'noise', 'centre', 'truth'}
        for row in r['scores'].values():
            assert all(error <= .026 for name, (_, error, _) in row.items() if name in ('own', 'other', 'iou'))
            assert all(error <= .07 for name, (_, error, _) in row.items())
            assert {n for _, _, n in row.values()} == {r['test'], r['costly']}

"Scores against the double loop, recall against every order of the answers, runs that stop and go on, the authors' routine on their own file."
import json
import math
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from vl_tutor.data.tables import open_tables, retrieval_order
from vl_tutor.data.transforms import normalised, squeezed
from vl_tutor.models.parity import read_golden
from vl_tutor.models.vilt import see_ragged
from vl_tutor.models.vlc import BASE, SIZES, VLC, VLCConfig, init_vlc
from vl_tutor.training.retrieval import (bar, counted, evaluation_cost, fingerprint, hit_chance, match_score, open_scores, published_recall, recall, recall_ref, score_all,
                                         score_all_ref, text_lengths)

torch.set_num_threads(1)
GOLDEN = Path(__file__).resolve().parents[1]/'golden'/'vlc'


def small(*tasks, seed=0) -> VLC: return init_vlc(VLC(VLCConfig(16, 8, 16, 1, 2, 32, 12, 9, 8, 0, 1, tasks=tasks or ('rank',))), seed).eval()

def material(seed=0, pictures=5, texts=7):
    dice = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (texts, 1), generator=dice)
    images, ids = torch.randn(pictures, 3, 16, 16, generator=dice), torch.randint(3, 12, (texts, 9), generator=dice)
    return images, ids, (torch.arange(9) < lengths).long()


# ---- scores ----

@pytest.mark.parametrize('tasks', (('rank',), ('itm',)))
@pytest.mark.parametrize('batch_size', (1, 3, 1000))
def test_all_pairs_are_the_double_loop(tasks, batch_size):
    model, (images, ids, mask) = small(*tasks), material()
    torch.testing.assert_close(score_all(model, images, ids, mask, batch_size=batch_size), score_all_ref(model, images, ids, mask, match_score(model)), atol=1e-6, rtol=1e-5)

def test_match_scores_order_as_probabilities_do():
    model, (images, ids, mask) = small('itm'), material()
    scores = score_all(model, images[:1], ids, mask)[0]
    probable = model.match(images[:1].expand(7, -1, -1, -1), ids, mask).softmax(1)[:, 1]
    torch.testing.assert_close(scores.sigmoid(), probable, atol=1e-6, rtol=1e-5)

def test_each_picture_is_embedded_once():
    model, (images, ids, mask) = small(), material(pictures=7, texts=30)
    seen, see = [], model.see
    score_all(model, images, ids, mask, batch_size=4, see=lambda part: seen.append(len(part)) or see(part))
    assert sum(seen) == 7

def test_the_mode_comes_back_and_dropout_stays_out():
    model, (images, ids, mask) = small().train(), material()
    a, b = (score_all(model, images, ids, mask) for _ in range(2))
    assert model.training and torch.equal(a, b)

def test_pictures_of_any_shape():
    model, (images, ids, mask) = small(), material()
    ragged = [images[0], images[1, :, :8], images[2, :, :, :8]]
    see = lambda part: see_ragged(model, part)
    together, alone = score_all(model, ragged, ids, mask, see=see), [score_all(model, [p], ids, mask, see=see) for p in ragged]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together[:1], score_all(model, images[:1], ids, mask), atol=1e-6, rtol=1e-5)

def test_progress_counts_pairs_to_the_end():
    model, heard = small(), []
    score_all(model, *material(), batch_size=4, progress=lambda *at: heard.append(at))
    assert heard[-1] == (35, 35) and [done for done, _ in heard] == sorted({done for done, _ in heard})

def test_what_cannot_be_scored():
    model, (images, ids, mask) = small(), material()
    with pytest.raises(ValueError, match='0 pictures and 7 texts'): score_all(model, images[:0], ids, mask)
    with pytest.raises(ValueError, match='text 2 is empty'): score_all(model, images, ids, torch.cat([mask[:2], mask[2:]*0]))
    with pytest.raises(ValueError, match='padding before its end'): text_lengths(ids[:1], tensor([[1, 0, 1, 0, 0, 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match=r'a mask \(7, 3\) for texts \(7, 9\)'): score_all(model, images, ids, mask[:, :3])
    with pytest.raises(ValueError, match='not numbers'): score_all(model, images*torch.nan, ids, mask)


# ---- stop and go on ----

def stopped(model, images, ids, mask, file, after=2):
    "A run that is interrupted after some pictures"
    left = [after]
    def see(part):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return model.see(part)
    with pytest.raises(KeyboardInterrupt): score_all(model, images, ids, mask, batch_size=1, see=see, file=file)

def test_a_run_goes_on_where_it_stopped(tmp_path):
    model, (images, ids, mask) = small(), material()
    file, seen = tmp_path/'scores.npy', []
    stopped(model, images, ids, mask, file)
    assert 0 < np.isnan(np.load(file)).mean() < 1
    went_on = score_all(model, images, ids, mask, batch_size=1, file=str(file), see=lambda part: seen.append(len(part)) or model.see(part))
    assert sum(seen) == 3 and torch.equal(went_on, score_all(model, images, ids, mask, batch_size=1))
    assert torch.equal(score_all(model, images, ids, mask, file=file, see=None), went_on)

def test_scores_of_something_else_are_refused(tmp_path):
    model, (images, ids, mask) = small(), material()
    file = tmp_path/'scores.npy'
    stopped(model, images, ids, mask, file)
    for other, what in ((dict(model=small(seed=1)), 'weights'), (dict(ids=ids.flip(0), mask=mask.flip(0)), 'texts'), (dict(images=images.flip(0)), 'pictures'), (dict(images=images[:4]), 'pictures, shape')):
        given_ = dict(model=model, images=images, ids=ids, mask=mask) | other
        with pytest.raises(ValueError, match=f'scores.npy holds scores of other {what}: name a new file'): score_all(**given_, file=file)
    (tmp_path/'scores.json').unlink()
    with pytest.raises(ValueError, match='holds scores of other'): score_all(model, images, ids, mask, file=file)
    file.write_bytes(file.read_bytes()[:100])
    stored = dict(texts=fingerprint(ids, mask), pictures=fingerprint(*images[:1], *images[-1:]), weights=fingerprint(*model.state_dict().values()), shape=[5, 7])
    (tmp_path/'scores.json').write_text(json.dumps(stored))
    with pytest.raises(ValueError, match='scores.npy is damaged'): score_all(model, images, ids, mask, file=file)
    with pytest.raises(ValueError, match='ends in .npy'): score_all(model, images, ids, mask, file=tmp_path/'scores.txt')

def test_a_new_table_is_empty_and_whole(tmp_path):
    table = open_scores(tmp_path/'deep'/'s.npy', (2, 3), dict(a='x'))
    assert table.shape == (2, 3) and np.isnan(table).all() and json.loads((tmp_path/'deep'/'s.json').read_text()) == dict(a='x', shape=[2, 3])
    assert sorted(p.name for p in (tmp_path/'deep').iterdir()) == ['s.json', 's.npy']


# ---- recall ----

@st.composite
def tables(draw):
    "A few pictures and texts with many ties; every picture has a text"
    b = draw(st.integers(1, 4)); t = draw(st.integers(b, 5))
    owner = draw(st.permutations([*range(b), *draw(st.lists(st.integers(0, b - 1), min_size=t - b, max_size=t - b))]))
    scores = draw(st.lists(st.integers(0, 2), min_size=b*t, max_size=b*t))
    return tensor(scores).reshape(b, t).float(), tensor(owner)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables())
def test_recall_is_the_mean_over_all_orders(table):
    scores, owner = table
    ks = range(1, len(scores) + 1)
    fast, slow = recall(scores, owner, ks), recall_ref(scores, owner, ks)
    assert all(abs(a[k] - b[k]) < 1e-12 for a, b in zip(fast[:2], slow[:2]) for k in ks)

@pytest.mark.parametrize('size', (1, 13, 40, 10**6))
def test_blocks_count_what_the_whole_counts(size):
    torch.manual_seed(0)
    scores, row, column = torch.randint(5, (9, 13)).double(), torch.randint(5, (9,)).double(), torch.randint(5, (13,)).double()
    right, down = counted(scores, row, column, size=size)
    for i, compare in enumerate((torch.gt, torch.eq)):
        assert torch.equal(right[i], compare(scores, row[:, None]).sum(1)) and torch.equal(down[i], compare(scores, column).sum(0))

@pytest.mark.parametrize('seed', range(5))
def test_without_ties_both_rules_agree(seed):
    torch.manual_seed(seed)
    scores, owner = torch.randn(12, 40), torch.cat([torch.arange(12), torch.randint(12, (28,))])
    a, b = recall(scores, owner), published_recall(scores, owner)
    assert a.tied == 0 and [*a.tr] == [1, 5, 10] and all(math.isclose(x[k], y[k], abs_tol=1e-12) for x, y in zip(a[:2], b[:2]) for k in (1, 5, 10))

def test_a_model_that_says_the_same_of_everything_gets_chance():
    found = recall(torch.zeros(20, 40), torch.arange(40)//2)
    assert math.isclose(found.ir[1], 1/20) and math.isclose(found.ir[10], .5) and found.tied == 1
    assert math.isclose(found.tr[1], 2/40) and math.isclose(found.tr[5], 1 - (38*37*36*35*34)/(40*39*38*37*36))

def test_the_released_order_of_equals_is_a_matter_of_luck():
    "All scores equal: whichever picture `topk` lists first is always right, the others never"
    lucky = [published_recall(torch.zeros(12, 12), torch.full((12,), i)).ir[1] for i in range(12)]
    assert sorted(lucky) == [0.]*11 + [1.]
    assert all(math.isclose(recall(torch.zeros(12, 12), torch.full((12,), i)).ir[1], 1/12) for i in range(12))

def test_order_and_scale_do_not_matter():
    torch.manual_seed(0)
    scores, owner = torch.randint(0, 9, (11, 30)).float(), torch.cat([torch.arange(11), torch.randint(11, (19,))])
    rows, cols = torch.randperm(11), torch.randperm(30)
    moved = recall(scores[rows][:, cols]*3 - 7, rows.argsort()[owner[cols]])
    same = recall(scores, owner)
    assert all(math.isclose(a[k], b[k], abs_tol=1e-12) for a, b in zip(moved[:2], same[:2]) for k in a) and moved.tied == same.tied

def test_pictures_and_texts_that_belong_to_nobody_only_distract():
    scores = tensor([[.9, .1, .95], [.2, .8, 0.], [1., 0., 0.]])
    found = recall(scores, tensor([0, 1, -1]), [1, 2])
    assert found.ir == {1: .5, 2: 1.} and found.tr == {1: .5, 2: 1.}

def test_few_pictures_ask_for_smaller_ks():
    scores, owner = torch.randn(7, 7), torch.arange(7)
    assert [*recall(scores, owner).tr] == [1, 5] and [*recall(scores[:1, :1], owner[:1]).ir] == [1]
    for count in (recall, published_recall):
        with pytest.raises(ValueError, match='R@10 needs 10 pictures and texts, not 7 and 7'): count(scores, owner, (1, 10))

@pytest.mark.parametrize('scores, owner, says', [
    (torch.zeros(3, 4), torch.zeros(3), r'\(3,\) owners for scores \(3, 4\)'), (torch.zeros(3, 4), tensor([0, 1, 2, 3]), '0 to 3 for 3 pictures'),
    (torch.zeros(2, 2), tensor([-1, -1]), 'no text belongs'), (tensor([[0., torch.nan]]), tensor([0, 0]), 'not numbers')])
def test_what_cannot_be_counted(scores, owner, says):
    with pytest.raises(ValueError, match=says): recall(scores, owner)

def test_chances_by_hand():
    "2 better, 3 equal, 1 of them own: places 3, 4, 5 are left to chance; with 2 own, two of three places miss never"
    chance = lambda own, k: hit_chance(tensor([2]), tensor([3]), tensor([own]), k).item()
    assert [chance(1, k) for k in (2, 3, 4, 5, 6)] == pytest.approx([0, 1/3, 2/3, 1, 1])
    assert [chance(2, k) for k in (2, 3, 4)] == pytest.approx([0, 2/3, 1])


# ---- cost ----

def test_costs_are_those_of_the_sheet():
    "specs/vlc.md, experiment 3: 617 tokens 59.4 GMAC, 237 tokens 21.2, 1337 tokens 146.5"
    sizes = {384: 59.4, 224: 21.2, 576: 146.5}
    for side, giga in sizes.items(): assert round(evaluation_cost(VLCConfig(side), 1, 1).each/1e9, 1) == giga
    cost = evaluation_cost(BASE, 5000, 25_010)
    assert str(cost) == '125,050,000 pairs × 59.4 GMAC = 7.43 EMAC' and cost.time(2e14) == '10 hours'
    assert evaluation_cost(SIZES['retrieval'], 1, 1, 12).each < cost.each and evaluation_cost(VLCConfig((384, 192)), 1, 1).each < cost.each

def test_nobody_watches_nothing_is_written(capfd):
    with bar('7 pairs') as progress: progress(3, 7)
    assert capfd.readouterr() == ('', '')


# ---- the authors' routine, from their file to their numbers ----

def test_from_the_arrow_file_to_the_published_scores():
    config, weights, io = read_golden(GOLDEN/'retrieval_eval')
    c = config['config']
    data = open_tables(GOLDEN/'data_pipeline'/'arrow', 'f30k', 'test')
    order, rows = retrieval_order(data), data.records.table['image']
    images = torch.stack([normalised(squeezed(picture, c['image_size'])) for picture in map(opened, (rows[r].as_py() for r in order['images']))])
    torch.testing.assert_close(images, io['in/image'], atol=1e-6, rtol=0.)
    assert set(zip(order['texts'], order['owner'].tolist())) == set(zip(config['texts'], io['in/text_img_index'].tolist()))
    where = [config['texts'].index(text) for text in order['texts']]             # python sets shuffle the captions of a picture
    found = recall(io['out/scores'][:, where], order['owner'])
    assert [found.ir[k] for k in (1, 5, 10)] == pytest.approx(io['out/ir_r1_r5_r10'].tolist(), abs=1e-6)
    assert [found.tr[k] for k in (1, 5, 10)] == pytest.approx(io['out/tr_r1_r5_r10'].tolist(), abs=1e-6)

def opened(data: bytes):
    import io as files
    from PIL import Image
    return Image.open(files.BytesIO(data)).convert('RGB')

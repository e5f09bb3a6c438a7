"Four downstream tasks on files as they were published and on the generated world: each is trained, scored and opened again in seconds."
import json
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file
from torch import tensor
import task_files as files
from vl_tutor.data.answers import vqa_accuracy
from vl_tutor.models.classifier import Classifier
from vl_tutor.models.vlc import VLC, VLCConfig, init_vlc
from vl_tutor.recipes.task_data import (PUBLISHED, TASKS, TINY, Source, TaskData, TaskRecipe, answerable, answers_of, choose_recipe, known_format,
                                        open_source, recipe_lines, right, without_broken, wrong_captions)
from vl_tutor.recipes.task_scores import Pictures, blind_choices, credit, parts_of, retrieval_scores, shuffled, table_of
from vl_tutor.recipes.vlc import VLCTool
from vl_tutor.recipes.vlc_tasks import evaluate_vlc, finetune_vlc, fitted, load_task, moved, open_start, task_learner
from vl_tutor.training.learner import StepLog
from vl_tutor.training.resume import Checkpoints
from vl_tutor.world.tasks import make_task, task_tokenizer

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = VLCConfig(32, 16, 16, 1, 2, 32, 150, 20, 0, 0, 1)
LAYOUTS = dict(questions=(files.vqav2, 'vqav2', ('train', 'val')), pairs=(files.nlvr2, 'nlvr2', (None, None)),
               retrieval=(files.karpathy, 'karpathy', (None, None)), classes=(files.imagenet, 'imagenet', (None, None)))


@pytest.fixture
def tool(): return VLCTool(init_vlc(VLC(SMALL)), task_tokenizer(), [], {})


def quick(task, **changes): return replace(TINY[task], batch=4, epochs=2, scenes=8, least=2, wrong=3, **changes)


@pytest.fixture(scope='module', params=list(TASKS))
def layout(request, tmp_path_factory):
    "A task, a folder in its published format, which format, which splits"
    make, name, splits = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(name)
    return request.param, make(folder), name, splits


def learnt(data, folder, tool, task, **more):
    return finetune_vlc(data, folder, task=task, start=tool, aside=6, **dict(recipe=quick(task)) | more)


# ---- end to end ----

def test_from_files_to_scores(layout, tool, tmp_path, capsys):
    task, data, name, splits = layout
    made = learnt(data, tmp_path/'run', tool, task, format=name, splits=splits)
    assert recipe_lines(quick(task)) in capsys.readouterr().out                      # printed at load
    assert {'model.safetensors', 'card.json', 'log.csv', 'run'} <= {p.name for p in (tmp_path/'run').iterdir()}
    card = json.loads((tmp_path/'run/card.json').read_text())
    assert card['task'] == task and card['recipe']['batch'] == 4 and card['left_out'] == (task == 'questions')
    again = load_task(tmp_path/'run')
    assert type(again.model) is (Classifier if task == 'classes' else VLC) and again.answers == made.answers
    found = evaluate_vlc(tmp_path/'run', data, task=task, format=name, split=splits[1], n=6)
    rows = found['scores'].values()
    assert found['samples'] == 6 and {'seen', 'shuffled', 'n'} <= set.intersection(*map(set, rows))
    assert all(0 <= v <= 1 for row in rows for k, v in row.items() if k != 'n')


def test_the_world_takes_the_same_path(tool, tmp_path):
    for task in TASKS:
        made = learnt('world', tmp_path/task, tool, task, level='one')
        assert made.card['samples'] == 8 and evaluate_vlc(made, 'world', task=task, level='one', n=4)['samples'] == 4


def test_other_formats(tool, tmp_path):
    for name, make, task in (('flickr30k', files.flickr30k, 'retrieval'), ('csv', files.own_csv, 'retrieval')):
        data = make(tmp_path/name) if (tmp_path/name).mkdir() is None else None
        made = learnt(data, tmp_path/f'{name} run', tool, task, format=name)
        assert {'TR R@1', 'IR R@1'} <= set(made.card['scores'])


@pytest.mark.parametrize('name, task', [('vilt_questions', 'questions'), ('vilt_pairs', 'pairs'), ('vilt_tables', 'retrieval')])
def test_the_authors_tables(name, task, tool, tmp_path):
    from vl_tutor.data.annotations import read_records
    from vl_tutor.data.tables import write_tables
    make, theirs, _ = LAYOUTS[task]
    (tmp_path/'raw').mkdir(); (tmp_path/'arrow').mkdir()
    make(tmp_path/'raw')
    coco = 'coco_caption_karpathy_'
    parts = dict(questions=[('train', 'vqav2_train'), ('val', 'vqav2_trainable_val'), ('val', 'vqav2_rest_val')],
                 pairs=[('train', 'nlvr2_train'), ('valid', 'nlvr2_dev'), ('test', 'nlvr2_test1')],
                 retrieval=[(part, coco + part) for part in ('train', 'restval', 'test')])[task]
    labels, more = {}, dict(vocabulary=files.NAMES) if task == 'questions' else {}
    for split, file in parts:
        write_tables(read_records(tmp_path/'raw', theirs, split, **more), tmp_path/'arrow'/f'{file}.arrow', root=tmp_path/'raw', split=split, labels=labels)
    made = learnt(tmp_path/'arrow', tmp_path/'run', tool, task, format=name)
    if task == 'questions': assert made.answers == sorted(labels, key=labels.get)    # the tables' own numbers
    if task == 'pairs': assert {'nlvr2_dev', 'nlvr2_test1'} <= set(evaluate_vlc(made, tmp_path/'arrow', task=task, format=name)['scores'])


# ---- a stopped run ends as one that was left alone ----

def test_resume(tool, tmp_path):
    task, state = 'retrieval', {k: v.clone() for k, v in tool.model.state_dict().items()}
    whole = learnt('world', tmp_path/'whole', tool, task)
    tool.model.load_state_dict(state)
    class Stop(Checkpoints):
        def after_batch(self):
            if self.learn.training and self.learn.steps == 1: self.stopping = True
            super().after_batch()
    recipe = replace(quick(task), epochs=1)
    mine = fitted(tool, recipe, texts=make_task('caption').vocabulary())
    data = TaskData(make_task('caption', image_size=32, size=8), mine, recipe)
    valid = TaskData(make_task('caption', split='valid', image_size=32, size=6), mine, recipe, most=6)
    stop = Stop(tmp_path/'run/run', 100)
    task_learner(mine, recipe, data, valid, cbs=[StepLog(tmp_path/'run/log.csv', 10), stop]).fit(1)
    assert stop.stopping
    rest = learnt('world', tmp_path/'run', tool, task)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), rest.model.state_dict().values()))
    assert (tmp_path/'run/log.csv').read_text() == (tmp_path/'whole/log.csv').read_text()


def test_parts_of_a_step_add_up(tool):
    task = 'questions'
    def trained(at_once):
        recipe = replace(quick(task), batch=4, wd=0.)
        torch.manual_seed(0)
        mine = fitted(VLCTool(init_vlc(VLC(SMALL)), task_tokenizer(), [], {}), recipe, answers=answers_of([make_task('question')]))
        mine.model.text.dropout = 0.
        learn = task_learner(mine, recipe, TaskData(make_task('question', image_size=32, size=8), mine, recipe), at_once=at_once)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return mine.model.state_dict()
    a, b = trained(4), trained(2)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    with pytest.raises(ValueError, match='multiple of 3'): task_learner(tool, quick(task), None, at_once=3)


# ---- numbers by hand ----

def test_scores_are_a_count(tool, tmp_path):
    data = files.vqav2(tmp_path)
    source = open_source(Source(data, 'vqav2'), 'questions', 'val', side=32, see='vlc/evaluate')
    found = source.texts(range(12))
    said = ['red']*12                                        # 4 red pictures score 1; 4 blue ones, whose 3 dissenters said red, .9
    assert credit(said, found, 'questions').sum() == pytest.approx(4*1. + 4*.9)
    tool.answers = ['red', 'green', 'blue']
    class Red(torch.nn.Module):
        config = SMALL
        def answer(self, image, ids, mask): return tensor([[1., 0., 0.]]).repeat(len(ids), 1)
    tool.model = Red()
    rows = evaluate_vlc(tool, data, task='questions', format='vqav2', split='val', n=12)['scores']
    assert rows['all']['seen'] == rows['other']['seen'] == pytest.approx((4 + 3.6)/12, abs=1e-4)
    official = sum(vqa_accuracy('red', a) for a in found['annotators'])/12
    assert rows['official']['seen'] == pytest.approx(official, abs=1e-4)


def test_rare_answers_are_left_out_of_training_and_count_in_scores(tool, tmp_path):
    source = open_source(Source(files.vqav2(tmp_path), 'vqav2'), 'questions', 'train', side=32, see='vlc/evaluate')
    answers = answers_of([source], least=2)
    kept, lost = answerable(source, answers)
    assert set(answers) == set(files.NAMES) and (len(source), len(kept), lost) == (12, 11, 1)
    tool = fitted(tool, quick('questions'), answers=answers)
    rows = evaluate_vlc(tool, tmp_path, task='questions', format='vqav2', split='train')['scores']
    assert rows['answerable']['n'] == 11 and rows['all']['n'] == 12
    assert rows['all']['seen']*12 == pytest.approx(rows['answerable']['seen']*11, abs=2e-3)


def test_recall_is_counted_from_the_models_scores(tool, tmp_path):
    data = files.karpathy(tmp_path)
    made = fitted(tool, quick('retrieval'))
    source = open_source(Source(data, 'karpathy'), 'retrieval', 'test', side=32, see='vlc/evaluate')
    batches = TaskData(source, made, quick('retrieval'))
    rows = retrieval_scores(batches)
    captions = [c for r in source.records for c in r['captions']]
    ids, mask = batches.encode(captions)
    with torch.no_grad(): table = torch.stack([made.model.eval().rank(x[None].expand(len(ids), -1, -1, -1), ids, mask) for x in Pictures(batches)[0:6]])
    best = table.topk(5, 1).indices//5                       # five captions a picture, in order
    assert rows['TR R@5']['seen'] == pytest.approx((best == torch.arange(6)[:, None]).any(1).float().mean().item(), abs=1e-4)
    hit = table.argmax(0) == torch.arange(30)//5
    assert rows['IR R@1']['seen'] == pytest.approx(hit.float().mean().item(), abs=1e-4) and rows['IR R@1']['text'] == pytest.approx(1/6, abs=1e-4)
    assert rows['TR R@1']['n'] == 6 and rows['IR R@1']['n'] == 30


def test_the_test_split_is_answered_into_a_file(tool, tmp_path):
    data = files.vqav2(tmp_path)
    made = fitted(tool, quick('questions'), answers=files.NAMES)
    found = evaluate_vlc(made, data, task='questions', format='vqav2', split='test', out=tmp_path/'out.json')
    said = json.loads((tmp_path/'out.json').read_text())
    assert not found['scores'] and [r['question_id'] for r in said] == [7000, 7001, 7002, 7003]
    assert all(set(r) == {'question_id', 'answer'} and r['answer'] in files.NAMES for r in said)


def test_right():
    logits = tensor([[0., 1.], [1., 0.]])
    assert right(logits, dict(targets=tensor([[1., .3], [0., 1.]]))).tolist() == pytest.approx([.3, 0.])
    assert right(logits, dict(label=tensor([1, 1]))).tolist() == [1., 0.] and right(logits, {}).tolist() == [0., 1.]


def test_tables_and_blind_readers():
    rows = table_of(dict(seen=tensor([1., 0., 1.])), ['a', 'b', 'a'])
    assert rows == {'all': {'seen': .6667, 'n': 3}, 'a': {'seen': 1., 'n': 2}, 'b': {'seen': 0., 'n': 1}}
    known = dict(text=['up', 'up', 'down', 'up'], label=tensor([1, 1, 0, 1]))
    assert blind_choices(known, dict(text=['down', 'up'], label=tensor([0, 0])), 'pairs')['majority'] == [1, 1]
    parts = parts_of(150)
    assert sum(parts, []) == list(range(150)) and min(map(len, parts)) >= 64
    turned = shuffled(dict(image=torch.arange(4), label=torch.arange(4)))
    assert turned['image'].tolist() == [2, 3, 0, 1] and turned['label'].tolist() == [0, 1, 2, 3]


# ---- wrong captions ----

def test_wrong_captions_as_published_and_refused(tmp_path):
    source = open_source(Source(files.karpathy(tmp_path, n=2), 'karpathy'), 'retrieval', 'train', side=32, see='vlc/evaluate', each=True)
    assert len(source) == 10                                 # one sample for each caption of two pictures
    own = source.texts(range(10))['captions']
    torch.manual_seed(0)
    drawn = wrong_captions(source, own, 50)
    share = sum(t in mine for row, mine in zip(drawn, own) for t in row)/500
    assert .4 < share < .6                                   # uniform: half of them are true of the picture
    refused = wrong_captions(source, own, 50, refuse=True)
    assert not any(t in mine for row, mine in zip(refused, own) for t in row)
    with pytest.raises(ValueError, match='one picture'): wrong_captions(source, [own[0] + own[9]]*2, 3, refuse=True)


def test_sixteen_choices_the_true_one_first(tool):
    recipe = TINY['retrieval']
    data = TaskData(make_task('caption', image_size=32, size=50), tool, recipe)
    batch = data.batch([3, 4])
    assert batch['choice_ids'].shape[:2] == (2, 16)
    words = tool.tokenizer.decode(batch['choice_ids'][:, 0])
    assert words == data.source.texts([3, 4])['caption']


# ---- one model becomes another ----

def test_weights_move(tool):
    old = tool.model
    pairs = fitted(tool, quick('pairs')).model
    assert torch.equal(pairs.modality.weight[2], old.modality.weight[1]) and set(pairs.heads) == {'nlvr2'}
    found = fitted(tool, quick('retrieval', image_size=64)).model
    assert torch.equal(found.heads['rank'].weight[0], old.heads['itm'].weight[1]) and found.trunk.positions.shape == (17, 16)
    assert found.heads['rank'].weight.data_ptr() != found.heads['itm'].weight[1].data_ptr()
    asked = fitted(tool, quick('questions'), answers=['a', 'b'])
    more = fitted(asked, quick('questions'), answers=['c', 'b', 'a'])
    last = lambda t: t.model.heads['vqa'][3]
    assert torch.equal(last(more).weight[[2, 1]], last(asked).weight) and torch.equal(last(more).bias[[2, 1]], last(asked).bias)
    assert torch.equal(more.model.heads['vqa'][0].weight, asked.model.heads['vqa'][0].weight)
    same = fitted(tool, quick('pairs')).model
    x, ids = torch.rand(2, 3, 32, 32), torch.randint(5, 50, (2, 7))
    with torch.no_grad(): assert torch.equal(same.eval()(x, ids).pooled, old.eval()(x, ids).pooled)


def test_new_words_get_rows_and_old_ones_keep_theirs(tool):
    grown = fitted(tool, quick('pairs'), texts=['Zebras, zebras everywhere!'])
    new, old = grown.tokenizer, tool.tokenizer
    assert new.vocab_size == old.vocab_size + 2 + sum(new.encode([m])[0].ne(old.unk_id).all().item() and not old.encode([m])[0].ne(old.unk_id).all().item() for m in ',!')
    assert not (new.encode(['zebras everywhere'])[0] == new.unk_id).any()
    n = tool.model.config.vocab_size
    assert torch.equal(grown.model.text.words.weight[:n], tool.model.text.words.weight)
    assert old.grown(['a red circle']) is old
    assert fitted(tool, quick('pairs'), texts=['A red circle?']).tokenizer is old


def test_an_unchanged_model_says_the_same(tool):
    asked = fitted(tool, quick('questions'), answers=['a', 'b'])
    again = fitted(asked, quick('questions'), answers=['a', 'b'])
    x, ids = torch.rand(2, 3, 32, 32), torch.randint(5, 50, (2, 7))
    with torch.no_grad(): assert torch.equal(asked.model.eval().answer(x, ids), again.model.eval().answer(x, ids))


def test_an_authors_file_is_a_start(tmp_path):
    from vl_tutor.primitives.words import WordTokenizer
    WordTokenizer(['a', 'red', 'square']).save(tmp_path)
    path = Path(__file__).parents[1]/'golden/vlc/lightning_ckpt/saved.ckpt'
    begun = open_start(path, tokenizer=tmp_path)
    pair = fitted(begun, quick('pairs', image_size=32))
    assert torch.equal(pair.model.trunk.encoder.blocks[0].attn.to_qkv.weight, begun.model.trunk.encoder.blocks[0].attn.to_qkv.weight)
    assert pair.model.trunk.positions.shape == (17, 8) and torch.equal(pair.model.modality.weight[2], begun.model.modality.weight[1])
    assert open_start(path, reads=False).tokenizer is None                           # classes need no words
    data = files.imagenet(tmp_path/'i') if (tmp_path/'i').mkdir() is None else None
    made = finetune_vlc(data, tmp_path/'run', task='classes', format='imagenet', start=path, recipe=quick('classes'), aside=6)
    assert made.card['recipe']['batch'] == 4 and made.card['scores']['all']['n'] == 6


# ---- recipes ----

def test_published_numbers():
    table = {k: (r.task, r.batch, r.epochs, r.image_size, r.lr, r.layer_decay, r.wd) for k, r in PUBLISHED.items()}
    assert table == dict(vqav2=('questions', 256, 10, 576, 5e-4, .5, .01), nlvr2=('pairs', 128, 20, 384, 5e-4, .5, .01),
                         coco=('retrieval', 256, 20, 384, 5e-4, .5, .01), f30k=('retrieval', 256, 10, 384, 5e-4, .5, .01),
                         imagenet=('classes', 1024, 100, 224, 2e-3, .65, .05), imagenet_384=('classes', 1024, 100, 384, 2e-3, .65, .05))
    assert all(r.warmup == .1 and r.schedule == 'linear' and r.vary == 'vlc/train' for r in PUBLISHED.values() if r.task != 'classes')
    big = PUBLISHED['imagenet']
    assert (big.warmup*big.epochs, big.mixup, big.cutmix, big.smoothing, big.drop_path) == (5, .8, 1., .1, .1)
    assert PUBLISHED['coco'].wrong == 15 and not PUBLISHED['coco'].refuse and PUBLISHED['vqav2'].least == 9


def test_the_learner_follows_the_recipe(tool):
    from vl_tutor.training.layer_decay import group_table
    recipe = replace(PUBLISHED['f30k'], batch=2, image_size=0, vary='vlc/evaluate')
    mine = fitted(tool, recipe)
    learn = task_learner(mine, recipe, TaskData(make_task('caption', image_size=32, size=40), mine, recipe))
    rates = []
    from vl_tutor.training.learner import Callback
    class Watch(Callback):
        order = 99
        def before_step(self): rates.append(max(g['lr'] for g in self.learn.opt.opt.param_groups))
    learn.add_cb(Watch())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert rates[0] == 0 and max(rates) == pytest.approx(5e-4) and rates.index(max(rates)) == 2       # 20 steps, 2 of them warm up
    assert rates[-1] == pytest.approx(5e-4*1/18)
    table = group_table(mine.model, learn.opt.opt.param_groups)
    assert table['heads.itm.weight'] == 'frozen' and table['heads.rank.weight'][0] == 1. and table['text.words.weight'][0] == .25


def test_pictures_vary_as_the_recipe_says(tool):
    world = make_task('label', image_size=32, size=20)
    see = lambda name: TaskData(world, tool, TINY['classes'], see=name).batch([1, 2])['image']
    assert torch.equal(see('vlc/evaluate'), see('vlc/evaluate')) and not torch.equal(see('vlc/train'), see('vlc/evaluate'))
    torch.manual_seed(5); a = see('imagenet/train')
    torch.manual_seed(5); assert torch.equal(a, see('imagenet/train')) and a.shape == (2, 3, 32, 32)


# ---- wrong input is one sentence ----

@pytest.mark.parametrize('change, words', [
    (dict(task='dance'), 'dance'), (dict(recipe='huge'), 'huge'), (dict(recipe='nlvr2'), 'pairs'), (dict(data='nowhere'), 'nowhere'), (dict(format='nlvr3'), 'nlvr3'),
    (dict(format='nlvr2'), 'train.json'), (dict(splits=('sky', None)), 'sky'), (dict(start='nowhere'), 'nowhere'), (dict(at_once=3), 'multiple of 3')])
def test_mistakes(change, words, tool, tmp_path):
    how = dict(data=files.vqav2(tmp_path), format='vqav2', splits=('train', 'val'), start=tool, recipe=quick('questions')) | change
    with pytest.raises(ValueError, match=words) as error: finetune_vlc(how.pop('data'), tmp_path/'run', **how)
    assert '\n' not in str(error.value) and not (tmp_path/'run/card.json').exists()


def test_other_mistakes(tool, tmp_path):
    data = files.imagenet(tmp_path/'i') if (tmp_path/'i').mkdir() is None else None
    with pytest.raises(ValueError, match='no questions'): finetune_vlc(data, tmp_path/'run', format='imagenet', start=tool)
    with pytest.raises(ValueError, match='no answer'): answers_of([open_source(Source(files.vqav2(tmp_path), 'vqav2'), 'questions', 'train', side=32, see='vlc/evaluate')], 99)
    with pytest.raises(ValueError, match="no 'vqa' head"): evaluate_vlc(tool, tmp_path, format='vqav2', split='val')
    (tmp_path/'x.ckpt').write_bytes(b'')
    with pytest.raises(ValueError, match='tokeniser'): open_start(tmp_path/'x.ckpt')
    classifier = fitted(tool, quick('classes'), answers=['a'])
    with pytest.raises(ValueError, match='Classifier'): fitted(classifier, quick('questions'))
    assert choose_recipe('pairs', None, tmp_path/'x.ckpt') is PUBLISHED['nlvr2'] and choose_recipe('pairs', None) is TINY['pairs']


def test_broken_pictures_are_left_out_and_counted(tool, tmp_path):
    data = files.nlvr2(tmp_path)
    (data/'images/train/train-0-0-img0.png').write_bytes(b'no picture')
    (data/'images/dev/dev-0-0-img0.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='train-0-0-img0.png'): learnt(data, tmp_path/'a', tool, 'pairs', format='nlvr2')
    made = learnt(data, tmp_path/'b', tool, 'pairs', format='nlvr2', on_error='skip')
    assert made.card['broken'] == 2 and made.card['scores']['all']['n'] == 6
    found = evaluate_vlc(made, data, task='pairs', format='nlvr2', split='valid', on_error='skip')
    assert found['left_out'] == 1 and found['samples'] == 11

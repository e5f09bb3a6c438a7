"The Learner: the same arithmetic as a bare loop, honest precision, and runs that go on bit for bit."
import copy, csv, json, os, signal, subprocess, sys, threading
import pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from tensors import same
from torch import nn
from vl_tutor.training import objectives as O
from vl_tutor.training.checkpoints import load_checkpoint
from vl_tutor.training.learner import (BatchLoader, Checkpoints, Ema, Schedule, StepLog, Table, Task, WarmupThenConstant, WarmupThenCosine,
    dict_loaders, make_learner, param_groups, quiet_fit, warmup_then_cosine)

torch.manual_seed(0)
X = torch.randn(200, 4); Y = X @ torch.randn(4, 2) + .1*torch.randn(200, 2)
DATA = Table(x=X, y=Y, name=[str(i) for i in range(200)])

def parts(model, batch):
    p = model(batch['x'])
    return dict(left=F.mse_loss(p[:, 0], batch['y'][:, 0]), right=F.l1_loss(p[:, 1], batch['y'][:, 1]))

def one(model, batch): return dict(mse=F.mse_loss(model(batch['x']), batch['y']))
def error(model, batch): return (model(batch['x']) - batch['y']).abs().mean().detach()

class Net(nn.Module):
    "With everything that a resumed run must bring back: dropout, batch statistics, a queue with a pointer"
    def __init__(self, drop=.2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(drop), nn.Linear(16, 2))
        self.register_buffer('queue', torch.zeros(7)); self.register_buffer('at', torch.tensor(0))
    def forward(self, x):
        out = self.net(x)
        if self.training: self.queue[self.at%7] = out.detach().mean(); self.at += 1
        return out

class Augmented:
    "Samples with noise of their own, drawn in the worker"
    def __len__(self): return 200
    def __getitem__(self, i): return dict(x=X[i] + .1*torch.randn(4), y=Y[i], index=i)

def plain(seed=1, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))

def loaders(bs=20, workers=0, data=DATA, **kw): return dict_loaders(data, DATA, bs=bs, workers=workers, device='cpu', **kw)

# ---- arithmetic -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('optimizer,cls', [('adamw', torch.optim.AdamW), ('adam', torch.optim.Adam)])
def test_equal_to_a_bare_torch_loop(optimizer, cls):
    dls, mine, theirs = loaders(), plain(), plain()
    learn = make_learner(mine, dls, one, lr=1e-2, wd=.1, optimizer=optimizer, schedule=WarmupThenConstant(.4))
    opt = cls(theirs.parameters(), lr=1e-2, betas=(.9, .98), eps=1e-8, weight_decay=.1)
    warm = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: t/8 if t < 8 else 1.)
    rates, dl = [], BatchLoader(DATA, 20, shuffle=True)
    for epoch in range(2):
        for batch in dl:
            one(theirs, batch)['mse'].backward()
            rates.append(opt.param_groups[0]['lr']); opt.step(); opt.zero_grad(); warm.step()
    quiet_fit(learn, 2)
    assert learn.recorder.lrs == rates and rates[0] == 0 and rates[8:] == [1e-2]*12
    assert same(mine.state_dict(), theirs.state_dict())

def test_schedules():
    lrs = lambda schedule, **kw: (lambda l: (quiet_fit(l, 2), l.recorder.lrs)[1])(make_learner(plain(), loaders(), one, lr=1., schedule=schedule, **kw))
    cos = lrs(WarmupThenCosine(.2))
    assert cos[0] == 0 and cos[4] == 1 and cos == sorted(cos[:5]) + sorted(cos[5:], reverse=True) and cos[12] == pytest.approx(.5)
    assert warmup_then_cosine(20, 4, 20) == 0 and lrs(None) == [1.]*20
    assert lrs(WarmupThenConstant(.1), accumulate=2)[1::2] == [0.] + [1.]*9
    assert lrs(WarmupThenConstant(.1, total=100))[:3] == [0, .1, .2]
    groups = make_learner(plain(), loaders(), one, lr=1., groups=lambda m: param_groups(m, lr_mult={'2': .1}))
    quiet_fit(groups, 1)
    assert sorted({(g['lr'], g['weight_decay']) for g in groups.opt.opt.param_groups}) == [(.1, 0.), (.1, .01), (1., 0.), (1., .01)]

def test_parts_are_weighed_and_shown():
    learn = make_learner(plain(), loaders(), parts, weights=dict(right=.25), metrics=[error])
    table = quiet_fit(learn, 2)
    assert list(table.columns) == ['train_loss', 'valid_loss', 'left', 'right', 'error'] and len(table) == 2
    with torch.no_grad(): want = parts(learn.model.model, DATA.columns)
    last = learn.recorder.values[-1]
    assert last[2] == pytest.approx(float(want['left']), abs=1e-5) and last[3] == pytest.approx(float(want['right']), abs=1e-5)
    assert last[1] == pytest.approx(float(want['left'] + .25*want['right']), abs=1e-5)
    assert last[4] == pytest.approx(float(error(learn.model.model, DATA.columns)), abs=1e-5)
    with pytest.raises(ValueError, match=r"weights for \['up'\], but the parts are \['left', 'right'\]"): quiet_fit(make_learner(plain(), loaders(), parts, weights=dict(up=1)), 1)
    assert quiet_fit(make_learner(plain(), loaders(), parts, parts=['right']), 1).shape == (1, 2)

def test_naming_the_parts_leaves_no_trace():
    model = Net()
    learn = make_learner(model, loaders(), parts)
    torch.manual_seed(3); want = torch.rand(2); torch.manual_seed(3)
    before = copy.deepcopy(model.state_dict()); model.net[2].eval()
    learn.n_epoch = 1
    from vl_tutor.training.learner import part_names
    assert part_names(learn) == ['left', 'right'] and torch.equal(torch.rand(2), want) and same(model.state_dict(), before)
    assert model.training and not model.net[2].training

def test_accumulated_batches_equal_one_large_batch():
    small, large = plain(), plain()
    a = make_learner(small, loaders(10), one, lr=1e-2, accumulate=4, optimizer='adam', wd=0)
    b = make_learner(large, loaders(40), one, lr=1e-2, optimizer='adam', wd=0)
    quiet_fit(a, 2); quiet_fit(b, 2)
    assert a.steps == b.steps == 10
    for p, q in zip(small.parameters(), large.parameters()): torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)

def test_average_of_the_weights():
    model, seen = plain(), []
    class Watch(Callback):
        order = 90
        def after_step(self): seen.append(self.learn.model.model[0].weight.detach().clone())
    first = model[0].weight.detach().clone()
    learn = make_learner(model, loaders(), one, lr=1e-2, ema=.9, cbs=[Watch()])
    table = quiet_fit(learn, 1)
    want = first
    for w in seen: want = .9*want + .1*w
    torch.testing.assert_close(learn.ema.average[0], want)
    assert torch.equal(model[0].weight, seen[-1])                       # swapped back after validation
    learn.ema.swap()
    with torch.no_grad(): assert float(one(model, DATA.columns)['mse']) == pytest.approx(learn.recorder.values[-1][1], abs=1e-5)

def test_clipping():
    learn = make_learner(plain(), loaders(), lambda m, b: dict(big=1e6*one(m, b)['mse']), clip=1e-3)
    norms = []
    class Watch(Callback):
        def after_step(self): norms.append(torch.stack([p.grad.norm() for p in self.learn.model.parameters()]).norm())
    learn.add_cb(Watch()); quiet_fit(learn, 1)
    assert len(norms) == 10 and all(abs(n - 1e-3) < 1e-6 for n in norms)

def test_groups_agree_with_timm():
    from timm.optim import param_groups_weight_decay
    model = Net()
    theirs = param_groups_weight_decay(model, .05)
    mine = param_groups(model, wd=.05)
    as_sets = lambda groups: {g['weight_decay']: {id(p) for p in g['params']} for g in groups}
    assert as_sets(mine) == as_sets(theirs)
    model.net[0].requires_grad_(False)
    assert sum(len(g['params']) for g in param_groups(model)) == 4
    nested = param_groups(model, lr_mult={'net': .5, 'net.3': .1})
    assert {(g['lr_mult'], len(g['params'])) for g in nested} == {(.5, 2), (.1, 1)}
    scaled = make_learner(model, loaders(), parts, lr=1., groups=lambda m: [dict(params=list(m.parameters()), lr_scale=.25)])
    quiet_fit(scaled, 1); assert scaled.recorder.lrs == [.25]*10

# ---- precision --------------------------------------------------------------------------------------------------

def dtypes_of(precision):
    model, seen = plain(), []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    learn = make_learner(model, loaders(), parts, precision=precision, lr=1e-2)
    table = quiet_fit(learn, 1)
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters()) and not torch.is_autocast_enabled('cpu')
    return set(seen), table

def test_bf16_on_a_cpu_is_really_bf16():
    (full, a), (half, b) = dtypes_of('fp32'), dtypes_of('bf16')
    assert full == {torch.float32} and half == {torch.bfloat16}
    assert abs(a.valid_loss[0] - b.valid_loss[0]) < .05*a.valid_loss[0]

def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match='^fp16 needs a GPU: on a CPU take'): make_learner(plain(), loaders(), parts, precision='fp16')
    with pytest.raises(ValueError, match="'fp8' is not one of fp32, bf16, fp16"): make_learner(plain(), loaders(), parts, precision='fp8')

def test_autocast_ends_after_an_error():
    def breaks(model, batch): model(batch['x']); raise RuntimeError('stop here')
    with pytest.raises(RuntimeError, match='stop here'): quiet_fit(make_learner(plain(), loaders(), breaks, precision='bf16', parts=['a']), 1)
    assert not torch.is_autocast_enabled('cpu')

def scaled_learner(model, objective, cbs=()):
    learn = make_learner(model, loaders(), objective, lr=1e-2, cbs=cbs)
    learn.scaler = torch.amp.GradScaler('cpu', init_scale=1024., growth_interval=4)   # fp16's machinery around an fp32 forward
    return learn

def test_an_overflowing_step_is_skipped():
    model, count, seen = plain(), [0], []
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return g*torch.inf if count[0] == 3 else g
    def objective(m, b):
        count[0] += m.training
        return dict(mse=F.mse_loss(Break.apply(m(b['x'])), b['y']))
    class Watch(Callback):
        order = 90
        def after_step(self): seen.append((self.learn.scaler.get_scale(), self.learn.model.model[0].weight.detach().clone()))
    quiet_fit(scaled_learner(model, objective, [Watch()]), 1)
    scales, weights = zip(*seen)
    assert scales[:4] == (1024, 1024, 512, 512) and max(scales) == 1024
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3]) and weights[-1].isfinite().all()

def test_scaling_changes_nothing_else():
    a, b = plain(), plain()
    quiet_fit(scaled_learner(a, one), 1); quiet_fit(make_learner(b, loaders(), one, lr=1e-2), 1)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)

def test_nan_names_step_and_part():
    def objective(m, b):
        out = parts(m, b)
        if m.training and learn.steps == 4: out['right'] = out['right']*torch.nan
        return out
    learn = make_learner(plain(), loaders(), objective)
    with pytest.raises(FloatingPointError, match='^step 4: the loss is not a number: right = nan'): quiet_fit(learn, 1)

# ---- data -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('workers', [0, 2])
def test_batches_depend_on_seed_and_epoch_alone(workers):
    def epochs(workers, bs=20, seed=5):
        dl = BatchLoader(Augmented(), bs, shuffle=True, seed=seed, workers=workers)
        return [list(dl), list(dl)]
    torch.manual_seed(workers); state = torch.get_rng_state()
    got, want = epochs(workers), epochs(0)
    assert torch.equal(torch.get_rng_state(), state)                                   # the process' own randomness is not touched
    assert all(same(a, b) for e, f in zip(got, want) for a, b in zip(e, f))
    seen = [sorted(i for b in e for i in b['index'].tolist()) for e in got]
    assert seen == [list(range(200))]*2 and not torch.equal(got[0][0]['index'], got[1][0]['index'])
    assert not same(got[0][0], epochs(0, seed=6)[0][0])

def test_loader_lengths_and_position():
    assert [len(BatchLoader(DATA, bs, shuffle=s)) for bs, s in ((30, True), (30, False), (300, True), (300, False))] == [6, 7, 1, 1]
    dl = BatchLoader(DATA, 20, shuffle=True); whole = list(dl)
    dl.epoch, dl.start = 0, 7
    assert [b['name'] for b in dl] == [b['name'] for b in whole[7:]] and len(list(dl)) == 10
    valid = BatchLoader(Augmented(), 50)
    assert all(same(a, b) for a, b in zip(valid, valid))
    with pytest.raises(ValueError, match='at least one sample, not 0'): BatchLoader(DATA, 0)

# ---- going on ---------------------------------------------------------------------------------------------------

def run(folder=None, *, stop=None, workers=0, scaler=False, accumulate=1, bs=20, log=None, seed=1, how=None, every=7):
    "Two passes of ten steps; `stop` ends the process' patience at that step"
    torch.manual_seed(seed)
    log = StepLog(log)
    class Stop(Callback):
        order = 80
        def after_batch(self):
            if self.learn.training and self.learn.steps == stop: how() if how else (_ for _ in ()).throw(InterruptedError('stop'))
    cbs = [log, *([Checkpoints(folder, every)] if folder else []), *([Stop()] if stop else [])]
    learn = make_learner(Net(), dict_loaders(Augmented(), DATA, bs=bs, workers=workers, device='cpu'), parts, lr=1e-2, ema=.9,
                         schedule=WarmupThenConstant(.5), accumulate=accumulate, metrics=[error], cbs=cbs)
    if scaler: learn.scaler = torch.amp.GradScaler('cpu', init_scale=64., growth_interval=3)
    try: table = quiet_fit(learn, 2)
    except InterruptedError: table = None
    return learn, table, log.rows

def assert_same_run(a, b):
    (la, ta, ra), (lb, tb, rb) = a, b
    assert same(la.model.state_dict(), lb.model.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(la.ema.average, lb.ema.average))
    for x, y in zip(la.opt.opt.state_dict()['state'].values(), lb.opt.opt.state_dict()['state'].values()): assert same(x, y)
    assert la.opt.opt.state_dict()['param_groups'] == lb.opt.opt.state_dict()['param_groups']
    assert la.recorder.losses == lb.recorder.losses and la.recorder.lrs == lb.recorder.lrs
    assert ra == rb and la.steps == lb.steps and (la.dls.train.epoch, la.dls.train.start) == (lb.dls.train.epoch, lb.dls.train.start)
    pd.testing.assert_frame_equal(ta, tb)
    if la.scaler: assert la.scaler.state_dict() == lb.scaler.state_dict()

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('scaler', [False, True], ids=['plain', 'scaler'])
def test_seven_and_thirteen_steps_are_twenty(tmp_path, workers, scaler):
    whole = run(workers=workers, scaler=scaler); drawn = torch.rand(3)
    first, table, _ = run(tmp_path, stop=8, workers=workers, scaler=scaler)
    assert table is None and first.steps == 8
    second = run(tmp_path, workers=workers, scaler=scaler, seed=99)          # another start: everything must come from the disk
    assert_same_run(whole, second)
    assert torch.equal(torch.rand(3), drawn)                                 # the generators too

@pytest.mark.parametrize('stop,every', [(3, 1), (10, 10), (11, 10), (19, 6), (20, 20)])
def test_wherever_it_stops(tmp_path, stop, every):
    whole = run()
    run(tmp_path, stop=stop, every=every)
    assert_same_run(whole, run(tmp_path, seed=99, every=every))

def test_stops_between_accumulated_batches(tmp_path):
    whole = run(accumulate=3, bs=10)
    run(tmp_path, stop=9, accumulate=3, bs=10, every=4)
    assert_same_run(whole, run(tmp_path, seed=99, accumulate=3, bs=10, every=4))
    assert whole[0].steps == 13

def test_other_workers_after_the_stop(tmp_path):
    run(tmp_path, stop=8, workers=2)
    assert_same_run(run(), run(tmp_path, seed=99, workers=0))

def test_a_finished_run_is_not_run_again(tmp_path):
    a = run(tmp_path); steps = a[0].steps
    b = run(tmp_path, seed=99)
    assert same(a[0].model.state_dict(), b[0].model.state_dict()) and a[2] == b[2]
    pd.testing.assert_frame_equal(a[1], b[1])
    assert b[0].steps == steps == 20

def test_another_order_is_refused(tmp_path):
    run(tmp_path, stop=8)
    with pytest.raises(ValueError, match='batches of 20 and seed 0, not 10 and 0'): run(tmp_path, bs=10)

def test_another_model_is_refused(tmp_path):
    run(tmp_path, stop=8)
    learn = make_learner(plain(), loaders(), parts, cbs=[Checkpoints(tmp_path)])
    with pytest.raises(ValueError, match='holds another model') as e: quiet_fit(learn, 2)
    assert '\n' not in str(e.value) and str(e.value).startswith(str(tmp_path))

def test_validation_alone_does_not_restore(tmp_path):
    a = run(tmp_path)
    learn = a[0]
    with torch.no_grad(): learn.model.model.net[3].bias += 1
    kept = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(): learn.validate()
    assert same(learn.model.state_dict(), kept)

def test_logs(tmp_path):
    learn, table, rows = run(tmp_path, log=tmp_path/'log.csv')
    read = list(csv.DictReader(open(tmp_path/'log.csv')))
    assert len(read) == len(rows) == 22 and [int(r['step']) for r in read] == [*range(1, 11), 10, *range(11, 21), 20]
    assert float(read[3]['left']) == rows[3]['left'] and read[10]['valid_loss'] and not read[3]['valid_loss']
    _, _, rows = run(tmp_path/'b', log=tmp_path/'log.jsonl')
    assert [json.loads(l) for l in open(tmp_path/'log.jsonl')] == rows
    with pytest.raises(ValueError, match='log.txt: a log is .csv or .jsonl'): StepLog(tmp_path/'log.txt')

def test_a_killed_run_leaves_the_log_of_its_checkpoint(tmp_path):
    whole = run(log=tmp_path/'a.csv')
    run(tmp_path/'c', stop=13, log=tmp_path/'b.csv'); run(tmp_path/'c', seed=99, log=tmp_path/'b.csv')
    assert (tmp_path/'a.csv').read_text() == (tmp_path/'b.csv').read_text()

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_ends_cleanly(tmp_path, number):
    before = signal.getsignal(number)
    learn, table, rows = run(tmp_path, stop=9, how=lambda: os.kill(os.getpid(), number))
    assert learn.steps in (9, 10) and signal.getsignal(number) is before      # fit returned, the signal has its old meaning again
    assert load_checkpoint(tmp_path)['place']['steps'] == learn.steps
    assert_same_run(run(), run(tmp_path, seed=99))

def test_signals_are_given_back_after_an_error(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path, stop=3)
    assert signal.getsignal(signal.SIGINT) is before

def test_in_a_thread_there_are_no_signals(tmp_path):
    out = []
    t = threading.Thread(target=lambda: out.append(run(tmp_path))); t.start(); t.join()
    assert out[0][0].steps == 20

KILLED = '''
import os, signal, sys
sys.path[:0] = sys.argv[2], os.path.dirname(sys.argv[2])      # test_learner, tensors
from test_learner import run
run(sys.argv[1], stop=8, workers=int(sys.argv[3]), how=lambda: os.kill(os.getpid(), signal.SIGKILL))
'''

@pytest.mark.parametrize('workers', [0, 2])
def test_a_killed_process_goes_on_in_another(tmp_path, workers):
    p = subprocess.run([sys.executable, '-c', KILLED, str(tmp_path), os.path.dirname(__file__), str(workers)], env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads())), timeout=120)
    assert p.returncode == -signal.SIGKILL
    assert_same_run(run(), run(tmp_path, seed=99))

def test_the_table_is_the_same_each_time(capsys):
    a, b = run()[1], run()[1]
    pd.testing.assert_frame_equal(a, b)
    out = capsys.readouterr()
    assert not out.out and not out.err

# ---- objectives -------------------------------------------------------------------------------------------------

def test_contrastive_against_its_slow_twin_and_gradients():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(O.info_nce(a, b, 4.), O.info_nce_ref(a, b, 4.))
    torch.testing.assert_close(O.info_nce(a, b, 4.), O.info_nce(b, a, 4.))
    same_ = torch.eye(5, dtype=torch.bool); same_[0, 1] = same_[1, 0] = True
    assert torch.autograd.gradcheck(lambda x, y: O.info_nce(x, y, 4., same_), (a, b))
    order = torch.randperm(5, generator=g)
    torch.testing.assert_close(O.info_nce(a[order], b[order], 4.), O.info_nce(a, b, 4.))
    with pytest.raises(ValueError, match=r'\(5, 3\) and \(4, 3\)'): O.info_nce(a, b[:4])

def test_cross_entropy_guards():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, -1, 4], [-1, -1, 2]])
    want = torch.stack([-logits[i, j].log_softmax(-1)[labels[i, j]] for i, j in ((0, 0), (0, 2), (1, 2))]).mean()
    torch.testing.assert_close(O.cross_entropy(logits, labels, -1), want)
    assert torch.autograd.gradcheck(lambda x: O.cross_entropy(x, labels, -1), (logits,))
    none = O.cross_entropy(logits, torch.full_like(labels, -1), -1); none.backward()
    assert none == 0 and (logits.grad == 0).all()
    with pytest.raises(ValueError, match=r'need labels \(2, 3\), not \(3, 2\)'): O.cross_entropy(logits, labels.T)

def test_objectives_learn_through_the_learner():
    class Look(nn.Module):
        def __init__(self): super().__init__(); self.out = nn.Linear(48, 8)
        def forward(self, image): return self.out(image.flatten(1))
    class Read(nn.Module):
        def __init__(self): super().__init__(); self.words = nn.Embedding(4, 8)
        def forward(self, ids, mask): return self.words(ids).mean(1)
    torch.manual_seed(0)
    ids = torch.arange(200)%4
    data = Table(image=torch.randn(4, 3, 4, 4)[ids] + .3*torch.randn(200, 3, 4, 4), ids=ids[:, None].repeat(1, 2))
    learn = make_learner(O.TwoTowers(Look(), Read(), (8, 8)), dict_loaders(data, data, bs=20, device='cpu'), O.contrastive, lr=1e-2)
    table = quiet_fit(learn, 4)
    assert table.valid_loss.iloc[-1] < .05

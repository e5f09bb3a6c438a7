"Key maps, released files that may be hostile, and saves that survive a kill."
import argparse, collections, json, os, pickle, random, signal, subprocess, sys, time, types, zipfile
from dataclasses import dataclass
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from tensors import same
from torch import nn
from vl_tutor.training.checkpoints import (KeyMap, load_checkpoint, load_model, load_official, pack, read_card, rearranged, rng_state,
    save_checkpoint, save_model, unpack, write_whole)
from vl_tutor.training.released import Inert, read_legacy, read_zip

RULES = [('h.{i}.k.{w} + h.{i}.v.{w}', 'blocks.{i}.kv.{w}', 'cat'), ('h.{i}.fc.weight', 'blocks.{i}.up.weight', 'transpose'),
         ('in_proj', 'q + k + v', 'split'), ('conv', 'patches', rearranged('d c p q -> d (p q c)', c=3, p=2)), ('wte', 'words', ''),
         ('h.{i}.c + h.{i}.d', 'blocks.{i}.cd', 'transpose cat'), ('pos', 'places', 'squeeze')]
KEYS = KeyMap(RULES, drop=['h.{i}.mask'], optional=['ids'], alias={'head': 'wte'}, renames={'x.': 'x.y.'})

def official():
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g)
    out = {'in_proj': r(6, 2), 'conv': r(4, 3, 2, 2), 'wte': r(5, 2), 'pos': r(1, 4, 2)}
    for i in (0, 3, 11):
        out |= {f'h.{i}.{n}.{w}': r(2, 3) if w == 'weight' else r(2) for n in 'kv' for w in ('weight', 'bias')}
        out |= {f'h.{i}.fc.weight': r(2, 7), f'h.{i}.c': r(2, 3), f'h.{i}.d': r(2, 3)}
    return out | {'head': out['wte'].clone()}

def test_there_and_back():
    ours = KEYS.to_ours(official())
    assert torch.equal(ours['blocks.11.kv.bias'], torch.cat([official()['h.11.k.bias'], official()['h.11.v.bias']]))
    assert torch.equal(ours['blocks.3.cd'], torch.cat([official()['h.3.c'].T, official()['h.3.d'].T]))
    assert ours['patches'].shape == (4, 12) and ours['places'].shape == (4, 2) and 'head' not in ours
    assert same(KEYS.to_official(ours), official())

def test_meta_and_shapes_alone():
    shapes, meta = {k: list(t.shape) for k, t in official().items()}, {k: t.to('meta') for k, t in official().items()}
    want = {k: list(t.shape) for k, t in KEYS.to_ours(official()).items()}
    assert KEYS.to_ours(shapes) == want == {k: list(t.shape) for k, t in KEYS.to_ours(meta).items()}
    assert KEYS.to_official(want) == shapes

def test_part_of_a_model_such_as_gradients():
    some = {k: t for k, t in official().items() if k.startswith('h.3.')}
    assert same(KEYS.to_official(KEYS.to_ours(some)), some)

@pytest.mark.parametrize('change,words', [
    (dict(zzz=1), ['1 unknown: zzz']), ({'h.0.fc.bias': 1, 'yyy': 1}, ['2 unknown', 'h.0.fc.bias', 'yyy']),
    ({'h.0.v.weight': None}, ['1 missing: h.0.v.weight']), ({'conv': None}, ['1 missing: conv']), ({'h.3.fc.weight': None}, ['missing: h.3.fc.weight'])])
def test_strict(change, words):
    broken = official()
    for k, v in change.items():
        if v is None: broken.pop(k)
        else: broken[k] = torch.ones(2)
    with pytest.raises(ValueError) as e: KEYS.to_ours(broken, KEYS.to_ours(official()))
    assert all(w in str(e.value) for w in words), e.value

def test_every_fault_is_listed_up_to_twenty():
    with pytest.raises(ValueError) as e: KEYS.to_ours(official() | {f'odd{i:02}': torch.ones(1) for i in range(50)})
    assert '50 unknown' in str(e.value) and 'odd19' in str(e.value) and 'and 30 more' in str(e.value) and 'odd20' not in str(e.value)
    with pytest.raises(ValueError, match='1 unknown: strange'): KEYS.to_official({'strange': torch.ones(1)})
    with pytest.raises(ValueError, match=r'wrong shape: words \(5, 2\) where \(9, 2\)'): KEYS.to_ours(official(), dict(KEYS.to_ours(official()), words=torch.ones(9, 2)))
    with pytest.raises(ValueError, match='not in this model: words'): KEYS.to_ours(official(), set(KEYS.to_ours(official())) - {'words'})

def test_drop_optional_alias_and_renames():
    base = KEYS.to_ours(official())
    assert same(KEYS.to_ours(official() | {'h.3.mask': torch.ones(9), 'ids': torch.arange(3)}, base), base)
    without = official(); without.pop('head')
    assert same(KEYS.to_ours(without, base), base)
    only_head = official(); only_head.pop('wte')
    assert same(KEYS.to_ours(only_head, base), base)
    with pytest.raises(ValueError, match='head and wte are tied'): KEYS.to_ours(official() | {'head': torch.ones(5, 2)})
    short = KeyMap([('x.y.a.{i}', 'b.{i}')], renames={'x.': 'x.y.'})
    assert set(short.to_ours({'x.a.1': torch.ones(1), 'x.y.a.2': torch.ones(1)})) == {'b.1', 'b.2'}

def test_rules_are_checked():
    with pytest.raises(ValueError, match="'flip'"): KeyMap([('a', 'b', 'flip')])
    with pytest.raises(ValueError, match='cat'): KeyMap([('a + b', 'c')]).to_ours(dict(a=torch.ones(1), b=torch.ones(1)))
    with pytest.raises(ValueError, match='3 equal parts'): KeyMap([('a', 'q + k + v', 'split')]).to_ours(dict(a=torch.ones(4)))

# ---- released files ---------------------------------------------------------------------------------------------

class Attack:
    "Unpickled by a trusting reader, it writes a file"
    def __init__(self, mark, how): self.mark, self.how = str(mark), how
    def __reduce__(self):
        code = f'open({self.mark!r}, "w").write("x")'
        return {'system': (os.system, (f'touch {self.mark}',)), 'exec': (exec, (code,)), 'eval': (eval, (code,)), 'open': (open, (self.mark, 'w')),
                'popen': (subprocess.Popen, (['touch', self.mark],)), 'torch': (torch.save, ({}, self.mark)),
                'getattr': (getattr, (dict, 'fromkeys')), 'partial': (__import__('functools').partial, (os.system, f'touch {self.mark}'))}[self.how]

@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('how', ['system', 'exec', 'eval', 'open', 'popen', 'torch', 'getattr', 'partial'])
def test_no_foreign_code_runs(tmp_path, how, zipped):
    mark, file = tmp_path/'mark', tmp_path/'bad.pth'
    w = torch.randn(3, 2)
    torch.save({'evil': Attack(mark, how), 'state_dict': {'w': w}}, file, _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_official(file)['w'], w)   # the tensors come in, the attack does not
    time.sleep(.05)
    assert not mark.exists()
    if how in ('system', 'exec', 'eval', 'open'):     # the attack is a real one
        torch.load(file, weights_only=False)
        assert mark.exists()

@pytest.mark.parametrize('payload', [b"cos\nsystem\n(S'touch {}'\ntR.", b"c__builtin__\neval\n(S'open(\"{}\",\"w\")'\ntR.", b"(S'touch {}'\nios\nsystem\n.",
                                     b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x00\x85R."])
def test_raw_pickles_run_nothing(tmp_path, payload):
    mark, file = tmp_path/'mark', tmp_path/'bad.pt'
    file.write_bytes(payload.replace(b'{}', str(mark).encode()))
    with pytest.raises(ValueError, match='bad.pt'): load_official(file)
    assert not mark.exists()

def foreign(name, **members):
    "A class in a module that exists while it is pickled only"
    module, _, cls = name.rpartition('.')
    made = type(cls, members.pop('bases', (object,)), dict(members, __module__=module))
    m = sys.modules.setdefault(module, types.ModuleType(module)); setattr(m, cls, made)
    return made

@pytest.fixture
def lightning(tmp_path):
    "A file as lightning and OmegaConf leave it: unknown classes with state, slots, dict and list bases, enums, functions"
    before = set(sys.modules)
    Dict = foreign('omegaconf_x.DictConfig', __init__=lambda self, **kw: self.__dict__.update(kw))
    Attrs = foreign('lightning_x.AttributeDict', bases=(dict,))
    Items = foreign('lightning_x.ItemList', bases=(list,))
    Slots = foreign('lightning_x.Slotted', __slots__=('a',))
    def build(*a): return Dict()
    build.__module__, build.__qualname__ = 'lightning_x', 'build'; sys.modules['lightning_x'].build = build
    Made = foreign('lightning_x.Made', __reduce__=lambda self: (build, (1, 2), {'later': 3}))
    slotted = Slots(); slotted.a = 1
    w = {'m.a': torch.randn(4, 3), 'm.half': torch.randn(2).half(), 'm.bf': torch.randn(2).bfloat16(), 'm.n': torch.arange(3), 'm.flag': torch.tensor(True),
         'm.view': torch.randn(4, 6)[1::2, ::3], 'm.t': torch.randn(3, 5).T, 'm.empty': torch.zeros(0, 3), 'm.p': nn.Parameter(torch.randn(2))}
    obj = dict(epoch=3, cfg=Dict(lr=.1, names=['a'], inner=Dict(b=1)), hyper=Attrs(a=1, b=Attrs()), items=Items([1, Dict()]), slotted=slotted, made=Made(),
               odd={Dict(): 1}, space=argparse.Namespace(a=1), path=Path('/x'), counter=collections.Counter('aab'), fall=collections.defaultdict(list, a=[1]),
               ordered=collections.OrderedDict(a=1), array=np.arange(6.).reshape(2, 3), scalar=np.float32(2.5), optimizer_states=[dict(state={0: dict(step=1)})],
               size=torch.Size([1, 2]), dtype=torch.float16, callbacks={Dict: {'best': torch.tensor(1.)}}, state_dict=w)
    def write(zipped):
        file = tmp_path/f'light{zipped}.ckpt'
        torch.save(obj, file, _use_new_zipfile_serialization=zipped)
        for name in set(sys.modules) - before:
            if name.endswith('_x'): del sys.modules[name]
        return file, w
    yield write

@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_unknown_classes_become_stand_ins(lightning, zipped):
    file, w = lightning(zipped)
    with pytest.raises(Exception): torch.load(file, weights_only=True)
    got = load_official(file)
    assert same(got, w) and all(got[k].dtype == w[k].dtype for k in w)
    whole = (read_zip if zipped else read_legacy)(file)
    assert isinstance(whole['cfg'], Inert) and whole['cfg'].state['lr'] == .1 and whole['epoch'] == 3 and whole['counter']['a'] == 2
    assert whole['dtype'] is torch.float16 and whole['scalar'] == 2.5 and (whole['array'].value == np.arange(6.).reshape(2, 3)).all()

@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_our_reader_equals_torchs(tmp_path, zipped):
    base = torch.randn(10)
    w = {f'{t}': torch.ones(3).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)}
    w |= dict(shared=base[2:5], base=base, scalar=torch.tensor(2.), none=torch.zeros(0))
    torch.save(w, tmp_path/'a.pth', _use_new_zipfile_serialization=zipped)
    assert same((read_zip if zipped else read_legacy)(tmp_path/'a.pth'), torch.load(tmp_path/'a.pth', weights_only=True))

def test_where_the_weights_are(tmp_path):
    w = dict(a=torch.randn(2), b=torch.randn(1))
    for part in ('model_state_dict', 'state_dict', 'model'):
        torch.save({'epoch': 1, part: w, 'optimizer': {'a': torch.ones(1)}}, tmp_path/'a.pth')
        assert same(load_official(tmp_path/'a.pth'), w)
    torch.save({'module.' + k: t for k, t in w.items()}, tmp_path/'a.pth'); assert same(load_official(tmp_path/'a.pth'), w)
    torch.save({'teacher': w, 'model': dict(c=w['a'])}, tmp_path/'a.pth'); assert same(load_official(tmp_path/'a.pth', part='teacher'), w)
    with pytest.raises(ValueError, match="no 'student' in it, only teacher, model"): load_official(tmp_path/'a.pth', part='student')
    save_file(w, tmp_path/'b.safetensors'); assert same(load_official(tmp_path/'b.safetensors'), w)

def test_directories_and_shards(tmp_path):
    w = dict(a=torch.randn(2), b=torch.randn(1))
    d = tmp_path/'d'; d.mkdir()
    with pytest.raises(ValueError, match='neither model.safetensors'): load_official(d)
    torch.save(w, d/'pytorch_model.bin'); assert same(load_official(d), w)
    save_file(dict(a=w['a']), d/'model-1.safetensors'); save_file(dict(b=w['b']), d/'model-2.safetensors')
    (d/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(a='model-1.safetensors', b='model-2.safetensors'))))
    (d/'pytorch_model.bin').unlink(); assert same(load_official(d), w)
    (d/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(a='../../etc/model-1.safetensors', b='model-2.safetensors'))))
    assert same(load_official(d), w)   # a shard is looked for in its own directory, whatever the index says

@pytest.mark.parametrize('name,content', [('none.pth', None), ('text.pth', b'hello there'), ('empty.pth', b''), ('cut.pth', 'cut'), ('cut.safetensors', 'cut'),
                                          ('text.safetensors', b'hello there'), ('zip.pth', 'zip'), ('numbers.pth', 'numbers'), ('bomb.pth', 'bomb'), ('list.pth', 'list')])
def test_bad_files_get_one_sentence(tmp_path, name, content):
    file = tmp_path/name
    if isinstance(content, bytes): file.write_bytes(content)
    elif content == 'cut':
        whole = tmp_path/'whole'
        (torch.save if name.endswith('pth') else save_file)(dict(a=torch.randn(100)), whole)
        file.write_bytes(whole.read_bytes()[:300])
    elif content in ('zip', 'bomb'):
        with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z:
            z.writestr('a/data.pkl' if content == 'bomb' else 'a.txt', bytes(10**7) if content == 'bomb' else b'hello')
    elif content == 'numbers': torch.save(dict(a=1, b='x'), file)
    elif content == 'list': torch.save([torch.ones(1)], file)
    with pytest.raises(ValueError, match=name) as e: load_official(file)
    assert '\n' not in str(e.value).strip() and len(str(e.value)) < 400

def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.pth', 'w') as z:
        for n in ('a/data.pkl', 'a/constants.pkl', 'a/code/x.py', 'a/version'): z.writestr(n, b'3\n')
    with pytest.raises(ValueError, match='TorchScript'): load_official(tmp_path/'a.pth')

# ---- our own files ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Inner:
    n: int = 2
    sizes: tuple = (1, 2)

@dataclass(frozen=True)
class Config:
    d: int = 4
    inner: Inner|None = Inner()
    name: str = 'x'

class Tied(nn.Module):
    def __init__(self, config=Config()):
        super().__init__()
        self.config, self.words, self.head = config, nn.Embedding(7, config.d), nn.Linear(config.d, 7, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer('queue', torch.randn(3)); self.register_buffer('at', torch.tensor(5))

def test_model_round_trip(tmp_path):
    model = Tied(Config(6, Inner(3, (4, 5))))
    save_model(model, tmp_path/'m', dict(scores=dict(exact=.9), command='vl-tutor train', data='sha256:0'))
    back = load_model(tmp_path/'m', [Tied, Config, Inner])
    assert back.config == model.config and same(back.state_dict(), model.state_dict()) and back.head.weight is back.words.weight and not back.training
    assert json.loads((tmp_path/'m'/'card.json').read_text())['scores'] == dict(exact=.9)
    assert sorted(p.name for p in (tmp_path/'m').iterdir()) == ['card.json', 'model.safetensors']
    assert load_model(tmp_path/'m', [Tied, Config, Inner]).config.inner.sizes == (4, 5)

def test_half_precision_storage(tmp_path):
    model = Tied(Config(64))
    save_model(model, tmp_path/'full'); save_model(model, tmp_path/'half', half=True)
    small, full = [(tmp_path/n/'model.safetensors').stat().st_size for n in ('half', 'full')]
    back = load_model(tmp_path/'half', [Tied, Config, Inner])
    assert small < .75*full and back.words.weight.dtype == torch.float32 and back.at == 5
    assert torch.equal(back.words.weight, model.words.weight.half().float())
    with torch.no_grad(): model.words.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match='too large for fp16: words.weight'): save_model(model, tmp_path/'no', half=True)
    assert not (tmp_path/'no').exists()

def test_wrong_cards(tmp_path):
    save_model(Tied(), tmp_path/'m'); card = tmp_path/'m'/'card.json'
    with pytest.raises(ValueError, match="'Config' is not one of"): load_model(tmp_path/'m', [Tied])
    with pytest.raises(ValueError, match='holds a Tied, not one of'): load_model(tmp_path/'m', [Config, Inner])
    with pytest.raises(ValueError, match='does not exist'): load_model(tmp_path/'none', [Tied])
    text = card.read_text()
    card.write_text(text.replace('sha256:', 'sha256:0')); pytest.raises(ValueError, load_model, tmp_path/'m', [Tied, Config, Inner])
    card.write_text(text.replace('"d": 4', '"d": 5'))
    with pytest.raises(ValueError, match='does not fit its card'): load_model(tmp_path/'m', [Tied, Config, Inner])
    card.write_text(text.replace('"d"', '"depth"'))
    with pytest.raises(ValueError, match='config of Config'): load_model(tmp_path/'m', [Tied, Config, Inner])
    card.write_text('{')
    with pytest.raises(ValueError, match='is not JSON'): load_model(tmp_path/'m', [Tied, Config, Inner])

plain = st.none()|st.booleans()|st.integers()|st.floats(allow_nan=False)|st.text()
trees = st.recursive(plain, lambda t: st.lists(t, max_size=3)|st.tuples(t, t)|st.dictionaries(st.text(max_size=5)|st.integers(), t, max_size=3), max_leaves=10)

@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_tree_of_plain_values_round_trips(tree):
    tensors = {}
    assert unpack(json.loads(json.dumps(pack(tree, tensors))), tensors) == tree and not tensors

def test_checkpoint_round_trip(tmp_path):
    model = Tied(); opt = torch.optim.AdamW(model.parameters(), betas=(.9, .98))
    model.words(torch.arange(7)).square().sum().backward(); opt.step()
    random.seed(3); np.random.seed(4); torch.manual_seed(5); np.random.randn()
    save_checkpoint(tmp_path, model=model, optimizer=opt, step=7, log=[dict(loss=float('nan'), at=float('-inf'))], queue=[torch.arange(3), (1, None)])
    drawn = random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(3)
    other = Tied(); opt2 = torch.optim.AdamW(other.parameters())
    parts = load_checkpoint(tmp_path, model=other, optimizer=opt2)
    again = random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(3)
    assert drawn[:4] == again[:4] and torch.equal(drawn[4], again[4])
    assert parts['step'] == 7 and np.isnan(parts['log'][0]['loss']) and parts['log'][0]['at'] == -np.inf and torch.equal(parts['queue'][0], torch.arange(3))
    assert same(other.state_dict(), model.state_dict()) and opt2.state_dict()['param_groups'] == opt.state_dict()['param_groups']
    assert all(same(a, b) for a, b in zip(opt2.state_dict()['state'].values(), opt.state_dict()['state'].values()))
    with pytest.raises(ValueError, match='holds no ema, only model, optimizer'): load_checkpoint(tmp_path, ema=other)

def test_loading_fills_nothing_from_a_damaged_file(tmp_path):
    path = save_checkpoint(tmp_path, model=Tied())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match='not a whole safetensors file'): load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match='does not exist'): load_checkpoint(tmp_path/'none')

def test_views_of_one_store_are_saved_apart(tmp_path):
    base = torch.arange(12.).reshape(3, 4)
    save_checkpoint(tmp_path, a=base, again=base, turned=base.T, row=base[1], nothing=torch.zeros(0, 3))
    got = load_checkpoint(tmp_path)
    assert torch.equal(got['turned'], base.T) and torch.equal(got['row'], base[1]) and got['again'] is got['a'] and got['nothing'].shape == (0, 3)

def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match='log.0.when: a complex'): save_checkpoint(tmp_path, log=[dict(when=1j)])
    assert not list(tmp_path.iterdir())

def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path/'a'
    write_whole(path, lambda p: p.write_text('old'))
    def fail(p): p.write_text('half'); raise RuntimeError('disk full')
    with pytest.raises(RuntimeError): write_whole(path, fail)
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a']

KILLED = '''
import os, signal, sys, torch
from vl_tutor.training import checkpoints as c
folder, save = sys.argv[1], c.save_file
def slow(tensors, path, **kw):   # dies with half of the second save on disk
    save(tensors, path, **kw)
    if c.unpack(__import__('json').loads(kw['metadata']['note']), tensors)['step'] == 2:
        with open(path, 'rb+') as f: f.truncate(os.path.getsize(path)//2)
        os.kill(os.getpid(), signal.SIGKILL)
c.save_file = slow
for step in (1, 2): c.save_checkpoint(folder, step=step, w=torch.full((1000,), float(step)))
'''
LOOP = '''
import sys, torch
from vl_tutor.training.checkpoints import save_checkpoint
for step in range(10**6): save_checkpoint(sys.argv[1], step=step, w=torch.full((200_000,), float(step))); print(step, flush=True)
'''

def test_killed_in_the_middle_of_a_save(tmp_path):
    p = subprocess.run([sys.executable, '-c', KILLED, str(tmp_path)])
    assert p.returncode == -signal.SIGKILL
    got = load_checkpoint(tmp_path)
    assert got['step'] == 1 and (got['w'] == 1).all()

def test_killed_at_any_time(tmp_path):
    for _ in range(2):
        p = subprocess.Popen([sys.executable, '-c', LOOP, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for line in p.stdout:
            if int(line) >= 3: break
        time.sleep(random.random()/50)
        p.send_signal(signal.SIGKILL); done = [int(line), *map(int, p.stdout.read().split())][-1]; p.wait()
        got = load_checkpoint(tmp_path)
        assert got['step'] in (done, done + 1) and (got['w'] == got['step']).all()


def test_a_card_is_an_object(tmp_path):
    (tmp_path/'card.json').write_text('[]')
    with pytest.raises(ValueError, match='holds no card'): read_card(tmp_path)

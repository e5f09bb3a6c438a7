"The house rules that a machine can check: export in sync, sizes, forbidden calls, light import, bundled weights, wheel."
import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
from house import root

package = root/'vl_tutor'
modules = sorted(p for p in package.rglob('*.py') if p.name not in ('_modidx.py', '__init__.py'))
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
bin_dir = Path(sys.executable).parent
settings = ConfigParser(delimiters=['='])
settings.read(root/'settings.ini', encoding='utf-8')
cfg = settings['DEFAULT']


def relative(path): return path.relative_to(root).as_posix()
def parsed(path): return ast.parse(path.read_text(encoding='utf-8'))


# ---- notebooks and package are one thing ----

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the project, exported and cleaned"
    copy = tmp_path_factory.mktemp('export')
    for name in ('settings.ini', 'setup.py', 'pyproject.toml'): shutil.copy(root/name, copy)
    for name in ('nbs', 'vl_tutor'): shutil.copytree(root/name, copy/name, ignore=shutil.ignore_patterns('__pycache__', 'weights', '.*'))
    for tool in ('nbdev-export', 'nbdev-clean'): subprocess.run([bin_dir/tool], cwd=copy, check=True, capture_output=True, timeout=300)
    return copy


def test_export_in_sync(exported):
    made = {p.relative_to(exported) for p in (exported/'vl_tutor').rglob('*.py')}
    ours = {p.relative_to(root) for p in package.rglob('*.py')}
    assert made == ours, f'only one side has {sorted(map(str, made ^ ours))}: run make export'
    stale = [str(p) for p in sorted(ours) if (exported/p).read_bytes() != (root/p).read_bytes()]
    assert not stale, f'not what the notebooks export (run make export): {stale}'


def test_clean_notebooks_in_sync(exported):
    dirty = [relative(p) for p in notebooks if (exported/p.relative_to(root)).read_bytes() != p.read_bytes()]
    assert not dirty, f'not cleaned (run make export): {dirty}'


def test_every_module_has_a_notebook_in_the_same_folder():
    homes = {}
    for nb in notebooks:
        source = [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells']]
        for name in re.findall(r'^#\| default_exp ([\w.]+)', '\n'.join(source), re.M): homes[name.replace('.', '/') + '.py'] = nb
    assert set(homes) == {p.relative_to(package).as_posix() for p in modules}
    for module, nb in homes.items():
        assert (root/'nbs'/module).parent == nb.parent, f'{relative(nb)} exports {module}'
        assert '_' + Path(module).stem in nb.stem, f'{relative(nb)} exports {module}'       # 48_train_captioner → captioner


def test_notebooks_store_their_outputs():
    for nb in notebooks:
        code = [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        if nb.name != 'index.ipynb': assert any(c['outputs'] for c in code), f'{relative(nb)} stores no output: run make notebooks'
        errors = [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
        assert not errors, f'{relative(nb)} stores an error'
        assert nb.stat().st_size < 1_500_000, f'{relative(nb)} has {nb.stat().st_size/1e6:.1f} MB'


# ---- metadata ----

def test_version_is_said_once():
    import vl_tutor
    made = subprocess.run([sys.executable, 'setup.py', '--version'], cwd=root, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert made == vl_tutor.__version__
    assert re.fullmatch(r'\d+\.\d+\.\d+', made)
    assert made not in (root/'settings.ini').read_text() + (root/'setup.py').read_text() + (root/'pyproject.toml').read_text()


def test_installed_metadata_is_settings_ini():
    from importlib.metadata import entry_points, metadata, requires
    meta = metadata(cfg['lib_name'])
    assert meta['Summary'] == cfg['description']
    assert meta['License-Expression'] == cfg['license'] or meta['License'] == cfg['license']
    needed = {re.match(r'[\w-]+', r)[0].lower().replace('_', '-') for r in requires(cfg['lib_name']) if 'extra' not in r}
    assert needed == {re.match(r'[\w-]+', r)[0].lower().replace('_', '-') for r in cfg['requirements'].split()}
    script, = entry_points(group='console_scripts', name='vl-tutor')
    assert script.value in cfg['console_scripts']


def test_every_import_is_a_requirement():
    "What the package imports, at any depth of nesting, is declared (or the standard library's)"
    names = {'sklearn': 'scikit-learn', 'PIL': 'pillow', 'gradio_client': 'gradio'}
    lists = ' '.join(cfg[name] for name in ('requirements', 'data_requirements', 'video_requirements'))
    declared = {re.match(r'[\w-]+', r)[0].lower() for r in lists.split()} | {'fastcore'}    # fastcore: nbdev's and fastai's own base
    for path in modules:
        for node in ast.walk(parsed(path)):
            tops = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {t.split('.')[0] for t in tops} - set(sys.stdlib_module_names) - {'vl_tutor'}:
                assert names.get(top, top).lower() in declared, f'{relative(path)} imports {top}, which settings.ini does not require'


def test_import_is_light():
    code = ("import sys, vl_tutor; heavy = {'transformers', 'gradio', 'fastai', 'timm', 'matplotlib', 'sklearn', 'datasets', 'torch'} & set(sys.modules);"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, '-c', code], check=True, cwd='/', timeout=60)


def test_modules_import_heavy_things_only_where_used():
    names = ['vl_tutor.' + p.relative_to(package).with_suffix('').as_posix().replace('/', '.') for p in modules]
    code = (f"import sys, importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
            "    heavy = {'transformers', 'gradio', 'fastai.vision', 'datasets', 'av', 'webdataset', 'ftfy'} & set(sys.modules)\n    assert not heavy, f'{name} imports {heavy}'")
    r = subprocess.run([sys.executable, '-c', code], cwd='/', timeout=180, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-1500:]


# ---- the shape of the code ----

def functions(path): return [n for n in ast.walk(parsed(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
def length(node): return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize('path', modules, ids=relative)
def test_sizes(path):
    lines = path.read_text(encoding='utf-8').splitlines()
    code = [line for line in lines if line.strip() and not line.lstrip().startswith('#')]
    assert len(code) <= 350, f'{len(code)} lines of code'
    made = range(next(i for i, line in enumerate(lines) if line.startswith('# %% ../')))       # nbdev's own head: __all__
    wide = [f'{path.name}:{i+1} has {len(line)} columns' for i, line in enumerate(lines) if len(line) > 110 and i not in made and not line.startswith('# %% ')]
    assert not wide, wide
    long = [f'{f.name} has {length(f)} lines' for f in functions(path) if length(f) > 45]
    assert not long, long


def test_functions_are_short_and_explained():
    every = [(p, f) for p in modules for f in functions(p)]
    assert statistics.median(length(f) for _, f in every) <= 8
    helped = lambda n: any(isinstance(d, ast.Call) and 'help' in {k.arg for k in d.keywords} for d in n.decorator_list)     # a command's help
    silent = [f'{relative(p)}: {n.name}' for p in modules for n in parsed(p).body
              if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_' and length(n) > 2 and not ast.get_docstring(n) and not helped(n)]
    assert not silent, f'public and without a docstring: {silent}'


# ---- what must not be in the code ----

PICKLE_IMPORTER = 'vl_tutor/training/released.py'      # the one restricted importer of the authors' files


def called(node):
    try: return ast.unparse(node.func)
    except Exception as e: raise AssertionError(f'cannot read {ast.dump(node)[:80]}') from e


def forbidden(tree, path):
    "`(line, what)` for each call or import that the project does not allow"
    for n in ast.walk(tree):
        if isinstance(n, (ast.Import, ast.ImportFrom)) and path != PICKLE_IMPORTER:
            names = [a.name for a in n.names] + [getattr(n, 'module', '') or '']
            if {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'} & set(names): yield n.lineno, 'imports a pickler'
        if isinstance(n, ast.keyword) and n.arg == 'shell' and not (isinstance(n.value, ast.Constant) and n.value.value is False): yield n.value.lineno, 'shell=True'
        if isinstance(n, ast.keyword) and n.arg == 'trust_remote_code': yield n.value.lineno, 'trust_remote_code'
        if isinstance(n, ast.Constant) and n.value == 'trust_remote_code': yield n.lineno, 'trust_remote_code'
        if isinstance(n, ast.ExceptHandler) and n.type is None: yield n.lineno, 'bare except'
        if not isinstance(n, ast.Call): continue
        name = called(n)
        safe = any(k.arg == 'weights_only' and isinstance(k.value, ast.Constant) and k.value.value is True for k in n.keywords)
        if name in ('eval', 'exec', 'os.system', 'os.popen'): yield n.lineno, name
        if re.search(r'pickle\.loads?$|^load_learner$|\.load_learner$', name): yield n.lineno, name
        if name == 'torch.load' and not safe: yield n.lineno, 'torch.load without weights_only=True'
        if name.endswith('.cuda') or name == 'print': yield n.lineno, name


@pytest.mark.parametrize('path', modules, ids=relative)
def test_nothing_forbidden(path):
    allowed = {'print'} if relative(path).startswith(('vl_tutor/demos/', 'vl_tutor/recipes/')) or path.stem == 'notation' else set()
    found = [f'{relative(path)}:{line}: {what}' for line, what in forbidden(parsed(path), relative(path)) if what not in allowed]
    assert not found, found


@pytest.mark.parametrize('code', ['eval("1")', 'import pickle', 'from pickle import loads', 'pickle.load(f)', 'torch.load(p)', 'torch.load(p, weights_only=False)',
                                  'subprocess.run(c, shell=True)', 'AutoModel.from_pretrained(n, trust_remote_code=True)', 'x.cuda()', 'print(1)',
                                  'try: f()\nexcept: pass', 'exec(s)', 'os.system(s)', 'load_learner(p)'])
def test_the_search_finds(code):
    assert list(forbidden(ast.parse(code), 'vl_tutor/x.py'))


@pytest.mark.parametrize('code', ['model.eval()', 'torch.load(p, weights_only=True)', 'self.cuda_graph()', 'subprocess.run(c)'])
def test_the_search_leaves_alone(code):
    assert not list(forbidden(ast.parse(code), 'vl_tutor/x.py'))


# ---- what is shipped ----

def test_bundled_weights_are_small_and_safe():
    files = [p for p in (package/'weights').rglob('*') if p.is_file()]
    assert {p.suffix for p in files} <= {'.safetensors', '.json', '.csv', '.txt', '.md'}, sorted(map(relative, files))
    assert sum(p.stat().st_size for p in files) <= 12e6
    for model in (package/'weights').rglob('*.safetensors'): assert json.loads((model.parent/'card.json').read_text()), relative(model)


def test_wheel_holds_package_and_weights(tmp_path):
    source = tmp_path/'source'
    source.mkdir()
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(root/name, source)
    shutil.copytree(package, source/'vl_tutor', ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', str(tmp_path), str(source)], check=True, capture_output=True, timeout=300)
    wheel, = tmp_path.glob('*.whl')
    packed = set(zipfile.ZipFile(wheel).namelist())
    ours = {relative(p) for p in package.rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert ours <= packed, f'not in the wheel: {sorted(ours - packed)}'
    assert any(name.endswith('licenses/LICENSE') for name in packed)
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    code = f"import sys; sys.path.insert(0, {str(tmp_path/'site')!r}); import vl_tutor; assert vl_tutor.__file__.startswith({str(tmp_path)!r})"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)

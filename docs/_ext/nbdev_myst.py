"""Sphinx extension: read nbdev notebooks straight from nbs/ and hand them to MyST-NB.

Nothing is executed and nothing of the package is imported: pages show the outputs stored in the notebooks, and the API
tables come from the text of the exported modules (signature, docstring, and the comment behind each argument). A
`source-read` handler rewrites each notebook in memory, so there are no files in between."""
import ast, importlib.util, io, json, re, runpy, shutil, tokenize
from functools import lru_cache
from hashlib import md5
from pathlib import Path

HIDE = {'hide', 'default_exp', 'export', 'exporti'}     # the cells that nbdev leaves out of its own site
PLAIN = {'image', 'video', 'text', 'caption', 'question', 'answer', 'box', 'label', 'pair', 'weights', 'step', 'image_size'}
NO_LINK = re.compile(r'^\s*(#|\|?\s*:?-{3,})')
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$')
TICK = re.compile(r'(?<![`{}\w\[])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])')
CALLOUT = re.compile(r'^(:{3,})\s*\{\.callout-(\w+)([^}]*)\}\s*$')
MATH_LABEL = re.compile(r'(\$\$)\s*\{#(eq-[\w-]+)\}')
root = Path(__file__).resolve().parents[2]

# ---- the exported package, read as text ----

@lru_cache(None)
def symbols(lib):
    "`{module: [full names]}` of everything exported, from nbdev's own index"
    return {m: list(s) for m, s in runpy.run_path(str(root/lib/'_modidx.py'))['d']['syms'].items()}

@lru_cache(None)
def module(name):
    "The syntax tree of a module and its comments by line"
    text = (root/(name.replace('.', '/') + '.py')).read_text(encoding='utf-8')
    notes = {t.start[0]: t.string.lstrip('# ') for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
    return ast.parse(text), notes

def patched(node):
    "The class that a `@patch`ed function belongs to, or None"
    for d in getattr(node, 'decorator_list', []):
        d = d.func if isinstance(d, ast.Call) else d
        if isinstance(d, ast.Name) and d.id == 'patch' and node.args.args and node.args.args[0].annotation:
            return ast.unparse(node.args.args[0].annotation)

def find(mod, name):
    "The syntax node of `name` (`f`, `Class`, `Class.method`) in module `mod`, or None"
    tree, _ = module(mod)
    owner, _, method = name.rpartition('.')
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): continue
        if node.name == name or (owner and node.name == method and patched(node) == owner): return node
        if owner and node.name == owner and isinstance(node, ast.ClassDef):
            for n in node.body:
                if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name == method: return n

def plain(annotation):
    "An annotation as text; of `Annotated[T, …]` and of a call that makes one, such as `opt(T, …)`, only the type"
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == 'Annotated': return plain(annotation.slice.elts[0])
    if isinstance(annotation, ast.Call): return plain(annotation.args[0]) if annotation.args else None
    return annotation and ast.unparse(annotation)

def arguments(fn):
    "`(name as written, default or None, annotation or None, last line)` for each argument but self"
    a, rows = fn.args, []
    pos = a.posonlyargs + a.args
    defaults = [None]*(len(pos) - len(a.defaults)) + a.defaults
    rows += [('', p, d) for p, d in zip(pos, defaults)]
    if a.vararg: rows.append(('*', a.vararg, None))
    rows += [('', p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: rows.append(('**', a.kwarg, None))
    if rows and rows[0][1].arg in ('self', 'cls'): rows = rows[1:]
    return [(star + p.arg, d and ast.unparse(d), plain(p.annotation), (d or p).end_lineno) for star, p, d in rows]

def fields(cls):
    "The same for the fields of a dataclass"
    return [(n.target.id, n.value and ast.unparse(n.value), ast.unparse(n.annotation), n.end_lineno)
            for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]

def constructor(cls):
    init = next((n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
    return arguments(init) if init else fields(cls)

def table(rows, notes, returns=None):
    "A markdown table of arguments, where at least one of them is explained"
    if returns and returns[1] not in ('', 'None'): rows = [*rows, ('returns', None, returns[1], returns[0])]
    if not any(notes.get(r[3]) for r in rows): return ''
    esc = lambda s: (s or '').replace('|', '\\|')
    code = lambda s: f'`{esc(s)}`' if s else ''
    cells = [[f'*{n}*' if n == 'returns' else f'**{esc(n)}**', esc(notes.get(line)), code(t), code(d)] for n, d, t, line in rows]
    shown = [i for i in range(4) if i < 2 or any(row[i] for row in cells)]
    head = [['Argument', 'Meaning', 'Type', 'Default'], ['---']*4]
    return '\n'.join('| ' + ' | '.join(row[i] for i in shown) + ' |' for row in head + cells)

def signature(rows, fn=None, *, types=False):
    "Arguments and defaults, the star of keyword-only ones kept; types only where no table tells them"
    kw = {a.arg for a in fn.args.kwonlyargs} if fn and not fn.args.vararg else set()
    out = []
    for name, default, annotation, _ in rows:
        if name in kw and '*' not in out: out.append('*')
        note = f': {annotation}' if types and annotation else ''
        value = '' if default is None else f'={default if len(default) < 40 else "..."}'
        out.append(name + note + (value.replace('=', ' = ', 1) if note else value))
    back = f' -> {ast.unparse(fn.returns)}' if types and fn and fn.returns and fn.name != '__init__' else ''
    return f'({", ".join(out)}){back}'

def block(kind, full, rows, doc, tbl, inner='', fn=None, fence='`'*5):
    return f'{fence}{{py:{kind}}} {full}{signature(rows, fn, types=not tbl)}\n{doc}\n\n{tbl}\n\n{inner}\n{fence}'

def describe(full, lib, mod):
    "A `py:` directive for the exported symbol `full`: signature, docstring, argument table, and its public methods"
    node, (_, notes) = find(mod, full[len(mod)+1:]), module(mod)
    if node is None: return ''
    doc = link(ast.get_docstring(node) or '', lib, mod)
    if isinstance(node, ast.ClassDef):
        rows = constructor(node)
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != '_' and ast.get_docstring(n)]
        inner = '\n\n'.join(describe_function('method', f'{full}.{m.name}', m, lib, mod, fence='`'*4) for m in methods)
        return block('class', full, rows, doc, table(rows, notes), inner, init)
    return describe_function('method' if '.' in full[len(mod)+1:] else 'function', full, node, lib, mod)

def describe_function(kind, full, fn, lib, mod, fence='`'*5):
    _, notes = module(mod)
    rows = arguments(fn)
    if patched(fn): rows = rows[1:] if rows and rows[0][2] == patched(fn) else rows
    returns = fn.returns and (fn.returns.end_lineno, ast.unparse(fn.returns))
    return block(kind, full, rows, link(ast.get_docstring(fn) or '', lib, mod), table(rows, notes, returns), fn=fn, fence=fence)

# ---- words ----

def resolve(name, lib, mod, call):
    "The full name that a backticked `name` means on the page of module `mod`, or None"
    known = symbols(lib)
    if name in PLAIN and not call: return None
    if mod and f'{mod}.{name}' in known.get(mod, []): return f'{mod}.{name}'
    if name.isalpha() and name.islower() and not call: return None       # an everyday word, unless this page defines it
    if '.' in name:
        hits = [s for syms in known.values() for s in syms if s == name or s == f'{lib}.{name}' or s.endswith('.' + name)]
    else: hits = [f'{m}.{name}' for m, syms in known.items() if f'{m}.{name}' in syms]
    return hits[0] if len(hits) == 1 and '.__' not in hits[0] else None

@lru_cache(None)
def elsewhere(name):
    "The page of another nbdev-indexed library's symbol (`torch.nn.Module`), or None"
    from nbdev.doclinks import NbdevLookup
    if '.' not in name: return None
    url = NbdevLookup().doc(name)
    return url if url and url.startswith('http') else None

def link(text, lib, mod=None):
    "Backticks become links: our own symbols by Sphinx's `py` domain, other libraries' by nbdev's index"
    def one(m):
        name, call = m[1], m[2] or ''
        if (own := resolve(name, lib, mod, call)) and own in anchored(lib): return f'{{py:obj}}`{name}{call} <{own}>`'
        return f'[`{name}{call}`]({url})' if (url := elsewhere(name)) else m[0]
    out, fence = [], False
    for line in text.split('\n'):
        if line.lstrip().startswith(('```', '~~~')): fence = not fence
        out.append(line if fence or line.startswith('    ') or NO_LINK.match(line) else TICK.sub(one, line))
    return '\n'.join(out)

def callouts(text):
    "Quarto's `::: {.callout-note}` becomes a MyST admonition"
    lines, out, i = text.split('\n'), [], 0
    while i < len(lines):
        m = CALLOUT.match(lines[i].strip())
        i += 1
        if not m: out.append(lines[i-1]); continue
        body = []
        while i < len(lines) and lines[i].strip() != m[1]: body.append(lines[i]); i += 1
        i += 1
        title = re.search(r'title="([^"]*)"', m[3])
        title = title[1] if title else m[2].title()
        out += [f'{m[1]}{{admonition}} {title}', f':class: {m[2]}' + (' dropdown' if 'collapse="true"' in m[3] else ''), '', *body, m[1]]
    return '\n'.join(out)

def markdown(src, lib, mod):
    src = re.sub(r'^# (.*)\n+> ', r'# \1\n\n> ', src)
    src = re.sub(r'(</?(?:details|summary)[^>]*>)\n(?=[^\n<])', r'\1\n\n', src)      # words folded in HTML stay markdown
    return link(callouts(MATH_LABEL.sub(r'\1 (\2)', src)), lib, mod)

# ---- notebooks ----

def directives(src):
    "The `#|` lines a cell begins with, and the rest of it"
    lines, found = src.splitlines(), {}
    while lines and (m := DIRECTIVE.match(lines[0])):
        found[m[1]] = m[2] or True
        lines.pop(0)
    return found, '\n'.join(line for line in lines if not re.search(r'#\s*\|\s*hide_line\s*$', line))

def public(code):
    "Public names that an exported cell defines, `@patch`ed methods included"
    try: body = ast.parse(code).body
    except SyntaxError: return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [f'{patched(n)}.{n.name}' if patched(n) else n.name for n in body if isinstance(n, kinds) and n.name[0] != '_']

@lru_cache(None)
def anchored(lib):
    "Full names of all symbols that get a place on a page"
    found = set()
    for mod in symbols(lib):
        for node in module(mod)[0].body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name[0] == '_': continue
            found.add(f'{mod}.{patched(node)}.{node.name}' if patched(node) else f'{mod}.{node.name}')
            if isinstance(node, ast.ClassDef):
                found |= {f'{mod}.{node.name}.{n.name}' for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != '_' and ast.get_docstring(n)}
    return found

def md_cell(src): return dict(cell_type='markdown', id='d' + md5(src.encode()).hexdigest()[:12], metadata={}, source=src)

def tags(found):
    fold = {'echo': 'remove-input', 'output': 'remove-output'}
    on = {'code-fold': 'hide-input', 'output-fold': 'hide-output'}
    return sorted([t for k, t in fold.items() if found.get(k) == 'false'] + [t for k, t in on.items() if found.get(k) == 'true'])

def words(found, key, default=''): return str(found.get(key, default)).strip().strip('"\'')

def code_cell(c, found, code):
    "A shown cell: its directives become MyST-NB metadata, bare widget views go"
    meta = {**c['metadata'], 'tags': tags(found)}
    image = {}
    if 'fig-cap' in found or 'fig-alt' in found: image['alt'] = words(found, 'fig-alt', words(found, 'fig-cap'))
    if w := next((o['metadata']['image/png']['width'] for o in c['outputs'] if 'image/png' in o.get('metadata', {})), None): image['width'] = f'{w}px'
    if image: meta['mystnb'] = {'image': image}
    if 'fig-cap' in found: meta['mystnb']['figure'] = {'caption': words(found, 'fig-cap'), **({'name': found['label']} if 'label' in found else {})}
    code = re.sub(r'^\s*%(load_ext|autoreload|reload_ext|matplotlib|config)\b.*\n?', '', code, flags=re.M)
    outs = [o for o in c['outputs'] if 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]
    return {**c, 'metadata': meta, 'source': code.strip('\n'), 'outputs': outs} if code.strip() or outs else None

def convert(nb, lib):
    "The notebook as its page: hidden cells gone; symbols described in place where their source is hidden, else under **Reference**"
    sources = [''.join(c['source']) for c in nb['cells']]
    name = next((d['default_exp'] for s in sources for d in [directives(s)[0]] if isinstance(d.get('default_exp'), str)), None)
    mod, cells, reference, done = name and f'{lib}.{name}', [], [], set()
    for c, src in zip(nb['cells'], sources):
        if c['cell_type'] == 'markdown': cells.append({**c, 'source': markdown(src, lib, mod)})
        if c['cell_type'] != 'code': continue
        found, code = directives(src)
        hidden = found.keys() & HIDE or found.get('include') == 'false' or code.startswith('show_doc(')
        if not hidden and (shown := code_cell(c, found, code)): cells.append(shown)
        if mod in symbols(lib) and found.keys() & {'export', 'exports'} and 'hide' not in found:
            for full in (f'{mod}.{n}' for n in public(code)):
                if full in done or full not in symbols(lib)[mod]: continue
                text = describe(full, lib, mod)
                (reference if 'exports' in found else cells).append(md_cell(text))
                done |= {full, *re.findall(r'^`+\{py:method\} ([\w.]+)', text, re.M)}         # a class is described with its methods
    if reference: cells += [md_cell('## Reference'), *reference]
    return {**nb, 'cells': cells}

def chapters(docs, root_doc):
    "`{folder: [pages]}` in reading order: the numbers that file names begin with"
    number = lambda d: int((re.match(r'\d+', d.rpartition('/')[2]) or ['999'])[0])
    groups = {}
    for d in sorted(docs - {root_doc}, key=lambda d: (number(d), d)): groups.setdefault(d.rpartition('/')[0], []).append(d)
    return groups

def toctree(docs, root_doc):
    part = '```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {}\n\n{}\n```'
    return '\n\n'.join(part.format((folder or 'more').replace('_', ' ').capitalize(), '\n'.join(pages)) for folder, pages in chapters(docs, root_doc).items())

def source_read(app, docname, source):
    if not str(app.env.doc2path(docname)).endswith('.ipynb'): return
    nb = convert(json.loads(source[0]), app.config.nbdev_lib)
    if docname == app.config.root_doc: nb['cells'].append(md_cell(toctree(set(app.env.found_docs), docname)))
    source[0] = json.dumps(nb)

def copy_mathjax(app, exc):
    "One self-contained MathJax file (fonts are inside it) goes into the site, so pages need no network"
    if exc is not None: return
    src = Path(importlib.util.find_spec('sphinx-mathjax-offline').origin).parent/'static'/'mathjax'/'tex-svg.js'
    shutil.copy(src, Path(app.outdir)/'_static'/'tex-svg.js')

def setup(app):
    app.add_config_value('nbdev_lib', '', 'env')
    app.connect('source-read', source_read)
    app.connect('build-finished', copy_mathjax)
    return dict(parallel_read_safe=True, parallel_write_safe=True)

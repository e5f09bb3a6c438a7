"The built site: every page and every exported symbol is there, maths and search work offline, nothing is fetched from elsewhere."
import ast
import json
import re
import runpy
import sys
import pytest
from house import root

sys.path.insert(0, str(root/'docs'/'_ext'))
from nbdev_myst import HIDE, anchored, directives  # noqa: E402

notebooks = sorted(p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def cells(path, kind='code'):
    return [''.join(c['source']) for c in json.loads((root/'nbs'/path).read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


@pytest.mark.parametrize('notebook', notebooks, ids=str)
def test_page(notebook, site):
    html = (site/notebook.with_suffix('.html')).read_text(encoding='utf-8')
    title = re.search(r'^# (.*)$', '\n'.join(cells(notebook, 'markdown')), re.M)[1]
    assert re.sub(r'[`*]', '', title).split()[0] in re.sub(r'<[^>]+>', '', re.search(r'<h1>(.*?)</h1>', html, re.S)[1]).replace('’', "'")
    assert '#|' not in re.sub(r'<[^>]+>', '', html), 'a directive is shown'
    cells_shown = [d for d, code in map(directives, cells(notebook)) if not d.keys() & HIDE and d.get('echo') != 'false' and code.strip()]
    assert len(re.findall(r'class="[^"]*\bcell_input\b', html)) == len(cells_shown), 'cells that should be hidden are shown, or the other way round'


def test_index_leads_to_every_page(site):
    html = (site/'index.html').read_text(encoding='utf-8')
    missing = [str(n) for n in notebooks if n.name != 'index.ipynb' and html.count(f'href="{n.with_suffix(".html").as_posix()}"') < 2]
    assert not missing, f'not in both the sidebar and the chapter map: {missing}'


def exported():
    "Full names of the public functions, classes and patched methods of every module"
    return [s for module, symbols in runpy.run_path(str(root/'vl_tutor'/'_modidx.py'))['d']['syms'].items() for s in symbols
            if not any(part.startswith('_') for part in s.removeprefix(module + '.').split('.'))]


def test_search_knows_every_exported_symbol(site):
    index = json.loads(re.sub(r'^Search\.setIndex\(|\)$', '', (site/'searchindex.js').read_text(encoding='utf-8')))
    known = {f'{prefix}.{entry[-1] if isinstance(entry, list) else entry}' for prefix, entries in index['objects'].items() for entry in entries}
    wanted = [s for s in exported() if s in anchored('vl_tutor')]
    assert len(wanted) > 50
    assert not set(wanted) - known, sorted(set(wanted) - known)


def test_argument_notes_are_on_the_page(site):
    "Every comment behind an argument of an exported function is in its page's table"
    html = re.sub(r'<[^>]+>', '', (site/'primitives'/'01_attention.html').read_text(encoding='utf-8'))
    tree = ast.parse((root/'vl_tutor'/'primitives'/'attention.py').read_text())
    fn = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == 'attend_ref')
    assert ast.get_docstring(fn) in html
    assert html.count('queries (b h n d)') >= 1


REMOTE = re.compile(r'''<(?:script|link|img|iframe|source|video|audio|embed|object)\b[^>]*?(?:src|href|data)\s*=\s*["'](?:https?:)?//''')


def test_pages_ask_for_nothing_from_elsewhere(site):
    for page in site.rglob('*.html'):
        assert not REMOTE.findall(page.read_text(encoding='utf-8')), page.name
    for sheet in site.rglob('*.css'):
        assert not re.search(r'@import\s+["\']?(?:url\()?["\']?(?:https?:)?//|url\(\s*["\']?(?:https?:)?//', sheet.read_text(encoding='utf-8')), sheet.name
    assert (site/'_static'/'tex-svg.js').stat().st_size > 1_000_000


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_pages_in_a_browser(site, browser, width, scheme):
    "No page error, no request that leaves the machine, no sideways scroll"
    context = browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme)
    page, away, errors = context.new_page(), [], []
    page.on('request', lambda r: away.append(r.url) if not r.url.startswith(('file:', 'data:', 'blob:')) else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    for notebook in notebooks:
        page.goto((site/notebook.with_suffix('.html')).as_uri())
        wide = page.evaluate('document.documentElement.scrollWidth')
        assert wide <= width, f'{notebook} is {wide} px wide on a screen of {width}'
    context.close()
    assert not away and not errors, (away, errors)


def test_maths_is_set(site, browser):
    with_maths = [n for n in notebooks if re.search(r'\$\$', '\n'.join(cells(n, 'markdown')))]
    assert with_maths
    page = browser.new_page()
    page.goto((site/with_maths[0].with_suffix('.html')).as_uri())
    page.wait_for_selector('mjx-container svg', timeout=20_000)
    page.close()


def test_search_finds_a_function(site, browser):
    page = browser.new_page()
    page.goto((site/'search.html').as_uri() + '?q=attend_ref')
    page.wait_for_selector('#search-results li a', timeout=20_000)
    assert 'attend_ref' in page.locator('#search-results').inner_text()
    page.close()

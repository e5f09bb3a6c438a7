"The book's site: nbs/ is the source, nothing is executed, `make docs` writes docs/_build/html."
import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here/'_ext'), str(here.parent)]
ini = ConfigParser(delimiters=['='])
ini.read(here.parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

project = html_title = nbdev_lib = cfg['lib_name'].replace('-', '_')
author = cfg['author']
copyright = f'{author}, {cfg["license"]}'
extensions = ['myst_nb', 'nbdev_myst', 'sphinx_copybutton', 'sphinx.ext.mathjax']
root_doc = 'index'
exclude_patterns = ['_*', '.*', '**/.ipynb_checkpoints', '**/_*']
suppress_warnings = ['mystnb.unknown_mime_type']

nb_execution_mode = 'off'
nb_merge_streams = True
nb_ipywidgets_js = {}                     # no widget scripts from the network: pages show stored figures
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist', 'attrs_inline', 'attrs_block', 'html_image']
myst_heading_anchors = 4
mathjax_path = 'tex-svg.js'               # one file, fonts inside, copied by nbdev_myst
python_maximum_signature_line_length = 72
add_module_names = False

html_theme = 'furo'
templates_path, html_static_path = [], [str(here/'_static')]
html_css_files = ['custom.css']
html_show_sourcelink = False
html_copy_source = False
html_theme_options = dict(
    light_css_variables={'color-brand-primary': '#0072B2', 'color-brand-content': '#0072B2'},
    dark_css_variables={'color-brand-primary': '#56B4E9', 'color-brand-content': '#56B4E9'},
)
copybutton_prompt_text = r'^\$ '
copybutton_prompt_is_regexp = True

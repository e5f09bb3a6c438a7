"Package metadata: everything is read from settings.ini; the version from vl_tutor/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

lib = cfg['lib_name'].replace('-', '_')
version = re.search(r'^__version__\s*=\s*[\'"]([^\'"]+)', (here/lib/'__init__.py').read_text(encoding='utf-8'), re.M).group(1)
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
readme = here/'README.md'
extras = {name: cfg[f'{name}_requirements'].split() for name in ('data', 'video')}

setup(
    name=cfg['lib_name'],
    version=version,
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license=cfg['license'],
    keywords=cfg['keywords'],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[lib, lib + '.*']),
    package_data={lib: ['py.typed', 'weights/**/*', '**/*.json', '**/*.jsonl', '**/*.csv']},
    install_requires=cfg['requirements'].split(),
    extras_require=dict(extras, dev=[*cfg['dev_requirements'].split(), *extras['data'], *extras['video']]),
    entry_points={'console_scripts': [line for line in cfg['console_scripts'].splitlines() if line.strip()],
                  'nbdev': [f'{lib}={lib}._modidx:d']},
    classifiers=[f"Development Status :: {statuses[int(cfg['status']) - 1]}", 'Intended Audience :: Education',
                 'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3 :: Only'],
    zip_safe=False,
)

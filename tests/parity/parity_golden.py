"Finds every fixture under the golden root, and holds what the checkers of all systems share."
import os
import re
from pathlib import Path
from typing import Callable
from torch import Tensor, nn
from vl_tutor.models.parity import differences, first_difference
from vl_tutor.training.checkpoints import KeyMap

ROOT = Path(os.environ.get('VL_TUTOR_GOLDEN') or Path(__file__).resolve().parents[1]/'golden')
CHECKERS, MANIFESTS = {}, {}     # 'system/fixture' → what we compute ; 'system' → test of one manifest
GIVEN = {}                       # 'system/fixture' → names of inputs, where the names themselves do not say so
TRUTH = ('out.', 'mid.', 'after.')


def fixtures(root: Path = ROOT) -> list[str]:
    "Every folder that holds a fixture, and every folder that holds no other folder"
    folders = [p for p in root.rglob('*') if p.is_dir() and not (p.parent/'config.json').exists()]     # a fixture's own folders are its files
    inner = [p for p in folders if not any(f.is_dir() for f in p.iterdir()) or any(p.glob('*.safetensors')) or (p/'config.json').exists()]
    return sorted(p.relative_to(root).as_posix() for p in inner)


def manifests(root: Path = ROOT) -> list[str]:
    "Every list of official keys"
    return sorted(p.relative_to(root).as_posix() for p in root.rglob('manifest*.json'))


def checker(*names: str, given=None):
    "Registers a function (config, weights, io) → results in forward order for these fixtures"
    def register(f):
        CHECKERS.update(dict.fromkeys(names, f))
        if given is not None: GIVEN.update(dict.fromkeys(names, set(given)))
        return f
    return register


def named(fixture: str, io: dict) -> dict:
    "The tensors of a fixture with 'in.' or 'out.' before each name, whatever way the system has of saying so"
    if fixture in GIVEN: return {('in.' if k in GIVEN[fixture] else 'out.') + k: v for k, v in io.items()}
    return {re.sub('^(in|out)/', r'\1.', k): v for k, v in io.items()}


def manifest_checker(system: str):
    "Registers a function (name, shapes) that raises for a manifest it cannot build"
    def register(f): MANIFESTS[system] = f; return f
    return register


def fill(module: nn.Module, keys: KeyMap, official: dict) -> nn.Module:
    "Official tensors into one of our modules, strictly"
    module.load_state_dict(keys.to_ours(official, module.state_dict()))
    return module.eval()


def below(tensors: dict, start: str) -> dict: return {k[len(start):]: v for k, v in tensors.items() if k.startswith(start)}


def compare(ours: dict[str, Tensor], io: dict[str, Tensor], atol: Callable, rtol: Callable) -> int:
    "Every stored result against ours; the message names the first that differs. Returns how many were compared"
    theirs = {k: v for k, v in io.items() if k.startswith(TRUTH)}
    assert theirs, 'the fixture stores no result'
    first = first_difference(ours, theirs, atol=atol, rtol=rtol)
    assert first is None, f'{first}\nall: {[d.name for d in differences(ours, theirs, atol=atol, rtol=rtol)]}'
    assert set(ours) == set(theirs), f'compared by one side only: {sorted(set(ours) ^ set(theirs))}'
    return len(theirs)

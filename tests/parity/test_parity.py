"The same numbers as the authors' code: every fixture and manifest under the golden root, built from its own files."
import json
from pathlib import Path
import pytest
import torch
import parity_captioner
import parity_perceiver_vl
import parity_simla
import parity_uni_perceiver
import parity_vlc     # noqa: F401  registers its checkers; tolerances are those of parity_words
import parity_vlc_models     # noqa: F401
import parity_vlc_pictures     # noqa: F401
import parity_vlc_scores     # noqa: F401
import parity_vlc_training
import parity_words
from parity_golden import CHECKERS, MANIFESTS, ROOT, compare, fixtures, manifests, named
from vl_tutor.models.parity import read_golden

TOLERANCES = dict(captioner=parity_captioner, perceiver_vl=parity_perceiver_vl, simla=parity_simla, uni_perceiver=parity_uni_perceiver, vlc=parity_words)


@pytest.mark.parametrize('name', fixtures() or ['(none)'])
def test_fixture(name):
    assert name != '(none)', f'no fixture under {ROOT}'
    assert name in CHECKERS, f'{ROOT/name} is tested by nobody: register a checker'
    system, fixture = name.split('/')
    torch.manual_seed(0)
    config, weights, io = read_golden(ROOT/name)
    io = named(name, io or {f'out/{k}': v for k, v in weights.items()})      # without results of a model: the tensors that a file must yield
    ours = CHECKERS[name](config, weights, io)
    limits = TOLERANCES[system]
    assert compare(ours, io, limits.atol(fixture), limits.rtol(fixture)) == sum(not k.startswith('in.') for k in io)


LISTS = ROOT if manifests() else Path(__file__).resolve().parents[1]/'golden'      # a root without lists: those of the repository


@pytest.mark.parametrize('name', manifests(LISTS))
def test_manifest(name):
    system = Path(name).parts[0]
    assert system in MANIFESTS, f'{LISTS/name} is tested by nobody'
    MANIFESTS[system](Path(name).name, json.loads((LISTS/name).read_text()))


@pytest.mark.parametrize('name', parity_vlc_training.group_lists(parity_vlc_training.LISTS))
def test_group_list(name): parity_vlc_training.check_group_list(name)

"How SIMLA's fixtures are built from their own config.json."
import ast
import random
import re
import torch
import parity_simla_grounding as grounding
from vl_tutor.data.augment import SIMLA_OPERATIONS
from vl_tutor.data.boxes import iou_inclusive
from vl_tutor.data.transforms import EVALUATE
from vl_tutor.primitives.masking import block_mask, simla_mask_words
from vl_tutor.primitives.texts import simla_answers, simla_caption, simla_ids, simla_question
from vl_tutor.training.schedules import simla_table
from parity_golden import checker
from parity_words import bert

GIVEN = ['wm_ids', 'wm_select', 'wm_replace', 'wm_random', 'wm_words', 'iou_a', 'iou_b', 'pixels_uint8', 'aug_input']
CLEAN = dict(caption=simla_caption, question=simla_question)


def atol(fixture: str):
    "Whole numbers and pictures of bytes exactly, rates to 1e-12"
    if fixture == 'gradcam_grounding': return grounding.atol
    def allowed(name: str) -> float:
        if fixture != 'data_rules': return 1e-5
        if name.startswith(('out.tok_', 'out.block_', 'out.wm_', 'out.aug/')): return 0.
        return 1e-6 if name == 'out.eval_transformed' else 1e-12
    return allowed


def rtol(fixture: str): return grounding.rtol if fixture == 'gradcam_grounding' else lambda name: 0.


def texts(config: dict, notes: dict) -> dict:
    "Cleaning, compared at once, and the ids of captions and answers"
    for case in config['text cleaning cases']:
        for name in case.keys() - {'raw'}:
            kind, most = re.fullmatch(r'(\w+)_max(\d+)', name).groups()
            assert CLEAN[kind](case['raw'], int(most)) == case[name], f'{name} of {case["raw"]!r}'
    tokenizer, said = bert(config['vocabulary (id = line number)']), config['tokenised strings']
    cut = {k: int(re.search(r'truncated (?:at|to) (\d+)', notes[f'tok_{k}_ids']).group(1)) for k in ('pretrain', 'eval')}
    found = dict(pretrain=simla_ids(tokenizer, said, cut['pretrain']), eval=simla_ids(tokenizer, said, cut['eval'], full=True),
                 answer=simla_answers(tokenizer, [a.removesuffix('[SEP]') for a in config['answer strings']]))
    return {f'out.tok_{k}_{part}': v for k, pair in found.items() for part, v in zip(('ids', 'mask'), pair)}


def masks(config: dict, notes: dict, io: dict) -> dict:
    "Blocks of patches with Python's dice, words with the given ones"
    out, tokenizer = {}, bert(config['vocabulary (id = line number)'])
    for name in (k for k in notes if k.startswith('block_mask')):
        seeds, rows, cols, target, smallest = re.search(r's = (\[[\d, ]*\]); grid (\d+)x(\d+), target (\d+) patches, block minimum (\d+)', notes[name]).groups()
        grid = [block_mask(int(rows), int(cols), int(target), smallest=int(smallest), dice=random.Random(s)) for s in ast.literal_eval(seeds)]
        out[f'out.{name}'] = torch.stack(grid)
    draws = dict(choose=io['in.wm_select'], hide=io['in.wm_replace'], swap=io['in.wm_random'], word=io['in.wm_words'])
    ids = io['in.wm_ids']
    seen, labels = simla_mask_words(tokenizer, ids, draws=draws)
    return out | {'out.wm_out_ids': seen, 'out.wm_out_labels': labels}


def rates(notes: dict) -> dict:
    "Warm-up in stairs and one rate per epoch, in double precision"
    out = {}
    for name in (k.removeprefix('lr_warmup/') for k in notes if k.startswith('lr_warmup/')):
        s = ast.literal_eval(re.search(r'settings (\{.*\})', notes[f'lr_warmup/{name}']).group(1))
        stairs, epochs = simla_table(s['lr'], low=s['warmup_lr'], floor=s['min_lr'], epochs=s['epochs'], stairs=s['warmup_epochs'])
        out |= {f'out.lr_warmup/{name}': torch.tensor(stairs, dtype=torch.float64), f'out.lr_epoch/{name}': torch.tensor(epochs, dtype=torch.float64)}
    return out


def pictures(notes: dict, io: dict) -> dict:
    "The square of the test, and every operation of the augmentation at the arguments that are stored"
    out = {'out.eval_transformed': EVALUATE['simla'](io['in.pixels_uint8'].numpy(), io['out.eval_transformed'].shape[-1])}
    for name in (k.removeprefix('aug/') for k in notes if k.startswith('aug/')):
        value, *fill = ast.literal_eval(re.search(r'arguments (\[.*\])', notes[f'aug/{name}']).group(1)) or [0]
        assert fill in ([], [[128]*3]), f'{name} fills with {fill}'
        out[f'out.aug/{name}'] = torch.from_numpy(SIMLA_OPERATIONS[name][0](io['in.aug_input'].numpy(), value))
    return out


@checker('simla/data_rules', given=GIVEN)
def data_rules(config, weights, io):
    notes = config['notes']
    assert config['augmentation']['ops'] == list(SIMLA_OPERATIONS)
    return {**texts(config, notes), **masks(config, notes, io), **rates(notes), **pictures(notes, io),
            'out.iou': iou_inclusive(io['in.iou_a'], io['in.iou_b'])}

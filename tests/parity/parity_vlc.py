"How VLC's data fixtures are built from their own config.json and arrow files."
import numpy as np
import torch
from PIL import Image
from vl_tutor.data.answers import normalise_answer, score_of
from vl_tutor.data.augment import OPERATIONS, operate, strength
from vl_tutor.data.tables import open_table, open_tables, published_batch, retrieval_order, table_answers
from vl_tutor.data.transforms import cut, normalised, squeezed
from parity_golden import ROOT, checker
from parity_words import bert

SPLITS = dict(train='train', val='valid', test='test')
NAMES = dict(coco='coco', vqa='vqav2', nlvr2='nlvr2', f30k='f30k')


def order(records: list[dict], texts: list[str]) -> list[int]:
    "Our items in the fixture's order: within a picture the authors' python set shuffles the captions"
    left, found = list(range(len(records))), []
    for text in texts:
        row = records[left[0]]['row']
        found.append(next(i for i in left if records[i]['row'] == row and text == next(records[i][k] for k in ('caption', 'question', 'text') if k in records[i])))
        left.remove(found[-1])
    return found


def check_items(name: str, data, said: dict) -> list[int]:
    "Everything in `expected` of one split; how its items lie in ours"
    records = [data.records[i] for i in range(len(data))]
    assert len(data) == said['length']
    rows = order(records, said['text'])
    ordered = [records[i] for i in rows]
    got = dict(qid=[r.get('question_id') for r in ordered], vqa_answer=[r.get('answers') for r in ordered], vqa_labels=[r.get('labels') for r in ordered],
               vqa_scores=[r.get('scores') for r in ordered], table_name=[r.get('table') for r in ordered], answers=[bool(r.get('label')) for r in ordered],
               index_mapper=[list(data.records.place(i)) for i in range(len(data))], img_index=[r['row'] for r in records], cap_index=[r['which'] for r in records],
               replica=[r['which'] > 0 for r in records], arrow_files=[f.stem for f in data.records.files], length=len(data), text=said['text'])
    got['iid'] = retrieval_order(data)['iid'] if name == 'coco' and said.get('iid') is not None else None
    if name in ('vqa', 'nlvr2'): assert rows == list(range(len(data))), 'questions are never reordered'
    assert not set(said) - set(got), f'nobody checks {sorted(set(said) - set(got))}'
    for key, value in said.items(): assert got[key] == value, f'{name}: {key}\n{got[key]}\n{value}'
    return rows


def check_schemas(folder, schemas: dict):
    "The columns and types of every file, and how many rows"
    for file in sorted(folder.glob('*.arrow')):
        table, said = open_table(file), schemas[file.name]
        assert table.num_rows == said['rows'] and {f.name: str(f.type).replace('element', 'item') for f in table.schema} == said['columns'], file.name


def check_answers(said: dict):
    for text, normal in said['normalize_word'].items(): assert normalise_answer(text) == normal, f'{text!r} becomes {normalise_answer(text)!r}, not {normal!r}'
    assert [score_of(n) for n in range(len(said['score_by_count']))] == said['score_by_count']


@checker('vlc/data_pipeline')
def data_pipeline(config, weights, io):
    folder, c, out, expected = ROOT/'vlc'/'data_pipeline'/'arrow', config['config'], {}, config['expected']
    check_schemas(folder, config['arrow_schema'])
    check_answers(config['answer_words'])
    tokenizer, size = bert(config['vocabulary']), c['image_size']
    picture = lambda image: normalised(squeezed(image, size))
    for name, splits in expected.items():
        for split, said in splits.items():
            if split not in SPLITS: continue
            data = open_tables(folder, NAMES[name], SPLITS[split], picture=picture)
            rows = check_items(name, data, said)
            stored = {k.rpartition('/')[2]: k for k in io if k.startswith(f'out.{name}_{split}/')}
            if stored: out |= {stored[k]: v for k, v in views(published_batch(data.batch(rows), tokenizer, length=c['max_text_len']), stored).items()}
    vqa = expected['vqa']
    labels = table_answers(*(open_tables(folder, 'vqav2', s) for s in ('train', 'valid')))
    assert labels == vqa['answer2id'] and {str(v): k for k, v in labels.items()} == vqa['id2answer'] and len(labels) == vqa['num_class']
    return out | augmented(config, io)


def views(batch: dict, stored) -> dict:
    "The tensors of a batch, or those rows of them that the fixture keeps: `image_every_2nd`, `image_first2`, `image_0_rows0and2`"
    out = {}
    for name in stored:
        if name in batch: out[name] = batch[name]; continue
        key, _, which = name.rpartition('_') if not name.endswith('2nd') else (name.removesuffix('_every_2nd'), '', 'every2')
        whole = batch[key][0]
        if which.startswith('every'): out[name] = whole[::2]
        elif which.startswith('first'): out[name] = whole[:int(which[5:])]
        else: out[name] = whole[[int(n) for n in which.removeprefix('rows').split('and')]]
    return out


def augmented(config, io) -> dict:
    "The training crop with its boxes given, and each operation of RandAugment at the magnitude of the recipe"
    image, size, said = Image.fromarray(io['in.aug_image_uint8'].numpy()), config['config']['image_size'], config['randaug']
    crops = [normalised(cut(image, tuple(box), size, flip=bool(flip))) for *box, flip in io['in.crop_ijhw_flip'].tolist()]
    assert [[name, *OPERATIONS[name][1:3]] for name in OPERATIONS] == said['randaug_ops_in_order']
    out = {'out.mae_train_transform': torch.stack(crops)}
    for name, sign, value in said['values_at_m9']:
        assert strength(name, 9) == value, f'{name}: {strength(name, 9)}, not {value}'
        out[f'out.randaug_m9/{name}_{sign}'] = torch.from_numpy(np.array(operate(image, name, value if sign == 'pos' else -value)))
    return out

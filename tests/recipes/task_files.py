"Small data sets in the layouts that were published: every picture is one colour, and every text asks for that colour."
import csv
import json
from PIL import Image

COLOURS = dict(red=(220, 20, 20), green=(20, 160, 40), blue=(30, 60, 220))
NAMES = list(COLOURS)


def paint(path, colour, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, COLOURS[colour]).save(path)


def vqav2(folder, n=12):
    "train2014 and val2014 with ten annotators each; the last question of train has no answer that anybody else gave"
    for part, count in (('train2014', n), ('val2014', n)):
        questions, notes = [], []
        for i in range(count):
            colour, image_id = NAMES[i % 3], i + (1000 if part == 'val2014' else 0)
            paint(folder/part/f'COCO_{part}_{image_id:012d}.jpg', colour)
            rare = part == 'train2014' and i == count - 1
            said = [f'odd {k}' for k in range(10)] if rare else [colour]*7 + [NAMES[(i + 1) % 3]]*3
            questions.append(dict(question_id=image_id*10, image_id=image_id, question='What colour is it?'))
            notes.append(dict(question_id=image_id*10, image_id=image_id, multiple_choice_answer=said[0], answer_type='other',
                              answers=[dict(answer=a, answer_id=k + 1, answer_confidence='yes') for k, a in enumerate(said)]))
        (folder/f'v2_OpenEnded_mscoco_{part}_questions.json').write_text(json.dumps(dict(questions=questions)))
        (folder/f'v2_mscoco_{part}_annotations.json').write_text(json.dumps(dict(annotations=notes)))
    asked = [dict(question_id=7000 + i, image_id=2000 + i, question='What colour is it?') for i in range(4)]
    for i in range(4): paint(folder/'test2015'/f'COCO_test2015_{2000 + i:012d}.jpg', NAMES[i % 3])
    (folder/'v2_OpenEnded_mscoco_test2015_questions.json').write_text(json.dumps(dict(questions=asked)))
    return folder


def nlvr2(folder, n=12):
    "Two pictures each: are they of one colour?"
    for part, tag in (('train', 'train'), ('dev', 'dev'), ('test1', 'test1')):
        rows = []
        for i in range(n):
            left, right = NAMES[i % 3], NAMES[(i + i % 2) % 3]
            for k, colour in enumerate((left, right)): paint(folder/'images'/part/f'{tag}-{i}-0-img{k}.png', colour)
            rows.append(dict(identifier=f'{tag}-{i}-0-0', sentence='Both are of one colour.', label=str(left == right)))
        (folder/f'{part}.json').write_text('\n'.join(map(json.dumps, rows)))
    return folder


def karpathy(folder, n=12, name='coco'):
    "Five captions a picture, 'restval' among the splits"
    images = []
    for split, count in (('train', n), ('restval', 3), ('val', 3), ('test', 6)):
        for i in range(count):
            colour, number = NAMES[i % 3], len(images)
            paint(folder/'val2014'/f'COCO_val2014_{number:012d}.jpg', colour)
            said = [f'{word} {colour} square number {number} .' for word in ('a', 'one', 'the', 'this', 'some')]
            images.append(dict(filename=f'COCO_val2014_{number:012d}.jpg', filepath='val2014', split=split, cocoid=number,
                               sentences=[dict(raw=s) for s in said]))
    (folder/f'dataset_{name}.json').write_text(json.dumps(dict(images=images)))
    return folder


def flickr30k(folder, n=10):
    "The token file and lists of pictures"
    lines, lists = [], dict(train=n, val=3, test=6)
    number = 0
    for split, count in lists.items():
        names = []
        for i in range(count):
            colour, name = NAMES[i % 3], f'{1000 + number}.jpg'
            paint(folder/'flickr30k-images'/name, colour)
            lines += [f'{name}#{k}\t{word} {colour} square , picture {number} .' for k, word in enumerate(('a', 'one', 'the', 'this', 'some'))]
            names.append(name.removesuffix('.jpg'))
            number += 1
        (folder/f'{split}.txt').write_text('\n'.join(names))
    (folder/'results_20130124.token').write_text('\n'.join(lines))
    return folder


def imagenet(folder, n=6):
    "A folder for each class"
    for part, count in (('train', n), ('val', 3)):
        for colour in NAMES:
            for i in range(count): paint(folder/part/colour/f'{colour}_{i}.JPEG', colour)
    return folder


def own_csv(folder, n=30):
    "A list of pictures and captions, as people have it"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'captions.csv', 'w', newline='', encoding='utf-8') as file:
        rows = csv.writer(file)
        rows.writerow(['file', 'caption'])
        for i in range(n):
            paint(folder/f'{i:03}.png', NAMES[i % 3])
            rows.writerow([f'{i:03}.png', f'a {NAMES[i % 3]} square number {i}'])
    return folder

"SIMLA's grounding, from official weights to accuracies: a throw-away SIMLA of our primitives, explained by its layout alone."
import re
import torch, torch.nn.functional as F
from torch import nn
from vl_tutor.data.boxes import iou_inclusive
from vl_tutor.explain.gradcam import accuracy_by_split, ground, itc_gradcam, itm_gradcam, upsampled
from vl_tutor.explain.one_call import explain
from vl_tutor.models.backbones import both
from vl_tutor.primitives.attention import Attention
from vl_tutor.primitives.layout import Case, Layout, Look, Span
from vl_tutor.primitives.patches import PatchEmbed
from vl_tutor.primitives.transformer import FeedForward, Transformer
from vl_tutor.training.checkpoints import KeyMap
from parity_golden import checker, fill

SPLITS = ('val', 'testA', 'testB')
GIVEN = ['image', 'input_ids', 'attention_mask', 'image_wh', 'proposals', 'gt_boxes', 'split']


class SharedLayer(nn.Module):
    "Words among themselves, words over the picture unless that is skipped, each word alone; norms after"
    def __init__(self, dim, heads, hidden, eps):
        super().__init__()
        self.own, self.cross, self.mlp = Attention(dim, heads), Attention(dim, heads, dim_context=dim), FeedForward(dim, hidden)
        self.norm_own, self.norm_cross, self.norm_mlp = (nn.LayerNorm(dim, eps) for _ in range(3))

    def forward(self, x, keep, seen=None):
        x = self.norm_own(x + self.own(x, keep=keep))
        if seen is not None: x = self.norm_cross(x + self.cross(x, seen))
        return self.norm_mlp(x + self.mlp(x))


class TinySimla(nn.Module):
    "Sizes are read off the official tensors; heads and norms come from the configuration"
    def __init__(self, shapes: dict, c: dict):
        super().__init__()
        d, _, patch, _ = shapes['visual_encoder.patch_embed.proj.weight']
        layers, blocks = (len({m[1] for k in shapes if (m := re.match(p, k))}) for p in (r'text_encoder\.encoder\.layer\.(\d+)', r'visual_encoder\.blocks\.(\d+)'))
        heads, hidden = c['attention heads (vision and text)'], shapes['visual_encoder.blocks.0.mlp.fc1.weight'][0]
        self.patches, self.cls = PatchEmbed(c['image side'], patch, d), nn.Parameter(torch.zeros(1, 1, d))
        self.places = nn.Parameter(torch.zeros(shapes['visual_encoder.pos_embed']))
        self.vision, self.norm_vision = Transformer(blocks, d, heads, hidden=hidden, eps=c['layer-norm eps vision']), nn.LayerNorm(d, c['layer-norm eps vision'])
        self.words, self.word_places = (nn.Embedding(*shapes[f'text_encoder.embeddings.{k}_embeddings.weight']) for k in ('word', 'position'))
        eps, inner = c['layer-norm eps text'], shapes['text_encoder.encoder.layer.0.intermediate.dense.weight'][0]
        self.norm_words, self.layers = nn.LayerNorm(d, eps), nn.ModuleList(SharedLayer(d, heads, inner, eps) for _ in range(layers))
        self.itm, (e, _) = nn.Linear(d, 2), shapes['text_proj.weight']
        self.image_feature, self.text_feature, self.temp = nn.Linear(d, e), nn.Linear(d, e), nn.Parameter(torch.zeros(()))

    def see(self, images):
        x = torch.cat([self.cls.expand(len(images), -1, -1), self.patches(images)], 1) + self.places
        return self.norm_vision(self.vision(x))

    def read(self, ids, keep, seen=None):
        x = self.norm_words(self.words(ids) + self.word_places.weight[:ids.shape[1]])
        for layer in self.layers: x = layer(x, keep, seen)
        return x

    def match(self, images, ids, keep): return self.itm(self.read(ids, keep, self.see(images))[:, 0])

    def similar(self, images, ids, keep):
        unit = lambda x: F.normalize(x[:, 0], dim=-1)
        image, text = unit(self.image_feature(self.see(images)[:, :1])), unit(self.text_feature(self.read(ids, keep)[:, :1]))
        return (image*text).sum(-1)/self.temp

    def layout(self, words, fused=True):
        cut = self.patches
        media, looks = [Span('cls', 0, 1), Span('image', 1, 1 + cut.n_patches, cut.grid)], []
        for i in range(len(self.vision.blocks)): looks.append(Look(f'vision.blocks.{i}.attn', 'media', ('media',), f'vision.blocks.{i}.norm1'))
        for i in range(len(self.layers)):
            looks.append(Look(f'layers.{i}.own', 'text', ('text',)))
            if fused: looks.append(Look(f'layers.{i}.cross', 'text', ('media',), f'layers.{i}.norm_own'))
        return Layout(dict(media=media, text=[Span('text', 0, words)]), looks)

    def case(self, images, texts, target, score=None):
        ids, keep = texts
        run = dict(match=lambda: self.match(images, ids, keep)[:, 1], similar=lambda: self.similar(images, ids, keep))[target]
        rows, start = list(range(len(ids))), dict(text=0) if target == 'match' else dict(media=0)
        return Case(self, self.layout(ids.shape[1], target == 'match'), run, [f'row {i}' for i in rows], [start]*len(rows), rows, len(rows))


def rules() -> list[tuple]:
    t, v = 'text_encoder.encoder.layer.{i}.', 'visual_encoder.'
    at = [f'{t}attention.self.{x}' for x in ('query', 'key', 'value')], [f'{t}crossattention.self.{x}' for x in ('query', 'key', 'value')]
    return [('temp', 'temp', ''), (v + 'cls_token', 'cls', ''), (v + 'pos_embed', 'places', ''),
            *both(v + 'patch_embed.proj', 'patches.proj'), *both(v + 'norm', 'norm_vision'),
            *[r for a, b in (('norm1', 'norm1'), ('norm2', 'norm2'), ('attn.qkv', 'attn.to_qkv'), ('attn.proj', 'attn.to_out'), ('mlp.fc1', 'mlp.up'), ('mlp.fc2', 'mlp.down'))
              for r in both(v + 'blocks.{i}.' + a, 'vision.blocks.{i}.' + b)],
            *[(f'text_encoder.embeddings.{a}_embeddings.weight', b + '.weight', '') for a, b in (('word', 'words'), ('position', 'word_places'))],
            *both('text_encoder.embeddings.LayerNorm', 'norm_words'), *both(' + '.join(at[0]), 'layers.{i}.own.to_qkv', 'cat'),
            *both(at[1][0], 'layers.{i}.cross.to_q'), *both(' + '.join(at[1][1:]), 'layers.{i}.cross.to_kv', 'cat'),
            *[r for a, b in (('attention.output.dense', 'own.to_out'), ('attention.output.LayerNorm', 'norm_own'), ('crossattention.output.dense', 'cross.to_out'),
                             ('crossattention.output.LayerNorm', 'norm_cross'), ('intermediate.dense', 'mlp.up'), ('output.dense', 'mlp.down'), ('output.LayerNorm', 'norm_mlp'))
              for r in both(t + a, 'layers.{i}.' + b)],
            *both('itm_head', 'itm'), *both('vision_proj', 'image_feature'), *both('text_proj', 'text_feature')]


def load(config: dict, weights: dict) -> TinySimla:
    "The model of a fixture, strictly filled"
    model = TinySimla({k: tuple(v.shape) for k, v in weights.items()}, config['config'])
    return fill(model, KeyMap(rules(), drop=['text_encoder.embeddings.position_ids']), weights)


def named_layer(c: dict, start: str) -> int: return next(v for k, v in c.items() if k.startswith(start))


def look(ex, path: str) -> int: return next(i for i, l in enumerate(ex.looks) if l.path == path)


def both_maps(model, c: dict, images, ids, keep) -> tuple:
    "Maps of the matching score and of the similarity, and what the first was made of, in one batch"
    grid, layer, block = (c['map grid'],)*2, named_layer(c, 'cross-attention layer index'), named_layer(c, 'vision block index')
    match, similar = explain(model, images, (ids, keep), 'match'), explain(model, images, (ids, keep), 'similar')
    k, j = look(match, f'layers.{layer}.cross'), look(similar, f'vision.blocks.{block}.attn')
    made = match.weights[k].detach(), match.slope('weights', k)
    return itm_gradcam(*made, keep, grid), itc_gradcam(similar.weights[j].detach(), similar.slope('weights', j), grid), *made


@checker('simla/gradcam_grounding', given=GIVEN)
def gradcam_grounding(config, weights, io):
    c, model, size = config['config'], load(config, weights), len(io['out.last_batch_cross_attention'])
    ids, keep, images = io['in.input_ids'], io['in.attention_mask'].bool(), io['in.image']
    batches = [slice(i, i + size) for i in range(0, len(ids), size)]
    itm, itc, *_ = zip(*(found := [both_maps(model, c, images[b], ids[b], keep[b]) for b in batches]))
    with torch.no_grad(): logits = model.match(*(x[batches[-1]] for x in (images, ids, keep)))
    out = {'out.maps_itm': torch.cat(itm), 'out.maps_itc': torch.cat(itc), 'out.last_batch_cross_attention': found[-1][2],
           'out.last_batch_cross_attention_grad': found[-1][3], 'out.last_batch_itm_logits': logits}
    sizes, truth, splits = io['in.image_wh'].tolist(), io['in.gt_boxes'], [SPLITS[s] for s in io['in.split'].tolist()]
    for kind in ('itm', 'itc'):
        picked, boxes = ground(out[f'out.maps_{kind}'], io['in.proposals'], sizes, exponent=c['score exponent on area'], official=True)
        shares = accuracy_by_split(boxes, truth, splits)
        out |= {f'out.picked_{kind}': torch.tensor(picked), f'out.iou_{kind}': iou_inclusive(boxes, truth),
                f'out.accuracy_{kind}': torch.tensor([shares[s] for s in SPLITS], dtype=torch.float64)}
    width, height = sizes[0]
    return out | {'out.upsampled_first_map_itm': upsampled(out['out.maps_itm'][:1], height, width)[0]}


def atol(name: str) -> float:
    "Maps to 1e-7, activations and gradients to 1e-5, choices exactly"
    if name.startswith(('out.maps_', 'out.upsampled')): return 1e-7
    return 1e-5 if 'last_batch' in name else 0. if 'picked' in name else 1e-12


def rtol(name: str) -> float: return 1e-5 if name == 'out.maps_itc' else 0.      # ten times larger than the other maps

"How the fixtures of pictures alone, of stretched tables and of ViLT are built from their own config.json."
import torch
import torch.nn.functional as F
from vl_tutor.models.mae import MAE, ViTTrunk, drop_patches, pixel_loss
from vl_tutor.models.parity import trace
from vl_tutor.models.vilt import choose_patches, published_patches, see_ragged
from vl_tutor.models.vlc import VLC, VLCConfig
from vl_tutor.models.vlc_files import mae_keys, vlc_keys
from vl_tutor.primitives.patches import patchify, unpatchify
from vl_tutor.primitives.positions import resize_positions, sincos_2d
from vl_tutor.training.transport import word_patch_loss
from parity_golden import checker, fill


def sized(c: dict, **more) -> VLCConfig:
    "The configuration of a ViLT fixture"
    return VLCConfig(c['image_size'], c['patch_size'], c['hidden_size'], c['num_layers'], c['num_heads'], int(c['hidden_size']*c['mlp_ratio']),
                     c['vocab_size'], c['max_text_len'], decoder_layers=0, positions='learned', answers=c['labels'], **more)


def soft_targets(labels: torch.Tensor, scores: torch.Tensor, answers: int) -> torch.Tensor:
    "A row of scores over all answers; label -1 is an unused place"
    return torch.zeros(len(labels), answers + 1).scatter(1, labels.masked_fill(labels < 0, answers), scores)[:, :-1]


@checker('vlc/vilt')
@torch.no_grad()
def vilt(config, weights, io):
    c = config['config']
    given = {k.removeprefix('in.'): v for k, v in io.items() if k.startswith('in.')}
    model = fill(VLC(sized(c, tasks=('mlm', 'itm', 'vqa'))), vlc_keys(), weights)
    picks, ids, mask = [given[f'select_row{b}'] for b in range(len(given['image']))], given['text_ids'], given['text_masks']

    def see(images):
        "As published, the padding guessed from pixels"
        valid = published_patches(images, c['patch_size'])
        return see_ragged(model, images, valid, limit=c['max_image_len'], picks=picks), choose_patches(valid, c['max_image_len'], picks=picks)

    seen, cut = see(given['image'])
    with trace(model) as parts: read = model(seen, ids, mask)
    out = {'out.visual_embed': seen.tokens, 'out.image_masks': seen.keep.long(), 'out.patch_index': cut.places}
    out |= {f'out.block{i}': parts[f'trunk.encoder.blocks.{i}'] for i in range(c['num_layers'])}
    out |= {'out.text_feats': read.text, 'out.image_feats': read.image, 'out.cls_feats': read.pooled}
    words = model.head('mlm')(model(seen, given['text_ids_mlm'], mask).text)
    out |= {'out.mlm_logits': words, 'out.mlm_loss': F.cross_entropy(words.flatten(0, 1), given['text_labels_mlm'].flatten(), ignore_index=-100)}
    answers = model.head('vqa')(read.pooled)
    target = soft_targets(given['vqa_labels'], given['vqa_scores'], c['labels'])
    out |= {'out.vqa_logits': answers, 'out.vqa_loss': F.binary_cross_entropy_with_logits(answers, target)*c['labels']}
    return out | matching(model, given, see)


def matching(model, given: dict, see) -> dict:
    "Half of the pictures exchanged, the shuffle of the labels given; then matching and transport"
    b = len(given['image'])
    matched = (torch.arange(b) < b//2).float()[given['itm_perm']]
    seen, _ = see(torch.where(matched[:, None, None, None] == 1, given['image'], given['false_image_0']))
    read = model(seen, given['text_ids'], given['text_masks'])
    logits = model.head('itm')(read.pooled)
    moved = word_patch_loss(read.text, read.image, given['text_masks'], matched, image_keep=seen.keep)
    return {'out.itm_labels': matched, 'out.itm_logits': logits, 'out.itm_loss': F.cross_entropy(logits, matched.long()), 'out.itm_wpa_loss': moved}


@checker('vlc/mae')
@torch.no_grad()
def mae(config, weights, io):
    c, images, noise = config['config'], io['in.image'], io['in.noise']
    trunk = ViTTrunk(image_size=c['image_size'], patch_size=c['patch_size'], width=c['hidden_size'], layers=c['num_layers'], heads=c['num_heads'],
                     hidden=int(c['hidden_size']*c['mlp_ratio']))
    model = fill(MAE(trunk, dim=c['dec_dim'], layers=c['dec_depth'], heads=c['dec_heads'], hidden=int(c['dec_dim']*c['mlp_ratio'])), mae_keys(), weights)
    got, patch = model(images, noise=noise, ratio=c['mask_ratio']), c['patch_size']
    losses = {f'out.loss_norm_pix_{normal}': pixel_loss(got['pixels'], images, got['mask'], patch=patch, normalise=normal) for normal in (False, True)}
    return losses | {'out.latent': got['latent'], 'out.pred': got['pixels'], 'out.mask': got['mask'], 'out.ids_restore': got['restore'],
                     'out.ids_keep': drop_patches(noise, c['mask_ratio']).ids, 'out.patchify': patchify(images, patch), 'out.unpatchify_pred': unpatchify(got['pixels'], patch)}


@checker('vlc/pos_embed')
def pos_embed(config, weights, io):
    c, out = config['config'], {}
    for old, new, width, decoder_width in c['cases']:
        case = f'case_{old}to{new}'
        for name, d in (('pos_embed', width), ('decoder_pos_embed', decoder_width)):
            table = weights[f'{case}/{name}']
            assert table.shape == (1, 1 + old*old, d)
            out[f'out.{case}/{name}_interpolated'] = resize_positions(table, (old, old), (new, new))
    for d, grid in c['sincos']: out[f'out.sincos_dim{d}_grid{grid}'] = sincos_2d(grid, grid, d, extra=1)[None]
    for d, grid, rows in c['sincos_rows']: out[f'out.sincos_dim{d}_grid{grid}_rows'] = sincos_2d(grid, grid, d, extra=1)[None, rows]
    return out

"How Uni-Perceiver's fixtures are built from their own config.json."
from importlib.util import find_spec
from pathlib import Path
import re
import torch
from vl_tutor.data.transforms import HALF, frames_short_side, middle, normalised, short_side, uni_video
from vl_tutor.data.videos import evaluation_frames, training_frames
from vl_tutor.primitives.masking import uni_mask_words
from vl_tutor.primitives.modalities import Modalities, attribute_bits, caption_places, resize_time
from vl_tutor.primitives.positions import resize_positions, sincos_2d
from vl_tutor.primitives.texts import ClipPairs, caption_batch, cut_ids, read_merges, retrieval_batch, slot_prompt
from vl_tutor.training.checkpoints import KeyMap
from parity_golden import checker


def atol(fixture: str): return lambda name: 0. if name.endswith(('lengths', 'mask')) else 1e-6 if fixture == 'preprocess' else 2e-5


def rtol(fixture: str): return lambda name: 0.


# ---- tokenisers ----

RULES = [('token_embed.embeddings.weight', 'text.word.weight'), ('token_embed.embeddings_pos.position_embeddings.weight', 'text.place.weight'),
         ('token_embed.embeddings_token_type.weight', 'text.kind.weight'), ('video_embed.embeddings.{p}', 'frames.patches.proj.{p}'),
         ('video_embed.embeddings_st_pos.spatial_pos_embed.weight', 'frames.place'),
         ('video_embed.embeddings_st_pos.temporal_pos_embed.weight', 'frames.time.weight'), ('video_embed.embeddings_type.weight', 'frames.kind.weight')]


def senses(config: dict, weights: dict, **options) -> Modalities:
    "Both tokenisers with official weights; the norm, stored once per tokeniser, is one and the same"
    c = config['tiny_config']
    model = Modalities(c['vocab'], c['width'], image_size=c['image'], patch=c['patch'], places=c['max_text_pos'], frames=c['max_frames'], **options)
    parts = {k: v for k, v in weights.items() if k.startswith(('token_embed.', 'video_embed.'))}
    norm = {p: parts.pop(f'token_embed.embeddings_norm.{p}') for p in ('weight', 'bias')}
    for p, v in norm.items(): assert torch.equal(parts.pop(f'video_embed.embeddings_norm.{p}', v), v)
    rules = [r for a, b in RULES for r in ([(a.format(p=p), b.format(p=p)) for p in ('weight', 'bias')] if '{p}' in a else [(a, b)])]
    ours = model.state_dict()
    found = KeyMap(rules).to_ours(parts, {k: v for k, v in ours.items() if 'norm.' not in k})
    model.load_state_dict(found | {k: norm[k.rpartition('.')[2]] for k in ours if 'norm.' in k})
    return model.eval()


def number(pattern: str, text: str) -> int: return int(re.search(pattern, text).group(1))


@checker('uni_perceiver/tokenizers')
@torch.no_grad()
def tokenizers(config, weights, io):
    notes, model, ids = config['notes'], senses(config, weights), io['in.text_ids']
    says, out = lambda name: notes[name]['meaning'], {}
    text, frames, image, video = model.text, model.frames, io['in.image'], io['in.video']
    step = number(r'scalar position (\d+)', says('out.step_text'))
    out |= {'out.text': text(ids), 'out.text_plain': text(ids, plain=True), 'out.caption_text': text(io['in.caption_ids'], caption_places(io['in.caption_ids'].shape[1])),
            'out.step_text': text(io['in.step_ids'], torch.tensor([step])), 'out.image': frames(image), 'out.video': frames(video)}
    for kind, clip in dict(image=image, video=video).items():
        out[f'out.{kind}_train_offset'] = frames(clip, offset=number(r'pinned to (\d+)', says(f'out.{kind}_train_offset')))
    newer = senses(config, weights, marker_word=config['special_tokens']['word_spe_used_when_old_checkpoint_is_false'])
    after, typed = senses(config, weights, place_first=False), senses(config, weights, typed=True)
    line = model(image, ids, keep=io['in.text_invalid_mask'] == 0)
    out |= {'out.spe_old': model.marker(), 'out.spe_new': newer.marker(), 'out.text_pos_after': after.text(ids), 'out.image_pos_after': after.frames(image),
            'out.image_with_type': typed.frames(image), 'out.fused_sequence': line.tokens, 'out.fused_invalid_mask': ~line.keep,
            'out.fused_lengths': torch.tensor(line.lengths), 'out.fused_cum_lengths': torch.tensor(line.ends)}
    return out | tables(io, frames)


def tables(io: dict, frames) -> dict:
    "Counted and stretched tables of positions, to the sizes that are stored"
    grid, out = frames.patches.grid, {}
    for name in (k for k in io if k.startswith('out.sincos_scale_')):
        top, _, low = name.removeprefix('out.sincos_scale_').partition('_over_')
        out[name] = sincos_2d(*grid, frames.place.shape[1], first='row', scale=int(top)/int(low or 1))
    side = round(len(io['out.resized_spatial'])**.5)
    return out | {'out.resized_spatial': resize_positions(frames.place, grid, (side, side), extra=0, mode='bilinear'),
                  'out.resized_temporal': resize_time(frames.time.weight, len(io['out.resized_temporal']))}


# ---- pictures, texts, frames, batches ----

def clip_pairs() -> ClipPairs:
    "CLIP's merges lie in a package of the tests"
    return ClipPairs(read_merges(Path(find_spec('open_clip').origin).parent/'bpe_simple_vocab_16e6.txt.gz'))


def words(extra: dict, pairs: ClipPairs):
    "Byte pairs and back, the cut, the word game"
    assert pairs.vocab_size == extra['bpe_vocab_size']
    assert {m: pairs.ids[m] for m in extra['bpe_special_ids']} == extra['bpe_special_ids']
    for case in extra['bpe']:
        assert pairs.words(case['text']) == case['words'], case['text']
        assert pairs.pieces(case['text']) == case['ids'], case['text']
    for case in extra['bpe_decode']: assert pairs.spelled(case['ids']) == case['text']
    for case in extra['caption_truncation']: assert cut_ids(case['ids'], case['max_len']) == case['kept'], case['max_len']
    game = extra['mlm_whole_word_masking']
    found = uni_mask_words(pairs, game['words'], dice=game['uniform_draw_per_word'], swaps=game['replacement_ids_in_call_order'])
    assert found == (game['ids'], game['labels'])


def prompts(extra: dict, pairs: ClipPairs):
    "GLUE and VQA with their slot"
    for case in extra['glue_prompts']: assert slot_prompt(pairs, case['task'], case['sentences']) == (case['ids'], case['spe_index']), case['task']
    for name, template in dict(vqa_question='VQA', vqa_question_two_eot='VQA two ends').items():
        case = extra[name]
        room = case['max_len'] + (template == 'VQA two ends')              # the question has max_len − 2 pieces in both
        assert slot_prompt(pairs, template, [case['question']], room) == (case['ids'], case['spe_index']), name


def frames(extra: dict):
    "Which frames are taken"
    for c in extra['video_eval_indices']:
        options = dict(frames=c['frames'], stride=c['stride'], clips=c['clips'], target_fps=c['target_fps'])
        assert evaluation_frames(c['total_frames'], c['fps'], **options).tolist() == c['indices'], c
    for c in extra['video_train_indices']:
        assert training_frames(c['total_frames'], c['rate'], frames=c['frames'], offset=c['offset_draw']).tolist() == c['indices'], c


def batches(extra: dict):
    "Attributes and collation"
    for name, stored in extra['moe_attribute_bits'].items():
        for side, rows in (stored if isinstance(stored, dict) else dict(target=stored)).items(): assert attribute_bits(name, side).tolist() == rows, (name, side)
    c = extra['collate_caption']
    found = caption_batch(c['captions'], c['query_id'])
    assert [found['text'].tolist(), (~found['keep']).int().tolist(), found['targets'].tolist()] == [c['text'], c['invalid_mask'], c['targets']]
    assert attribute_bits('image_caption').tolist() == c['moe_embedding']
    c = extra['collate_retrieval_eval']
    found = retrieval_batch(c['captions_per_image'])
    assert [found['text'].tolist(), (~found['keep']).int().tolist()] == [c['text'], c['invalid_mask']]


KNOWN = {'bpe', 'bpe_special_ids', 'bpe_vocab_size', 'bpe_decode', 'caption_truncation', 'mlm_whole_word_masking', 'glue_prompts', 'vqa_question', 'vqa_question_two_eot',
         'video_eval_indices', 'video_train_indices', 'moe_attribute_bits', 'moe_attribute_bit_meaning', 'collate_caption', 'collate_retrieval_eval'}


def pictures(io: dict) -> dict:
    "Pictures cut for captions and for ImageNet, clips in three squares and in the middle one"
    out = {}
    for name in (k.removeprefix('in.') for k in io if k.startswith('in.image')):
        pixels, side = io[f'in.{name}'].numpy(), io[f'out.{name}.clip_eval'].shape[-1]
        out[f'out.{name}.clip_eval'] = normalised(middle(short_side(pixels, side), side))
        out[f'out.{name}.imagenet_eval'] = normalised(middle(short_side(pixels, int(256/224*side)), side))
    clip, side = io['in.video'].permute(0, 3, 1, 2), io['out.video.center_crop'].shape[-1]                 # (t h w 3) → (t 3 h w)
    whole = frames_short_side(normalised(clip, HALF, HALF), side)
    top, left = (round((n - side)/2) for n in whole.shape[-2:])
    return out | {'out.video.three_crops': uni_video(clip, side), 'out.video.center_crop': whole[..., top:top + side, left:left + side]}


@checker('uni_perceiver/preprocess')
def preprocess(config, weights, io):
    extra, pairs = config['extra'], clip_pairs()
    assert set(extra) <= KNOWN, f'compared by nobody: {set(extra) - KNOWN}'
    words(extra, pairs)
    prompts(extra, pairs)
    frames(extra)
    batches(extra)
    return pictures(io)

"Our two towers against transformers' own classes: random weights, whole tensors; caches, padding, wrong folders."
import json
import pytest
import torch
from tensors import near, shake
from vl_tutor.models.backbones import GPT2, GPTConfig, ViT, ViTConfig, model_folder, published_gpt
from vl_tutor.models.parity import trace
from vl_tutor.primitives.notation import expect_fail


VISION = [dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8),
          dict(hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=6, hidden_act='gelu')]


@pytest.mark.parametrize('sizes', VISION)
@pytest.mark.parametrize('whole', [False, True], ids=['tower', 'whole CLIP'])
def test_vit_is_clips_vision_tower(sizes, whole, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel
    torch.manual_seed(0)
    config = CLIPVisionConfig(**sizes)
    text = CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    theirs = shake(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=config.to_dict())) if whole else CLIPVisionModel(config))
    theirs.save_pretrained(tmp_path)
    ours, images = ViT.from_pretrained(tmp_path), torch.randn(2, 3, sizes['image_size'], sizes['image_size'])
    with torch.no_grad(): want = (theirs.vision_model if whole else theirs)(images, output_hidden_states=True)
    with torch.no_grad(), trace(ours) as parts: got = ours(images)
    near(parts['norm_in'], want.hidden_states[0])
    for i in range(sizes['num_hidden_layers']): near(parts[f'encoder.blocks.{i}'], want.hidden_states[i + 1])
    near(got, want.last_hidden_state)
    near(ours.pooled(images), want.pooler_output)


TEXT = [dict(vocab_size=61, n_positions=32, n_embd=24, n_layer=3, n_head=4), dict(vocab_size=40, n_positions=20, n_embd=16, n_layer=2, n_head=2, n_inner=24, activation_function='relu')]


def gpt(sizes, folder):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = shake(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)))
    theirs.save_pretrained(folder)
    return theirs, GPT2.from_pretrained(folder)


@pytest.mark.parametrize('sizes', TEXT)
@torch.no_grad()
def test_gpt2_is_gpt2(sizes, tmp_path):
    theirs, ours = gpt(sizes, tmp_path)
    ids = torch.randint(sizes['vocab_size'], (3, 9))
    want = theirs(ids, output_hidden_states=True)
    with trace(ours) as parts: got = ours(ids)
    for i in range(sizes['n_layer'] - 1): near(parts[f'decoder.blocks.{i}'], want.hidden_states[i + 1])   # the last one is normed there
    near(got, want.logits)
    near(ours(ours.words(ids)), want.logits)                                                        # word vectors instead of ids


@pytest.mark.parametrize('pads', [(0, 3), (2, 1), (4, 0)])
@torch.no_grad()
def test_left_padding_changes_nothing(pads, tmp_path):
    theirs, ours = gpt(TEXT[0], tmp_path)
    keep = torch.stack([torch.arange(8) >= n for n in pads])
    ids = torch.randint(61, (2, 8)).masked_fill(~keep, 0)
    want = theirs(ids, attention_mask=keep.long(), position_ids=(keep.long().cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    near(ours.step(ids, ours.new_cache(), keep), want)
    for row, n in zip(range(2), pads): near(ours.step(ids[row:row + 1, n:], ours.new_cache())[0], want[row])
    cache = ours.new_cache()
    ours.step(ids[:, :6], cache, keep[:, :6])                                # padding first, then words one by one
    ours.step(ids[:, 6:7], cache)
    near(ours.step(ids[:, 7:], cache), want)


@pytest.mark.parametrize('cuts', [(1,)*7, (3, 4), (6, 1)])
@torch.no_grad()
def test_a_cached_step_is_an_uncached_one(cuts, tmp_path):
    _, ours = gpt(TEXT[1], tmp_path)
    ids, cache, at = torch.randint(40, (2, 7)), ours.new_cache(), 0
    for n in cuts:
        at += n
        near(ours.step(ids[:, at - n:at], cache), ours(ids[:, :at])[:, -1])
        assert cache.length == at
    cache.reorder(torch.tensor([1, 1]))
    nxt = torch.tensor([[3], [4]])
    near(ours.step(nxt, cache), ours(torch.cat([ids[[1, 1]], nxt], 1))[:, -1])


@torch.no_grad()
def test_no_word_sees_the_future():
    torch.manual_seed(0)
    model = shake(GPT2(GPTConfig(30, 16, 16, 2, 2, 32)))
    ids = torch.randint(30, (1, 8))
    other = ids.clone()
    other[0, 5:] = (other[0, 5:] + 1) % 30
    assert torch.equal(model(ids)[:, :5], model(other)[:, :5])
    assert not torch.equal(model(ids)[:, 5:], model(other)[:, 5:])


def test_the_published_sizes_have_the_published_counts():
    with torch.device('meta'): eye, pen = ViT(ViTConfig()), GPT2(GPTConfig())
    assert sum(p.numel() for p in eye.parameters()) == 87_456_000
    assert sum(p.numel() for p in pen.parameters()) == 124_439_808


def test_wrong_folders_are_refused_in_one_sentence(tmp_path):
    theirs, _ = gpt(TEXT[0], tmp_path/'gpt')
    with expect_fail('not a CLIP'): ViT.from_pretrained(tmp_path/'gpt')
    with expect_fail('no config.json'): model_folder(tmp_path)
    with expect_fail('is no directory'): model_folder('nobody/no-such-model-here')
    from safetensors.torch import load_file, save_file
    weights = load_file(tmp_path/'gpt'/'model.safetensors')
    weights['transformer.h.0.surprise'] = weights.pop('transformer.ln_f.weight')
    save_file(weights, tmp_path/'gpt'/'model.safetensors', dict(format='pt'))
    with expect_fail('surprise'): GPT2.from_pretrained(tmp_path/'gpt')
    with expect_fail('ln_f.weight'): GPT2.from_pretrained(tmp_path/'gpt')
    (tmp_path/'gpt'/'config.json').write_text(json.dumps(dict(model_type='bert')))
    with expect_fail('not a GPT-2'): GPT2.from_pretrained(tmp_path/'gpt')


def test_wrong_use_is_refused():
    model = ViT(ViTConfig(16, 8, 8, 1, 1, 8))
    with expect_fail('(b, 3, 16, 16)'): model(torch.zeros(1, 3, 24, 24))
    with expect_fail('5 positions'): GPT2(GPTConfig(10, 4, 8, 1, 1, 8))(torch.zeros(1, 5, dtype=torch.long))
    with expect_fail('swoosh'): published_gpt(dict(vocab_size=4, n_positions=4, n_embd=4, n_layer=1, n_head=1, activation_function='swoosh'))

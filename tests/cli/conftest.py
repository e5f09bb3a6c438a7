"What the command line works on: an untrained captioner, two towers as transformers saves them, pictures good and bad"
import contextlib
import io
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope='session')
def run():
    "Run `vl-tutor` in this process: `.code`, `.out`, `.err`"
    from vl_tutor.demos.command_line import main
    def call(*args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as e: main([str(a) for a in args])
        code = e.value.code
        return SimpleNamespace(code=0 if code is None else code, out=out.getvalue(), err=err.getvalue())
    return call


@pytest.fixture(scope='session')
def model():
    from vl_tutor.models.captioner import SIZES, Captioner
    torch.manual_seed(0)
    return Captioner(SIZES['tiny']).eval()


@pytest.fixture(scope='session')
def weights(tmp_path_factory, model):
    "A folder of ours"
    from vl_tutor.training.checkpoints import save_model
    from vl_tutor.world.language import world_tokenizer
    folder = tmp_path_factory.mktemp('ours')/'captioner'
    save_model(model, folder, {})
    world_tokenizer().save(folder)
    return folder


@pytest.fixture(scope='session')
def vlc_weights(tmp_path_factory):
    "A folder of an untrained VLC"
    from dataclasses import replace
    from vl_tutor.models.vlc import VLC, init_vlc
    from vl_tutor.recipes.train_vlc import TINY
    from vl_tutor.training.checkpoints import save_model
    from vl_tutor.world.questions import ANSWERS
    from vl_tutor.world.tasks import task_tokenizer
    folder, words = tmp_path_factory.mktemp('ours')/'vlc', task_tokenizer()
    model = init_vlc(VLC(replace(TINY, vocab_size=words.vocab_size)), 0).eval()
    save_model(model, folder, dict(answers=list(ANSWERS)))
    words.save(folder)
    return folder


@pytest.fixture(scope='session')
def gallery(tmp_path_factory):
    "Six scenes in two folders, and a file with their captions"
    from vl_tutor.world.scenes import World
    folder, batch = tmp_path_factory.mktemp('gallery'), World('pair', 'test').batch(range(6))
    (folder/'more').mkdir()
    for i, pixels in enumerate(batch['image']):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder/('more' if i > 3 else '.')/f'{i}.png')
    (folder/'captions.txt').write_text('\n\n'.join(batch['caption']) + '\n', encoding='utf-8')
    return SimpleNamespace(folder=folder, files=[folder/('more' if i > 3 else '.')/f'{i}.png' for i in range(6)], captions=batch['caption'], texts=folder/'captions.txt')


def small_clip():
    from transformers import CLIPVisionConfig
    return CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)


@pytest.fixture(scope='session', params=['CLIPModel', 'CLIPVisionModel'])
def clip(request, tmp_path_factory):
    "A CLIP folder, whole or its vision tower alone"
    import transformers
    folder = tmp_path_factory.mktemp('clip')/request.param
    torch.manual_seed(1)
    if request.param == 'CLIPVisionModel': transformers.CLIPVisionModel(small_clip()).save_pretrained(folder)
    else:
        words = transformers.CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
        transformers.CLIPModel(transformers.CLIPConfig(text_config=words.to_dict(), vision_config=small_clip().to_dict(), projection_dim=16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def gpt2(tmp_path_factory):
    "A GPT-2 folder with a small tokeniser of its own kind"
    import transformers
    from vl_tutor.primitives.words import byte_pair_tokenizer
    folder = tmp_path_factory.mktemp('gpt2')/'gpt2'
    words = byte_pair_tokenizer(['r e', 're d', 'Ġ a'])
    torch.manual_seed(2)
    sizes = dict(vocab_size=words.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=words.bos_id, eos_token_id=words.eos_id)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)
    words.save(folder)
    return folder


@pytest.fixture(scope='session')
def released(tmp_path_factory, clip, gpt2):
    "A checkpoint as the authors save theirs, for exactly these towers"
    from dataclasses import replace
    from vl_tutor.models.captioner import Captioner, captioner_keys
    model = Captioner.from_towers(clip, gpt2)
    torch.manual_seed(3)
    for p in [*model.mapper.parameters(), *model.gated.parameters()]: torch.nn.init.normal_(p, std=.3)
    path = tmp_path_factory.mktemp('released')/'captioner.pth'
    torch.save(dict(model_state_dict=captioner_keys(replace(model.config, published=True)).to_official(model.state_dict())), path)
    return path


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    "One picture in every kind of file, name → path"
    from vl_tutor.world.scenes import World
    folder = tmp_path_factory.mktemp('pictures')
    rgb = Image.fromarray(World('pair', 'test')[3]['image'].permute(1, 2, 0).numpy()).resize((96, 96), 0)
    grey = rgb.convert('L')
    kinds = {'scene.png': rgb, 'scene.bmp': rgb, 'scene.webp': rgb, 'scene.jpg': rgb, 'grey.png': grey, 'palette.png': rgb.convert('P', palette=Image.Palette.ADAPTIVE),
             'cmyk.jpg': rgb.convert('CMYK'), 'alpha.png': rgb.convert('RGBA'), 'sixteen.png': Image.fromarray(np.array(grey).astype(np.uint16)*257), 'bit.png': rgb.convert('1')}
    for name, image in kinds.items(): image.save(folder/name, **({'lossless': True} if name.endswith('webp') else {}))
    return {name: folder/name for name in kinds}

#!/usr/bin/env python3
"""How far ahead of what one would use instead: every figure is peer/ours, so larger is better.

python benchmarks/run.py [P1 P3 …] [--pairs 9] [--threads 2]

Both sides run in one process and in alternation (peer, ours, peer, ours …) after a warm-up, and their outputs are asserted equal before
anything is timed. A row gives the median of the paired ratios and the least time of each side. The last line is one JSON object."""
import argparse, json, logging, math, os, platform, random, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
import torch
from transformers.utils.logging import disable_progress_bar
from vl_tutor.primitives.attention import attend, attend_ref
from vl_tutor.training import decoding, metrics, retrieval

disable_progress_bar()
BOS = 1


def race(peer, ours, pairs: int, clock=time.perf_counter) -> dict:
    "Time two functions in alternation"
    peer(), ours()
    times = []
    for _ in range(pairs):
        start = clock(); peer(); middle = clock(); ours(); end = clock()
        times.append((middle - start, end - middle))
    a, b = zip(*times)
    return dict(ratio=statistics.median(x/y for x, y in times), peer_ms=1e3*min(a), ours_ms=1e3*min(b))


def row(name: str, job: str, target: float, measured: dict) -> dict:
    "One line of the table"
    return dict(name=name, job=job, target=target, **{k: round(v, 4) for k, v in measured.items()})


# ---- decoding ----

def towers(width: int, layers: int, heads: int, vocab: int, image: int=32, patch: int=8):
    "A CLIP eye and a GPT-2 of transformers with random weights, and our captioner (prefix only) with the same ones"
    from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel
    from vl_tutor.models.captioner import Captioner, CaptionerConfig
    torch.manual_seed(0)
    eye = CLIPVisionModel(CLIPVisionConfig(hidden_size=width, intermediate_size=4*width, num_hidden_layers=layers, num_attention_heads=heads,
                                           image_size=image, patch_size=patch)).eval()
    pen = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=128, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=BOS,
                                     eos_token_id=None, initializer_range=.2)).eval()
    pen.generation_config.eos_token_id, pen.generation_config.pad_token_id = None, 0
    with tempfile.TemporaryDirectory() as folder:
        eye.save_pretrained(folder + '/eye'); pen.save_pretrained(folder + '/pen')
        ours = Captioner.from_towers(folder + '/eye', folder + '/pen', CaptionerConfig(mapper=None, resampler=None)).eval()
    return eye, pen, decoding.lay_out(ours)


@torch.no_grad()
def captions(name: str, sizes: dict, batch: int, words: int, targets: tuple, pairs: int) -> list[dict]:
    "From pictures to ids: transformers' generate behind a mean-pooled prefix against our captioner, greedy and with four beams"
    eye, pen, ours = towers(**sizes)
    pictures, rows = torch.randn(batch, 3, 32, 32), []
    start = pen.transformer.wte(torch.full((batch, 1), BOS))

    def peer(width):
        prefix = eye(pictures).last_hidden_state.mean(1, keepdim=True)
        embeds = torch.cat([prefix, start], 1)
        return pen.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), do_sample=False, num_beams=width, max_new_tokens=words)

    def mine(width):
        cache, how = ours.prompt(pictures[:, None]), dict(bos_id=BOS, max_len=words, batch=batch)
        return (decoding.greedy(ours.step, cache, **how) if width == 1 else decoding.beam(ours.step, cache, width=width, **how)).ids[:, 1:]

    for width, target in zip((1, 4), targets):
        assert torch.equal(peer(width), mine(width)), f'{name}: other ids with {width} beams'
        job = f'{"greedy" if width == 1 else "beam 4"}, d {sizes["width"]}, batch {batch}, {words} words, against generate'
        rows.append(row(name, job, target, race(lambda: peer(width), lambda: mine(width), pairs)))
    return rows


def p1(pairs): return captions('P1', dict(width=64, layers=2, heads=4, vocab=128), 4, 24, (3.5, 2.5), pairs)
def p2(pairs): return captions('P2', dict(width=768, layers=6, heads=12, vocab=50257), 1, 24, (1.05, 1.15), pairs)


class Anew:
    "What the authors' decoders keep of a captioner: the ids and what the picture gave; the rest is read again for every word"
    def __init__(self, model, prefix, tokens): self.model, self.prefix, self.tokens, self.ids = model, prefix, tokens, None

    def step(self, ids, cache):
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)
        lm = self.model.lm
        x = lm.embed(torch.cat([self.prefix, lm.words(self.ids)], 1))
        return lm.head(self.model.read(x, self.tokens))[:, -1]


@torch.no_grad()
def p3(pairs) -> list[dict]:
    "Greedy decoding of 48 words with caches against reading the whole sentence, and the picture's tokens, anew at every step"
    from vl_tutor.models.backbones import GPTConfig, ViTConfig
    from vl_tutor.models.captioner import Captioner, CaptionerConfig
    torch.manual_seed(0)
    model = Captioner(CaptionerConfig(ViTConfig(layers=0), GPTConfig(layers=6))).eval()
    decoding.lay_out(model)
    for block in model.gated.values(): block.gate_attn.fill_(.5); block.gate_mlp.fill_(.5)
    prefix, tokens = model.bridge(torch.randn(1, 1, 50, 768))
    how = dict(bos_id=BOS, max_len=48)

    def peer():
        anew = Anew(model, prefix, tokens)
        return decoding.greedy(anew.step, anew, **how).ids

    ours = lambda: decoding.greedy(model.step, model.new_cache(prefix, tokens), **how).ids
    assert torch.equal(peer(), ours()), 'P3: the cache changes the words'
    return [row('P3', 'captioner with caches against without, distilgpt2 size, 48 words', 6., race(peer, ours, pairs))]


# ---- reading pictures and words together ----

def single_streams(side: int):
    "transformers' ViltModel with random weights, 16-pixel patches and 40 words, and our VLC with the same ones"
    from transformers import ViltConfig, ViltModel
    from vl_tutor.models.vilt import load_vilt
    torch.manual_seed(0)
    theirs = ViltModel(ViltConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, vocab_size=500, image_size=side, patch_size=16)).eval()
    for name, layer in theirs.named_modules():                # the authors' in the trunk; transformers writes 1e-12 everywhere
        if isinstance(layer, torch.nn.LayerNorm) and 'text_embeddings' not in name: layer.eps = 1e-6
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_vilt(folder)


def p4(pairs) -> list[dict]:
    "One transformer over words and patches, forwards and a training step, against transformers' ViltModel with the same weights"
    rows = []
    for side, targets in ((224, (1.3, 1.15)), (384, (1.8, 1.8))):
        theirs, ours = single_streams(side)
        pictures, ids, aim = torch.randn(4, 3, side, side), torch.randint(1, 500, (4, 40)), torch.randn(4, 192)
        seen = dict(pixel_values=pictures, pixel_mask=torch.ones(4, side, side, dtype=torch.long), attention_mask=torch.ones_like(ids))
        peer, mine = lambda: theirs(ids, **seen), lambda: ours(ours.see(pictures), ids)
        steps = [torch.optim.AdamW(m.parameters(), 1e-6) for m in (theirs, ours)]

        def step(pooled, optimizer):
            (pooled() - aim).square().mean().backward()
            optimizer.step(); optimizer.zero_grad()

        quiet = torch.no_grad()
        want, got = quiet(peer)(), quiet(mine)()
        for a, b in ((want.pooler_output, got.pooled), (want.last_hidden_state[:, :40], got.text)): torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)
        sides = (('forward', quiet(peer), quiet(mine)),
                 ('train step', lambda: step(lambda: peer().pooler_output, steps[0]), lambda: step(lambda: mine().pooled, steps[1])))
        for (name, a, b), target in zip(sides, targets):
            rows.append(row('P4', f'{name}, d 192, 4 layers, 40 words and {(side//16)**2 + 1} picture tokens, against ViltModel', target, race(a, b, pairs)))
    return rows


# ---- the frame around it ----

def p10(pairs) -> list[dict]:
    "A fresh Python that imports torch against one that imports vl_tutor"
    fresh = lambda name: lambda: subprocess.run([sys.executable, '-c', f'import {name}'], check=True, cwd=Path(__file__).resolve().parents[1])
    return [row('P10', 'import vl_tutor in a fresh process against import torch', .87, race(fresh('torch'), fresh('vl_tutor'), pairs))]


def p14(pairs) -> list[dict]:
    "An epoch of the Learner, validation included, against the same loop written out; the weights stay equal to the last bit"
    from vl_tutor.training.learner import BatchLoader, Table, dict_loaders, make_learner, quiet_fit
    torch.manual_seed(0)
    net = lambda: torch.nn.Sequential(*[layer for _ in range(5) for layer in (torch.nn.Linear(1024, 1024), torch.nn.Tanh())])
    plain, watched = net(), net()
    watched.load_state_dict(plain.state_dict())
    data, valid = (Table(x=torch.randn(n, 1024), y=torch.randn(n, 1024)) for n in (6*400, 400))
    loss = lambda model, batch: dict(mse=(model(batch['x']) - batch['y']).square().mean())
    learn = make_learner(watched, dict_loaders(data, valid, bs=400, device='cpu'), loss, lr=1e-4, wd=.01, parts=['mse'])
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-4, betas=(.9, .98), eps=1e-8, weight_decay=.01)
    train, test = BatchLoader(data, 400, shuffle=True), BatchLoader(valid, 400)

    def peer():
        for batch in train:
            loss(plain, batch)['mse'].backward()
            optimizer.step(); optimizer.zero_grad()
        with torch.no_grad(): return [loss(plain, batch)['mse'].item() for batch in test]

    measured = race(peer, lambda: quiet_fit(learn, 1), pairs)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters())), 'P14: other weights'
    return [row('P14', f'an epoch of the Learner against a bare loop, {measured["peer_ms"]/6.33:.0f} ms a batch', .952, measured)]


# ---- memory ----

def kept(function) -> int:
    "Bytes that autograd stores for the backward pass of a call, each storage once"
    seen = {}
    def note(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor): out = function()
    return sum(seen.values()) if out is not None else 0


def p5(pairs) -> list[dict]:
    "Bytes kept for the backward pass: the spelled-out attention against the fused one"
    rows = []
    for tokens, target in ((197, 1.5), (577, 3.), (1024, 4.5)):
        q, k, v = torch.randn(3, 1, 12, tokens, 64).requires_grad_().unbind()
        torch.testing.assert_close(attend_ref(q, k, v)[0], attend(q, k, v), atol=1e-5, rtol=1e-4)
        peer, ours = kept(lambda: attend_ref(q, k, v)[0]), kept(lambda: attend(q, k, v))
        rows.append(row('P5', f'bytes kept by attention over {tokens} tokens', target, dict(ratio=peer/ours, peer_mb=peer/2**20, ours_mb=ours/2**20)))
    return rows


# ---- metrics ----

def p12(pairs) -> list[dict]:
    "CIDEr-D of 1000 captions with five references each against pycocoevalcap"
    from pycocoevalcap.cider.cider import Cider
    rng, book = random.Random(0), [f'w{i}' for i in range(3000)]
    weights = [1/(i + 1) for i in range(3000)]
    text = lambda: ' '.join(rng.choices(book, weights, k=rng.randint(7, 13)))
    preds, refs = [text() for _ in range(1000)], [[text() for _ in range(5)] for _ in range(1000)]
    peer = lambda: Cider().compute_score(dict(enumerate(refs)), {i: [p] for i, p in enumerate(preds)})[1]

    def ours():
        metrics.tokens_plain.cache_clear()                  # the peer cuts its words anew as well
        return metrics.cider_d(preds, refs).each

    assert abs(peer() - ours()).max() < 1e-6, 'P12: other scores'
    return [row('P12', 'CIDEr-D, 1000 captions × 5 references, against pycocoevalcap', 4., race(peer, ours, pairs))]


def recall_loop(scores, owner, ks) -> list[float]:
    "One question after the other, equal scores in random order: R@k of pictures, then of texts"
    hits = {(side, k): [] for side in 'ti' for k in ks}
    for i, row in enumerate(scores):
        own = row[owner == i]
        best = own.max()
        above, equal, mine = (row > best).sum().item(), (row == best).sum().item(), (own == best).sum().item()
        for k in ks:
            places = min(max(k - above, 0), equal)
            hits['t', k].append(1 - math.comb(equal - mine, places)/math.comb(equal, places))
    for home, column in zip(owner.tolist(), scores.T):
        above, equal = (column > column[home]).sum().item(), (column == column[home]).sum().item()
        for k in ks: hits['i', k].append(min(max((k - above)/equal, 0.), 1.))
    return [statistics.mean(h) for h in hits.values()]


def p13(pairs) -> list[dict]:
    "R@1, 5 and 10 both ways, 1000 pictures with five texts each, scores rounded to half precision so that some are equal"
    torch.manual_seed(0)
    owner, ks = torch.arange(5000)//5, (1, 5, 10)
    scores = (torch.randn(1000, 5000) + 2*(owner == torch.arange(1000)[:, None])).half().float()

    def ours():
        found = retrieval.recall(scores, owner, ks)
        return [*found.tr.values(), *found.ir.values()]

    peer = lambda: recall_loop(scores, owner, ks)
    assert max(abs(a - b) for a, b in zip(peer(), ours())) < 1e-9, 'P13: other recalls'
    return [row('P13', 'recall@k of 1000 × 5000 scores, ties exact, against a loop over questions', 5., race(peer, ours, pairs))]


# ---- explaining ----

class Namer(torch.nn.Module):
    "A ViT-tiny with a class for each of 1000 names, and its layout"
    def __init__(self):
        super().__init__()
        from vl_tutor.models.backbones import ViT, ViTConfig
        self.eye = ViT(ViTConfig(224, 16, 192, 12, 3, 768, 'gelu', 1e-6))
        self.head = torch.nn.Linear(192, 1000)

    def forward(self, pictures): return self.head(self.eye.pooled(pictures))

    def layout(self):
        from vl_tutor.primitives.layout import Layout, Look, Span
        last, grid = f'eye.encoder.blocks.{len(self.eye.encoder.blocks) - 1}.', (self.eye.config.grid,)*2
        spans = [Span('cls', 0, 1), Span('image', 1, self.eye.config.tokens, grid)]
        return Layout(dict(media=spans), [Look(last + 'attn', 'media', ('media',), last + 'norm1')])


def p7(pairs) -> list[dict]:
    "Grad-CAM of the best class of eight pictures, ViT-tiny with random weights, against pytorch-grad-cam on the same model"
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from vl_tutor.explain.one_call import explain
    from vl_tutor.primitives.layout import Case
    torch.manual_seed(0)
    model, pictures = Namer().eval(), torch.randn(8, 3, 224, 224)
    layout, rows, side = model.layout(), list(range(8)), model.eye.config.grid
    with torch.no_grad(): best = model(pictures).argmax(1)
    fold = lambda x: x[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    cam = GradCAM(model, [model.get_submodule(layout.looks[0].norm)], reshape_transform=fold)

    peer = lambda: torch.from_numpy(cam(pictures, [ClassifierOutputTarget(i) for i in best.tolist()]))

    def ours():
        run = lambda: model(pictures)[rows, best]
        asked = Case(model, layout, run, [str(i) for i in best.tolist()], [dict(media=0)]*8, rows, 8)
        maps = torch.nn.functional.interpolate(explain(asked).maps('gradcam')[:, None], (224, 224), mode='bilinear')[:, 0]
        return maps/maps.amax((1, 2), keepdim=True)

    for a, b in zip(ours(), peer()): assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > .999, 'P7: other maps'
    return [row('P7', 'Grad-CAM of eight pictures, ViT-tiny at 224, against pytorch-grad-cam', 2.2, race(peer, ours, pairs))]


def p8(pairs) -> list[dict]:
    "Maps of eight words of the bundled captioner: one pass for all against forward and backward, everything watched, for each word"
    from vl_tutor.explain.attention_maps import relevance
    from vl_tutor.explain.gradcam import attention_gradcam
    from vl_tutor.explain.one_call import explain
    from vl_tutor.primitives.attention import record
    from vl_tutor.recipes.captioner import load_captioner
    tool, picture = load_captioner(), torch.randint(256, (3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    case = tool.case(picture, 'a red star left of a blue circle')
    looks, patches = case.layout.looks, slice(1, tool.model.config.vision.tokens)
    last = max(k for k, look in enumerate(looks) if look.asks == 'latents')

    def each(read):
        maps = []
        for j in range(len(case.labels)):
            tool.model.zero_grad()
            with record(tool.model, True) as seen: case.run()[j].backward()
            maps.append(read(j, lambda path: attention_gradcam(seen[path], seen.gradients(path)).detach()))
        tool.model.zero_grad()
        return torch.stack(maps)

    one = lambda j, table: table(looks[last].path)[0].sum(0)[patches]
    every = lambda j, table: relevance([(look, table(look.path)) for look in looks], case.layout)['text']['media'][0, j + 1, patches]
    jobs = (('attention_gradcam at the last look', 8., lambda: each(one), lambda: explain(case, looks={last}).reach('attention_gradcam')),
            ('relevance through every look', 3., lambda: each(every), lambda: explain(case).reach('relevance')))
    rows = []
    for name, target, peer, ours in jobs:
        torch.testing.assert_close(ours(), peer(), atol=1e-6, rtol=1e-4)
        rows.append(row('P8', f'{name}, {len(case.labels)} words in one pass against a pass for each', target, race(peer, ours, pairs)))
    return rows


@torch.no_grad()
def p9(pairs) -> list[dict]:
    "A model that cannot be watched against ours, not watched and watched: the same weights in the same memory, processor time"
    from vl_tutor.models.vlc import VLC, VLCConfig
    from vl_tutor.primitives.attention import Attention, record
    torch.manual_seed(0)
    model = VLC(VLCConfig(image_size=224, patch_size=16, width=192, layers=6, heads=4, hidden=768, vocab_size=500, decoder_layers=0)).eval()
    pictures, ids = torch.randn(2, 3, 224, 224), torch.randint(500, (2, 12))
    looks = [part for part in model.modules() if isinstance(part, Attention)]
    fused = lambda self, q, k, v, keep: attend(q, k, v, keep, self.causal, self.dropout if self.training else 0.)
    blind = type('Unwatched', (Attention,), dict(mix=fused))

    def run(kind):
        for part in looks: part.__class__ = kind
        return model(model.see(pictures), ids).text

    peer, off = lambda: run(blind), lambda: run(Attention)

    def on():
        for part in looks: part.__class__ = Attention
        with record(model): return off()

    assert torch.equal(peer(), off()), 'P9: other outputs'
    torch.testing.assert_close(on(), peer(), atol=1e-5, rtol=1e-4)
    return [row('P9', f'VLC of 209 tokens, recording {name}, against one that knows no recording', target, race(peer, ours, 5*pairs, time.process_time))
            for name, target, ours in (('off', .99, off), ('on', .556, on))]


ROWS = dict(P1=p1, P2=p2, P3=p3, P4=p4, P5=p5, P7=p7, P8=p8, P9=p9, P10=p10, P12=p12, P13=p13, P14=p14)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', nargs='*', default=[*ROWS], metavar='ROW', help=f'of {", ".join(ROWS)}; all of them if none is named')
    parser.add_argument('--pairs', type=int, default=9, help='runs of each side')
    parser.add_argument('--threads', type=int, default=2, help='threads of torch')
    args = parser.parse_args()
    if unknown := [r for r in args.rows if r not in ROWS]: parser.error(f'no row {", ".join(unknown)}: there are {", ".join(ROWS)}')
    torch.set_num_threads(args.threads)
    results = []
    for name in args.rows:
        for r in ROWS[name](args.pairs):
            results.append(r)
            sides = ', '.join(f'{k.replace("_", " ")} {r[k]:.2f}' for k in r if k.startswith(('peer', 'ours')))
            print(f'{r["name"]:4} {r["ratio"]:6.2f} × (target {r["target"]:g})  {r["job"]}  [{sides}]', flush=True)
    machine = dict(cpu=platform.machine(), cores=os.cpu_count(), threads=args.threads, torch=torch.__version__, python=platform.python_version())
    print(json.dumps(dict(pairs=args.pairs, machine=machine, rows=results), ensure_ascii=False))


if __name__ == '__main__': main()

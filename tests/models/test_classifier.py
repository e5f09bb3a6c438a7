"The classifier: pooling, drop path, losses, mixing, and trunks that move in."
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from vl_tutor.models.classifier import SIZES, Classifier, ClassifierConfig, classify, classify_mixed, given_paths, hits, init_classifier, top_1, top_5
from vl_tutor.models.mae import MAE, ViTTrunk
from vl_tutor.models.vlc import SIZES as VLC_SIZES
from vl_tutor.models.vlc import VLC
from vl_tutor.models.vlc_files import classifier_keys
from vl_tutor.training.layer_decay import classifier_groups

TINY = ClassifierConfig(16, 8, 32, 3, 4, 64, 5, drop_path=.4)


def made(seed=0, **changes) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(replace(TINY, **changes)).eval()


def pictures(n=4, side=16): return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('pool,theirs', [('gap', 'avg'), ('cls', 'token')])
def test_timms_vit_with_the_same_weights(pool, theirs):
    from timm.models.vision_transformer import VisionTransformer
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2., num_classes=5, global_pool=theirs).eval()
    with torch.no_grad():
        for p in vit.parameters(): p.copy_(torch.randn_like(p)*.3)
    ours = made(pool=pool)
    ours.load_state_dict(classifier_keys(pool).to_ours(vit.state_dict(), ours.state_dict()))
    with torch.no_grad(): assert torch.allclose(ours(pictures()), vit(pictures()), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('size,count', [('base', 86_567_656), ('base_384', 86_859_496), ('large', 304_326_632)])
def test_published_sizes(size, count):
    with torch.device('meta'): model = Classifier(SIZES[size])
    assert sum(p.numel() for p in model.parameters()) == count


def test_what_is_pooled():
    gap, cls = made(), made(pool='cls')
    with torch.no_grad():
        for model, moved in ((gap, True), (cls, False)):
            before = model(pictures())
            model.trunk.encoder.blocks[-1].register_forward_hook(lambda m, i, x: torch.cat([x[:, :1], x[:, 1:].flip(2)], 1))     # patches only
            assert (not torch.allclose(model(pictures()), before)) == moved


def test_non_square_pictures():
    model = made(image_size=(16, 24))
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 5)
    with pytest.raises(ValueError, match=r'\(2, 3, 24, 16\)'): model(torch.randn(2, 3, 24, 16))


def test_wrong_settings():
    with pytest.raises(ValueError, match="'gap' or 'cls', not 'mean'"): made(pool='mean')


def test_first_loss_is_the_log_of_the_classes():
    model = init_classifier(made())
    loss = classify(model, dict(image=pictures(), label=torch.tensor([0, 1, 2, 3])))['classify']
    assert abs(loss.item() - torch.log(torch.tensor(5.)).item()) < 1e-3 and (model.head.bias == 0).all() and (model.norm.weight == 1).all()
    again = init_classifier(made(seed=9))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert 0 < model.trunk.encoder.blocks[0].mlp.up.weight.abs().max() < .1


def test_given_dice_are_drop_paths_own():
    model, x = made().train(), pictures()
    torch.manual_seed(5)
    with torch.no_grad(): want = model(x)
    torch.manual_seed(5)
    dice = torch.stack([torch.rand(4, 1, 1) for _ in range(4)])      # two blocks with a rate, two branches each
    with torch.no_grad(), given_paths(model, dice) as same: assert same is model and torch.equal(model(x), want)


def test_given_dice_are_taken_back():
    model = made().train()
    paths = [block.drop_path for block in model.trunk.encoder.blocks]
    with pytest.raises(KeyError), given_paths(model, torch.zeros(4, 1, 1, 1)): raise KeyError
    assert [block.drop_path for block in model.trunk.encoder.blocks] == paths
    with torch.no_grad():
        with given_paths(model.eval(), torch.zeros(0, 1, 1, 1)): still = model(pictures())
        assert torch.equal(still, model(pictures()))


@pytest.mark.parametrize('smoothing', [0., .1, .3])
def test_losses_are_timms(smoothing):
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    model, label = made(), torch.tensor([0, 4, 2, 2])
    with torch.no_grad():
        logits = model(pictures())
        found = classify(model, dict(image=pictures(), label=label), smoothing=smoothing)
        assert list(found) == ['classify'] and torch.allclose(found['classify'], LabelSmoothingCrossEntropy(smoothing)(logits, label))
        targets = F.one_hot(label, 5)*(1 - smoothing) + smoothing/5
        soft = classify(model, dict(image=pictures(), targets=targets), smoothing=.5)['classify']      # soft targets are not smoothed again
        assert torch.allclose(soft, SoftTargetCrossEntropy()(logits, targets)) and torch.allclose(soft, found['classify'])


def test_mixing_is_for_training():
    model, batch = made(drop_path=0.), dict(image=pictures(), label=torch.tensor([0, 1, 2, 3]))
    with torch.no_grad():
        plain = classify(model, batch)['classify']
        assert torch.equal(classify_mixed()(model, batch)['classify'], plain)
        torch.manual_seed(0)
        first = classify_mixed()(model.train(), batch)['classify']
        torch.manual_seed(0)
        assert torch.equal(classify_mixed()(model, batch)['classify'], first) and not torch.equal(first, plain)
        assert torch.equal(batch['image'], pictures())
        with pytest.raises(ValueError, match='3 is odd'): classify_mixed()(model, dict(image=pictures(3), label=torch.tensor([0, 1, 2])))


def test_hits():
    scores = torch.tensor([[.1, .5, .4], [.9, .05, .05], [.2, .3, .5]])
    label = torch.tensor([2, 0, 0])
    assert hits(scores, label).tolist() == [False, True, False] and hits(scores, label, 2).tolist() == [True, True, False] and hits(scores, label, 5).all()
    batch = dict(image=scores, label=label)
    assert top_1(lambda x: x, batch).item() == pytest.approx(1/3) and top_5(lambda x: x, batch) == 1.


@pytest.mark.parametrize('pool,missing', [('gap', ['norm.weight', 'norm.bias', 'head.weight', 'head.bias']), ('cls', ['head.weight', 'head.bias'])])
def test_a_trunk_moves_in(pool, missing):
    givers = [VLC(VLC_SIZES['tiny']), MAE(ViTTrunk(image_size=32, patch_size=8, width=64, layers=3, heads=4, hidden=256), dim=16, layers=1, heads=2)]
    for giver in givers:
        with torch.no_grad(): giver.trunk.norm.weight.uniform_()
        model = Classifier.from_vlc(giver, 7, pool=pool).eval()
        assert model.config == ClassifierConfig((32, 32), 8, 64, 3, 4, 256, 7, pool)
        report = model.fill(giver)
        assert report.missing == missing and not [n for n in report.unused if n.startswith('trunk.') and not (pool == 'gap' and n.startswith('trunk.norm'))]
        x = pictures(2, 32)
        with torch.no_grad():
            tokens = giver.trunk(giver.trunk.embed(x)[0]) if pool == 'cls' else giver.trunk.encoder(giver.trunk.embed(x)[0])
            want = tokens[:, 0] if pool == 'cls' else model.norm(tokens[:, 1:].mean(1))
            assert torch.allclose(model.features(x), want, atol=1e-5)


def test_positions_are_stretched():
    giver = VLC(VLC_SIZES['tiny'])
    model = Classifier.from_vlc(giver, 3, image_size=48)
    assert model.trunk.positions.shape == (37, 64) and torch.equal(model.trunk.positions[0], giver.trunk.positions[0]) and model.trunk.positions.requires_grad


def test_a_classifier_gets_another_list_of_classes():
    old = made()
    new = made(seed=3, classes=8)
    with pytest.raises(ValueError, match='another size'): made(width=16).fill(old)
    report = new.fill(old)
    assert report.missing == ['norm.weight', 'norm.bias', 'head.weight', 'head.bias'] and torch.equal(new.trunk.cls, old.trunk.cls)


def test_it_can_learn_a_handful_by_heart():
    model, batch = init_classifier(made(drop_path=0.)).train(), dict(image=pictures(8), label=torch.arange(8) % 5)
    opt = torch.optim.AdamW(classifier_groups(model, decay=.9, wd=0.), lr=1e-2)
    for _ in range(40):
        opt.zero_grad()
        classify(model, batch)['classify'].backward()
        opt.step()
    assert top_1(model.eval(), batch) == 1.

"How the fixtures of transport and of retrieval evaluation are built from their own config.json."
import torch
from vl_tutor.models.vlc_files import load_vlc_weights
from vl_tutor.training.retrieval import match_score, published_recall, recall, score_all, score_all_ref
from vl_tutor.training.transport import align_cost, log_plan, released_plan, transport_distance
from parity_golden import checker
from parity_vlc_models import sized

KS = (1, 5, 10)


@checker('vlc/ot_align')
def ot_align(config, weights, io):
    pads = io['in.txt_pad'], io['in.img_pad']
    cost = align_cost(io['in.txt_emb'], io['in.img_emb'], *pads)
    out = {'out.cost': cost}
    for name, beta, steps in (('train', .5, 50), ('heatmap', .1, 1000)):
        plan = released_plan(cost, *pads, beta=beta, steps=steps)
        out |= {f'out.T_{name}': plan, f'out.distance_{name}': transport_distance(cost, plan)}
        check_logs(cost, pads, plan, beta, steps)
    return out | {'out.distance_optimal_transport_dist': out['out.distance_train']}


def check_logs(cost, pads, plan, beta, steps):
    "Where plain numbers have lost nothing, logarithms give the same plan: their sums are those of a plan"
    share = lambda pad: torch.where(pad, 0., 1/(~pad).sum(1, keepdim=True))
    logs, (words, patches) = log_plan(cost, *pads, beta=beta, steps=steps), map(share, pads)
    whole = (plan.sum(2) - patches).abs().amax(1) < .01*patches.amax(1)
    torch.testing.assert_close(logs.sum(1), words, atol=1e-4, rtol=0.)
    torch.testing.assert_close(logs[whole], plan[whole], atol=2e-5, rtol=1e-3)


HEADS = dict(mlm='mlm_score.bias', itm='itm_score.fc.bias', rank='rank_output.bias')


@checker('vlc/retrieval_eval')
def retrieval_eval(config, weights, io):
    tasks = [name for name, key in HEADS.items() if key in weights]
    model = load_vlc_weights(weights, config=sized(config['config'], *tasks))
    texts, owner = (io['in.text_ids'], io['in.text_masks']), io['in.text_img_index']
    scores = score_all(model, io['in.image'], *texts, batch_size=17)
    slow = score_all_ref(model, io['in.image'][:2], texts[0], texts[1], match_score(model))
    torch.testing.assert_close(scores[:2], slow, atol=2e-5, rtol=2e-5)
    found, exact = published_recall(scores, owner, KS), recall(scores, owner, KS)
    if not exact.tied: assert all(abs(a[k] - b[k]) < 1e-9 for a, b in zip(found[:2], exact[:2]) for k in KS)
    line = lambda side: torch.tensor([side[k] for k in KS])
    return {'out.scores': scores, 'out.ir_r1_r5_r10': line(found.ir), 'out.tr_r1_r5_r10': line(found.tr)}

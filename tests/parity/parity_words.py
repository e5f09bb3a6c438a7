"How the word games of VLC are built from their own config.json."
import torch
from transformers import BertTokenizer
from vl_tutor.primitives.masking import vlc_choose, vlc_mask_words
from vl_tutor.primitives.texts import fixed_ids
from vl_tutor.primitives.words import PieceTokenizer, mask_words
from parity_golden import checker


def atol(fixture: str): return lambda name: 0. if fixture == 'whole_word_mask' else 2e-5


def rtol(fixture: str): return lambda name: 0. if fixture == 'whole_word_mask' else 2e-5


def bert(vocabulary: list[str]) -> PieceTokenizer: return PieceTokenizer(BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}))


@checker('vlc/whole_word_mask')
def whole_word_mask(config, weights, io):
    c, tokenizer = config['config'], bert(config['vocabulary'])
    ids, keep = fixed_ids(tokenizer, c['captions'], c['max_text_len'])
    assert torch.equal(ids, io['in.input_ids'])
    assert [tokenizer.tokens(row) for row in ids] == config['tokens']
    orders = [[i for i in row if i >= 0] for row in io['in.shuffle_perm'].tolist()]
    draws = dict(hide=io['in.draw_80'], swap=io['in.draw_50'], word=io['in.random_words'])
    chosen = vlc_choose(tokenizer, ids, rate=c['mlm_prob'], orders=orders)
    seen, labels = vlc_mask_words(tokenizer, ids, rate=c['mlm_prob'], orders=orders, draws=draws)
    single, asked = mask_words(ids, tokenizer.maskable(ids), mask_id=tokenizer.mask_id, draws=dict(draws, choose=io['in.draw_15']))
    return {'out.wwm_mask_labels': chosen, 'out.wwm_ids_mlm': seen, 'out.wwm_labels_mlm': labels, 'out.token_ids_mlm': single,
            'out.token_labels_mlm': asked, 'out.special_tokens_mask': ~tokenizer.maskable(ids), 'out.attention_mask': keep}

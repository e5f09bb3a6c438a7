"How VLC's optimiser, its learning rates and its ImageNet classifier are built from their own config.json and lists."
import re
import torch
import torch.nn.functional as F
from vl_tutor.models.backbones import both
from vl_tutor.models.classifier import Classifier, ClassifierConfig, classify, given_paths
from vl_tutor.models.vlc import VLC, VLCConfig
from vl_tutor.training.checkpoints import KeyMap
from vl_tutor.training.layer_decay import OldAdamW, classifier_groups, finetuning_groups, freeze, group_table, pretraining_groups
from vl_tutor.training.schedules import cosine_to_floor, warmup_then_linear
from parity_golden import checker, fill


def block_rules(theirs: str, ours: str) -> list[tuple]:
    names = {'norm1': 'norm1', 'norm2': 'norm2', 'attn.qkv': 'attn.to_qkv', 'attn.proj': 'attn.to_out', 'mlp.fc1': 'mlp.up', 'mlp.fc2': 'mlp.down'}
    return [rule for a, b in names.items() for rule in both(theirs + a, ours + b)]


def trunk_rules(theirs: str = '') -> list[tuple]:
    return [(theirs + 'cls_token', 'trunk.cls', 'squeeze squeeze'), (theirs + 'pos_embed', 'trunk.positions', 'squeeze'),
            *both(theirs + 'patch_embed.proj', 'trunk.patches.proj'), *block_rules(theirs + 'blocks.{i}.', 'trunk.encoder.blocks.{i}.')]


def classifier_keys(pool: str) -> KeyMap:
    return KeyMap([*trunk_rules(), *both('fc_norm' if pool == 'gap' else 'norm', 'norm'), *both('head', 'head')])

"""Modules with the defaults of the papers, built on the operators.

Example:
    >>> import torch
    >>> from tokenmill import nn
    >>> layer = nn.BiFormerAttention(64, num_heads=2, topk=4)
    >>> layer(torch.randn(1, 56, 56, 64)).shape
    torch.Size([1, 56, 56, 64])
"""

from ._recurrent import RecurrentState
from .agent import AgentAttention
from .biformer import AttentionLePE, BiFormerAttention
from .biformer_model import BiFormer, biformer_base, biformer_small, biformer_stl, biformer_tiny
from .character import CharacterAttention, CharacterConsistencyLoss
from .class_token import ClsTokenPruning, EViTReorganize
from .clustering import TokenClustering, TokenReconstruction
from .dtop import ActiveTokens, DToPExit
from .embedding_pooling import EmbeddingPooling
from .evit import EViTEncoder, keep_rate_schedule
from .expedit import ExpeditedBlocks
from .focus import FocusSelect
from .focus_encoder import FocusDualAttention, FocusEncoder, FocusScorer
from .gated_delta_net import GatedDeltaNet
from .kimi_delta import KimiDeltaAttention
from .lightning import MiniMaxLightningAttention, MiniMaxLightningState
from .mamba2 import Mamba2
from .pattention import Pattention
from .ponet import PoNetMixing, segments_of
from .poolformer import (
    PoolFormer,
    poolformer_m36,
    poolformer_m48,
    poolformer_s12,
    poolformer_s24,
    poolformer_s36,
)
from .pooling import PoolFormerMixing, SegmentPooling
from .prompt_pool import PromptTokenPool
from .selector import SelectorSummary
from .sigmoid import SigmoidAttention
from .sparsifiner import SparsifinerAttention
from .sparsifiner_encoder import SparsifinerEncoder
from .taylor_window import (
    TaylorAttention,
    TaylorWindowBlock,
    TaylorWindowState,
    WindowAttention,
)
from .titans import TitansMemory, TitansState
from .titans_layers import TitansLayerState, TitansMAC, TitansMAG, TitansMAL
from .token_aware_pooling import AttentionDiversificationLoss, TokenAwarePooling
from .tome import TokenMerging
from .transnormer import TransNormerAttention, TransNormerLayer, TransNormerState
from .word_pooling import WordPooling

__all__ = [
    "ActiveTokens",
    "AgentAttention",
    "AttentionDiversificationLoss",
    "AttentionLePE",
    "BiFormer",
    "BiFormerAttention",
    "CharacterAttention",
    "CharacterConsistencyLoss",
    "ClsTokenPruning",
    "DToPExit",
    "EViTEncoder",
    "EViTReorganize",
    "EmbeddingPooling",
    "ExpeditedBlocks",
    "FocusDualAttention",
    "FocusEncoder",
    "FocusScorer",
    "FocusSelect",
    "GatedDeltaNet",
    "KimiDeltaAttention",
    "Mamba2",
    "MiniMaxLightningAttention",
    "MiniMaxLightningState",
    "Pattention",
    "PoNetMixing",
    "PoolFormer",
    "PoolFormerMixing",
    "PromptTokenPool",
    "RecurrentState",
    "SegmentPooling",
    "SelectorSummary",
    "SigmoidAttention",
    "SparsifinerAttention",
    "SparsifinerEncoder",
    "TaylorAttention",
    "TaylorWindowBlock",
    "TaylorWindowState",
    "TitansLayerState",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TitansMemory",
    "TitansState",
    "TokenAwarePooling",
    "TokenClustering",
    "TokenMerging",
    "TokenReconstruction",
    "TransNormerAttention",
    "TransNormerLayer",
    "TransNormerState",
    "WindowAttention",
    "WordPooling",
    "biformer_base",
    "biformer_small",
    "biformer_stl",
    "biformer_tiny",
    "keep_rate_schedule",
    "poolformer_m36",
    "poolformer_m48",
    "poolformer_s12",
    "poolformer_s24",
    "poolformer_s36",
    "segments_of",
]

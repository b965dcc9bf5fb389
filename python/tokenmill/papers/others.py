"""Papers without a computation that a kernel could be made for, and why."""

from __future__ import annotations

from .paper import Paper

OTHERS = (
    Paper(
        4, "DOEI", "DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class "
        "Activation Maps", "Zhu et al.", "2502.15885",
        claim="+3.6, +1.5 and +1.2 mIoU on VOC",
        note="scales tokens by the attention between classes and patches, but gives no formula, "
        "and its repository holds only a README",
    ),
    Paper(
        5, "GANO", "Enhancing Next Active Object-based Egocentric Action Anticipation with Guided "
        "Attention", "Thakur et al.", "2305.12953",
        note="a network for a task: ordinary attention between tokens of objects and of the clip",
    ),
    Paper(
        13, "SegFace", "SegFace: Face Segmentation of Long-Tail Classes", "Narayan et al.",
        "2412.08647",
        claim="95.96 frames/s on edge devices, for the whole model",
        note="a light decoder with class tokens and ordinary cross-attention",
    ),
    Paper(
        15, "Scan and Snap", "Scan and Snap: Understanding Training Dynamics and Token Composition "
        "in 1-layer Transformer", "Tian et al.", "2305.16380",
        note="a theory of training",
    ),
    Paper(
        19, "ToCo", "Token Contrast for Weakly-Supervised Semantic Segmentation", "Ru et al.",
        "2303.01267",
        note="losses on cosines between tokens: a product of matrices",
    ),
    Paper(
        25, "CSP", "Learning to Compose Soft Prompts for Compositional Zero-Shot Learning",
        "Nayak et al.", "2204.03574",
        note="embeddings that are learned",
    ),
    Paper(
        30, "Verbatim memory", "Characterizing Verbatim Short-Term Memory in Neural Language "
        "Models", "Armeni et al.", "2210.13569",
        note="an analysis of language models",
    ),
    Paper(
        32, "Discriminative class tokens", "Discriminative Class Tokens for Text-to-Image "
        "Diffusion Models", "Schwartz et al.", "2303.17155",
        note="an embedding that is optimised",
    ),
    Paper(
        34, "TokenCut", "Self-Supervised Transformers for Unsupervised Object Discovery using "
        "Normalized Cut", "Wang et al.", "2202.11539",
        claim="+6.9, +8.1 and +8.1 % CorLoc",
        note="an eigenvector of a graph of cosines: a product of matrices and torch.linalg",
    ),
    Paper(
        38, "A Song of (Dis)agreement", "A Song of (Dis)agreement: Evaluating the Evaluation of "
        "Explainable Artificial Intelligence in Natural Language Processing", "Neely et al.",
        "2205.04559",
        note="a study of evaluations",
    ),
    Paper(
        42, "ReAGent", "ReAGent: Towards A Model-agnostic Feature Attribution Method for "
        "Generative Language Models", "Zhao and Shan", "2402.00794",
        note="runs the forward of a model many times, whatever is in it",
    ),
    Paper(
        44, "Exact byte-level probabilities", "Exact Byte-Level Probabilities from Tokenized "
        "Language Models for FIM-Tasks and Model Ensembles", "Phan et al.", "2410.09303",
        note="an algorithm on the probabilities of a tokenizer",
    ),
    Paper(
        46, "SEED", "Planting a SEED of Vision in Large Language Model", "Ge et al.", "2307.08041",
        note="a tokenizer of images, with ordinary causal attention",
    ),
    Paper(
        48, "Rethinking Tokenization", "Rethinking Tokenization: Crafting Better Tokenizers for "
        "Large Language Models", "Yang", "2403.00417",
        note="an essay on tokenizers",
    ),
    Paper(
        50, "MEAP", "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More",
        "Zhuang et al.", "2502.07490",
        claim="+11.77 percentage points",
        note="hides random tokens of the input in training; its attention is ordinary and causal",
    ),
    Paper(
        55, "OAT", "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction",
        "Fang et al.", "2407.13335",
        note="a network for a task, with ordinary attention and a code of positions",
    ),
    Paper(
        56, "Factual recall", "Interpreting Key Mechanisms of Factual Recall in Transformer-Based "
        "Language Models", "Lv et al.", "2403.19521",
        note="an analysis of language models",
    ),
    Paper(
        60, "Cyclical captioning", "Learning to Generate Grounded Visual Captions without "
        "Localization Supervision", "Ma et al.", "1906.00283",
        note="a scheme of training",
    ),
    Paper(
        61, "cDPO", "Critical Tokens Matter: Token-Level Contrastive Estimation Enhence LLM's "
        "Reasoning Capability", "Lin et al.", "2411.19943",
        note="a loss from ratios of likelihoods",
    ),
)  # fmt: skip

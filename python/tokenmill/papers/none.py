"""Papers without a computation that needs a kernel, and the reasons."""

from __future__ import annotations

from .paper import Paper

ROWS = (
    Paper(
        number=4,
        name="DOEI",
        title=(
            "DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class"
            " Activation Maps"
        ),
        authors="Zhu et al.",
        arxiv="2502.15885",
        claim="+3.6, +1.5 and +1.2 mIoU on VOC",
        note=(
            "scales tokens by the attention between classes and patches, but gives no "
            "formula, and its repository holds only a README"
        ),
    ),
    Paper(
        number=5,
        name="GANO",
        title=(
            "Enhancing Next Active Object-based Egocentric Action Anticipation with Guided"
            " Attention"
        ),
        authors="Thakur et al.",
        arxiv="2305.12953",
        note="a network for a task: ordinary attention between tokens of objects and of the clip",
    ),
    Paper(
        number=13,
        name="SegFace",
        title="SegFace: Face Segmentation of Long-Tail Classes",
        authors="Narayan et al.",
        arxiv="2412.08647",
        claim="95.96 frames/s on edge devices, for the whole model",
        note="a light decoder with class tokens and ordinary cross-attention",
    ),
    Paper(
        number=15,
        name="Scan and Snap",
        title=(
            "Scan and Snap: Understanding Training Dynamics and Token Composition in "
            "1-layer Transformer"
        ),
        authors="Tian et al.",
        arxiv="2305.16380",
        note="a theory of training",
    ),
    Paper(
        number=19,
        name="ToCo",
        title="Token Contrast for Weakly-Supervised Semantic Segmentation",
        authors="Ru et al.",
        arxiv="2303.01267",
        note="losses on cosines between tokens: a product of matrices",
    ),
    Paper(
        number=25,
        name="CSP",
        title="Learning to Compose Soft Prompts for Compositional Zero-Shot Learning",
        authors="Nayak et al.",
        arxiv="2204.03574",
        note="embeddings that are learned",
    ),
    Paper(
        number=30,
        name="Verbatim memory",
        title="Characterizing Verbatim Short-Term Memory in Neural Language Models",
        authors="Armeni et al.",
        arxiv="2210.13569",
        note="an analysis of language models",
    ),
    Paper(
        number=32,
        name="Discriminative class tokens",
        title="Discriminative Class Tokens for Text-to-Image Diffusion Models",
        authors="Schwartz et al.",
        arxiv="2303.17155",
        note="an embedding that is optimised",
    ),
    Paper(
        number=34,
        name="TokenCut",
        title="Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut",
        authors="Wang et al.",
        arxiv="2202.11539",
        claim="+6.9, +8.1 and +8.1 % CorLoc",
        note="an eigenvector of a graph of cosines: a product of matrices and torch.linalg",
    ),
    Paper(
        number=38,
        name="A Song of (Dis)agreement",
        title=(
            "A Song of (Dis)agreement: Evaluating the Evaluation of Explainable Artificial"
            " Intelligence in Natural Language Processing"
        ),
        authors="Neely et al.",
        arxiv="2205.04559",
        note="a study of evaluations",
    ),
    Paper(
        number=42,
        name="ReAGent",
        title=(
            "ReAGent: Towards A Model-agnostic Feature Attribution Method for Generative "
            "Language Models"
        ),
        authors="Zhao and Shan",
        arxiv="2402.00794",
        note="runs the forward of a model many times, whatever is in it",
    ),
    Paper(
        number=44,
        name="Exact byte-level probabilities",
        title=(
            "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks "
            "and Model Ensembles"
        ),
        authors="Phan et al.",
        arxiv="2410.09303",
        note="an algorithm on the probabilities of a tokenizer",
    ),
    Paper(
        number=46,
        name="SEED",
        title="Planting a SEED of Vision in Large Language Model",
        authors="Ge et al.",
        arxiv="2307.08041",
        note="a tokenizer of images, with ordinary causal attention",
    ),
    Paper(
        number=48,
        name="Rethinking Tokenization",
        title="Rethinking Tokenization: Crafting Better Tokenizers for Large Language Models",
        authors="Yang",
        arxiv="2403.00417",
        note="an essay on tokenizers",
    ),
    Paper(
        number=50,
        name="MEAP",
        title="Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More",
        authors="Zhuang et al.",
        arxiv="2502.07490",
        claim="+11.77 percentage points",
        note="hides random tokens of the input in training; its attention is ordinary and causal",
    ),
    Paper(
        number=55,
        name="OAT",
        title="OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction",
        authors="Fang et al.",
        arxiv="2407.13335",
        note="a network for a task, with ordinary attention and a code of positions",
    ),
    Paper(
        number=56,
        name="Factual recall",
        title="Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models",
        authors="Lv et al.",
        arxiv="2403.19521",
        note="an analysis of language models",
    ),
    Paper(
        number=60,
        name="Cyclical captioning",
        title="Learning to Generate Grounded Visual Captions without Localization Supervision",
        authors="Ma et al.",
        arxiv="1906.00283",
        note="a scheme of training",
    ),
    Paper(
        number=61,
        name="cDPO",
        title=(
            "Critical Tokens Matter: Token-Level Contrastive Estimation Enhence LLM's "
            "Reasoning Capability"
        ),
        authors="Lin et al.",
        arxiv="2411.19943",
        note="a loss from ratios of likelihoods",
    ),
)

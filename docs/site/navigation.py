"""What the side bar of the site lists: documents by the names of their files in docs/."""

NAVIGATION = {
    "First steps": ["start", "choose", "coming-from", "papers", "faq", "glossary"],
    "Operators": ["operators", "dense", "linear", "sparse", "select", "tokens", "modules"],
    "Guides": [
        "models",
        "generate",
        "policies",
        "evaluate",
        "vit",
        "vlm",
        "long-training",
        "serving",
        "frameworks",
        "new-gpu",
        "bench",
        "tuning",
        "distributed",
        "sharding",
        "scale",
        "emulated",
    ],
    "Reference": ["api/index", "numerics", "performance", "changes"],
    "Development": [
        "contributing",
        "abi",
        "hopper",
        "adding-an-op",
        "adding-an-argument",
        "notebook/README",
    ],
}

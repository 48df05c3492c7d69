"""Recipes whose difference the summaries show, (better, worse) as they were expected."""

from __future__ import annotations

PAIRS = (
    ("prune method=sparsegpt sparsity=0.5", "prune method=wanda sparsity=0.5"),
    ("prune method=wanda sparsity=0.5", "prune method=magnitude sparsity=0.5"),
    ("prune method=sparsegpt pattern=2:4", "prune method=wanda pattern=2:4"),
    ("prune method=wanda pattern=2:4", "prune method=magnitude pattern=2:4"),
    ("prune method=wanda sparsity=0.5 allocate=utilisation", "prune method=wanda sparsity=0.5"),
    ("prune method=wanda sparsity=0.5 allocate=sensitivity", "prune method=wanda sparsity=0.5"),
    ("prune method=wanda sparsity=0.5 allocate=both", "prune method=wanda sparsity=0.5"),
    ("prune method=wanda sparsity=0.5 allocate=owl", "prune method=wanda sparsity=0.5"),
    ("prune method=sparsegpt sparsity=0.5 allocate=both", "prune method=sparsegpt sparsity=0.5"),
)
QUANTIZED_PAIRS = (
    *(
        (f"quantize method=gptq bits={b} group_size=32", f"quantize method=rtn bits={b} group_size=32")
        for b in (2, 3, 4)
    ),
    *(
        (f"quantize method=awq bits={b} group_size=32", f"quantize method=rtn bits={b} group_size=32")
        for b in (2, 3, 4)
    ),
    *(
        (f"quantize method=gptq bits=auto budget=3.0{by} group_size=32", "quantize method=gptq bits=3 group_size=32")
        for by in ("", " by=gradient", " per=expert", " per=layer", " by=used", " by=rare")
    ),
    *(
        (
            f"quantize method=gptq bits=auto budget=2.5 by={by} group_size=32",
            "quantize method=gptq bits=auto budget=2.5 group_size=32",
        )
        for by in ("used", "rare")
    ),
    ("quantize method=gptq bits=3 group_size=32 act_order=True", "quantize method=gptq bits=3 group_size=32"),
)
# Structures beside each other, the choice among them beside its best member, and all of it beside other ways to as few
# parameters.
FACTORED_PAIRS = tuple(
    (f"factorise structure={better} ratio={kept}", f"factorise structure={worse} ratio={kept}")
    for kept in (0.75, 0.5)
    for better, worse in (
        ("base_delta", "svd"),
        ("wrapper", "base_delta"),
        ("shared_basis", "svd"),
        *(("auto", each) for each in ("svd", "shared_basis", "basis_mixture", "sparse_low_rank")),
    )
) + tuple(
    (f"factorise structure=auto ratio={kept}", other)
    for kept, others in (
        (
            0.75,
            (
                "channels score=heapr ratio=0.25 budget=global within=layer",
                "channels score=camera ratio=0.25",
                "expert_drop score=naee ratio=0.25",
            ),
        ),
        (
            0.5,
            (
                "channels score=heapr ratio=0.5 budget=global within=layer",
                "channels score=camera ratio=0.5",
                "expert_drop score=naee ratio=0.5",
                "quantize method=rtn bits=8 group_size=32",
            ),
        ),
    )
    for other in others
)

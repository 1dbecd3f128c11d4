"""What one sample costs under a strategy, in units (design §5, paper Sec. 4.4 and Table 1).

A unit is the forward pass of one view's reference sequence; a backward pass counts 2. Costs are
linear in sequence length, as the paper assumes for up to a few hundred tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedulers.counts import exact
from schedulers.errors import UsageError
from schedulers.strategy import Strategy
from schedulers.tokens import kept_tokens, patch_tokens

PAPER_BASE_TOKENS = 197  # 14 x 14 patches and the class token: a 224-pixel image at patch 16


@dataclass(frozen=True)
class CostFormula:
    """Units per token of the query, the key and one small crop; `str()` is the formula of Table 1.

    `key_tokens`: how long the key is under a strategy. "patch": it has the strategy's patch and loses no tokens;
    "query": it is compressed as the query is; "base": it stays the reference (paper, Sec. 6.2 and 6.4).
    """

    query: int
    key: int
    small: int
    text: str
    key_tokens: str = "patch"

    def __str__(self) -> str:
        return self.text


METHOD_FORMULAS: dict[str, CostFormula] = {
    "mocov3": CostFormula(3, 1, 0, "(3 L_q + L_k) / L_base"),
    "simclr": CostFormula(3, 3, 0, "3 (L_q + L_k) / L_base", key_tokens="query"),
    "dino": CostFormula(3, 1, 3, "(3 L_q + 3 K L_small + L_k) / L_base", key_tokens="base"),
}


@dataclass(frozen=True)
class TokenCounts:
    """Sequence lengths of one sample, class token included, as the model runs them."""

    query: int
    key: int
    base: int


def sequence_cost(method: str, *, query: float, key: float, base: float, small: float = 0, crops: int = 0) -> float:
    """Units per sample of `method` from its sequence lengths (paper, Table 1).

    mocov3 (3 L_q + L_k) / L_base, simclr 3 (L_q + L_k) / L_base, dino (3 L_q + 3 K L_small + L_k) / L_base
    with K = `crops` small crops of L_small = `small` tokens. Raises UsageError for an unknown method,
    for crops where the method has none, and for lengths that are not positive.
    """
    formula = _formula(method)
    for name, length in (("query", query), ("key", key), ("base", base)):
        if not length > 0:
            raise UsageError(f"{name}={length!r} tokens is not a positive sequence length")
    if small < 0 or crops < 0:
        raise UsageError(f"small={small!r} and crops={crops!r} must not be negative")
    if small * crops and not formula.small:
        raise UsageError(f"method {method!r} has no small crops; leave out small and crops, or use dino")
    return (formula.query * query + formula.key * key + formula.small * crops * small) / base


def token_counts(image_size: int, base_patch: int, strategy: Strategy, *, method: str = "mocov3") -> TokenCounts:
    """Integer sequence lengths under `strategy`, class token included.

    query: floor(n (1 − dropout)) + 1 with n = (image_size / patch)²; base: (image_size / base_patch)² + 1; key: by
    `method`, n + 1 for mocov3 (the strategy's patch, no dropout), the query's for simclr, the base's for dino.
    An axis that is not given takes the reference's value. Raises UsageError for an unknown method, for patches that
    do not divide the image and for axes other than these two.
    """
    patch, dropout = _patch_and_dropout(base_patch, strategy)
    tokens = patch_tokens(image_size, patch)
    query, base = kept_tokens(tokens, dropout) + 1, patch_tokens(image_size, base_patch) + 1
    key = {"patch": tokens + 1, "query": query, "base": base}[_formula(method).key_tokens]
    return TokenCounts(query=query, key=key, base=base)


def token_cost(
    method: str, image_size: int, base_patch: int, strategy: Strategy, *, small: float = 0, crops: int = 0
) -> float:
    """Units per sample by the sequence lengths that really run: `sequence_cost` of `token_counts`.

    DINO's small crops are given as their length in tokens, class token included, and their number.
    """
    counts = token_counts(image_size, base_patch, strategy, method=method)
    return sequence_cost(method, query=counts.query, key=counts.key, base=counts.base, small=small, crops=crops)


def paper_cost(
    method: str, image_size: int, base_patch: int, strategy: Strategy, *, small: float = 0, crops: int = 0
) -> float:
    """Units per sample in the convention that reproduces the paper's Fig. 3.

    L_q = (1 − dropout)(n_q + 1), not rounded, the class token scaled too; L_k = n_base + 1, an
    uncompressed key (under simclr, which compresses both views, L_k = L_q); L_base = 197 whatever the image
    size. The reference of a 240-pixel image therefore costs 4.59 units, not 4, under MoCo-v3.
    """
    patch, dropout = _patch_and_dropout(base_patch, strategy)
    kept_tokens(patch_tokens(image_size, patch), dropout)  # refuses what could not run
    query = float((1 - exact(dropout)) * (patch_tokens(image_size, patch) + 1))
    key = query if _formula(method).key_tokens == "query" else patch_tokens(image_size, base_patch) + 1
    return sequence_cost(method, query=query, key=key, base=PAPER_BASE_TOKENS, small=small, crops=crops)


def paper_table2b_cost(image_size: int, patch: int) -> float:
    """Units per sample in the convention of the paper's Table 2b: 4 (image_size / patch)² / 196.

    Patch scaling of query and key alike under MoCo-v3, no class token on either side; it differs
    from Fig. 3's convention by up to 0.012 units.
    """
    return 4 * patch_tokens(image_size, patch) / (PAPER_BASE_TOKENS - 1)


def _formula(method: str) -> CostFormula:
    if method not in METHOD_FORMULAS:
        raise UsageError(f"unknown method {method!r}; the methods are {', '.join(METHOD_FORMULAS)}")
    return METHOD_FORMULAS[method]


def _patch_and_dropout(base_patch: int, strategy: Strategy) -> tuple[int, float]:
    for axis in strategy:
        if axis not in ("patch", "dropout"):
            raise UsageError(
                f"strategy {strategy}: token counts know the axes patch and dropout, not {axis!r}; "
                "give the task a cost of its own for other axes"
            )
    patch = strategy.number("patch") if "patch" in strategy else base_patch
    dropout = strategy.number("dropout") if "dropout" in strategy else 0.0
    if int(patch) != patch:
        raise UsageError(f"strategy {strategy}: patch={patch} is not a whole number of pixels")
    return int(patch), dropout

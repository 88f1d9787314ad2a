"""A Llama decoder with fewer channels and heads, cut from a larger one in closed form.

The residual stream keeps its own basis: channels are dropped, none are mixed. `choose_channels` drops those whose loss
costs the layers' products least when a regression on the kept channels stands in for them. `cut` then goes through the
layers with calibration text and solves every matrix by least squares, so that on the narrow model's own inputs it gives
what the wide one gives on its. Errors of earlier layers are inputs of later ones, and are corrected there as far as a
linear map can (as in GPTAQ, https://arxiv.org/abs/2504.02692; reconstruction after pruning:
https://arxiv.org/abs/1707.06168).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality.decoder import (
    EMBEDDING,
    FINAL_NORM,
    Shape,
    Weights,
    attended,
    gated,
    matrix,
    norm_gain,
    normed,
)  # fmt: skip

_RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-5, 1e-8)  # of the inputs' mean E[x²]
_PARTS = (("attention", "qkv"), ("mlp", ("gate", "up")))
_WINDOWS = 16  # at a time through attention


@dataclass(frozen=True)
class Site:
    """A normed input and the matrices that read it, as the choice of channels sees them."""

    moments: Tensor  # E[z zᵀ], float64 [channels, channels]
    readers: Tensor  # Σ Wᵀ W / E‖W z‖² over the matrices, float64 [channels, channels]


def sites(ids: Tensor, weights: Weights, shape: Shape) -> Iterator[Site]:
    """One for each norm of the decoder, from its pass over ids, int64 [windows, tokens]."""
    x = F.embedding(ids, weights[EMBEDDING])
    for layer in range(shape.layers):
        for part, names in _PARTS:
            z = normed(x, weights[norm_gain(layer, part)], shape.eps)
            yield _site(z, [weights[matrix(layer, name)] for name in names])
            x = x + _written(z, weights, layer, part, shape)
    yield _site(normed(x, weights[FINAL_NORM], shape.eps), [weights[EMBEDDING]])


def choose_channels(found: Sequence[Site], keep: int) -> Tensor:
    """The channels to keep, int64 [keep], sorted: one after the other goes whose removal adds least error.

    Removing channel j leaves the part of z_j that is orthogonal to the others, of variance 1 / (S⁻¹)_jj, times the
    columns that read it. The regression is folded into the readers at once, so that later removals see it; because what
    is lost at each step is orthogonal to all that is kept, the errors add up.
    """
    precision = torch.stack([torch.linalg.inv(_damped(site.moments)) for site in found])
    readers = torch.stack([site.readers for site in found])
    kept = torch.ones(readers.shape[-1], dtype=torch.bool)
    for _ in range(len(kept) - keep):
        cost = (readers.diagonal(dim1=1, dim2=2) / precision.diagonal(dim1=1, dim2=2)).sum(0)
        gone = int(torch.where(kept, cost, torch.inf).argmin())
        kept[gone] = False
        column, read = precision[:, :, gone].clone(), readers[:, :, gone].clone()
        fold = -column / column[:, gone, None]  # z_gone ≈ Σ fold · z_kept; −1 at `gone`, which makes its row vanish
        precision.baddbmm_(column[:, :, None], fold[:, None])
        readers.baddbmm_(fold[:, :, None], read[:, None])
        readers.baddbmm_(read[:, :, None] + read[:, gone, None, None] * fold[:, :, None], fold[:, None])
    return kept.nonzero().flatten()


def cut(ids: Tensor, weights: Weights, shape: Shape, kept: Tensor, heads: int) -> tuple[Weights, Shape]:
    """The narrow model: `kept` channels, `heads` heads a layer, each with keys and values of its own.

    Args:
        ids: int64 [windows, tokens], the text that least squares sees.
        weights: float32, the wide model's.
        kept: int64 [channels], sorted.
    """
    narrow = replace(shape, heads=heads, kv_heads=heads)
    wide = F.embedding(ids, weights[EMBEDDING])
    found = {EMBEDDING: weights[EMBEDDING][:, kept].clone()}
    x = wide[..., kept]
    for layer in range(shape.layers):
        wide, x = _cut_attention(wide, x, weights, found, layer, kept, shape, narrow)
        wide, x = _cut_mlp(wide, x, weights, found, layer, kept, shape)
    found[FINAL_NORM] = _final_gain(wide, x, weights, found[EMBEDDING], kept, shape.eps)
    return found, narrow


def drop_head(outputs: Tensor, projection: Tensor, heads: int, keep: int) -> Tensor:
    """The heads to keep, int64 [keep], sorted: those go whose outputs the other heads give back best through o_proj.

    Args:
        outputs: of all heads, float32 [tokens, heads · head_dim].
        projection: o_proj, float32 [channels, heads · head_dim].
    """
    moments = (outputs.T @ outputs).double() / len(outputs)
    kept, columns = list(range(heads)), torch.arange(outputs.shape[1]).unflatten(0, (heads, -1))

    def loss(head: int) -> float:
        rest = columns[[other for other in kept if other != head]].flatten()
        own, gone = projection[:, (out := columns[head])].double(), moments[out][:, out]
        across = moments[rest][:, out]
        unexplained = gone - across.T @ torch.linalg.solve(_damped(moments[rest][:, rest]), across)
        return float((own @ unexplained * own).sum())

    while len(kept) > keep:
        kept.remove(min(kept, key=loss))
    return torch.tensor(kept)


def solved(x: Tensor, y: Tensor, prior: Tensor, weight: Tensor | None = None) -> Tensor:
    """W that minimises Σ weight · ‖y − W x‖² + ridge · ‖W − prior‖², float32 [outputs, inputs].

    The ridge is the one of `_RIDGES` whose W, solved on three windows of four, is best on the fourth: without it, sixty
    solutions in a row fit the text that they see six times better than any other.

    Args:
        x, y: float32 [windows, tokens, inputs] and [windows, tokens, outputs].
        weight: float32 [windows, tokens].
    """
    held_out = torch.arange(len(x)) % 4 == 3
    parts = [_products(x[chosen], y[chosen], prior, weight if weight is None else weight[chosen])
             for chosen in (~held_out, held_out)]  # fmt: skip
    whole = [first + second for first, second in zip(*parts, strict=True)]
    if not held_out.any():
        return prior + _ridge_solution(_RIDGES[-1], *whole).float()
    return prior + _ridge_solution(_best_ridge(*parts), *whole).float()


def _best_ridge(train: Sequence[Tensor], held_out: Sequence[Tensor]) -> float:
    """The first of `_RIDGES`, from stiff to free, after which the error on held-out text grows."""
    gram, across = held_out
    best, least = _RIDGES[0], torch.inf
    for ridge in _RIDGES:
        change = _ridge_solution(ridge, *train)
        if (error := float(((change @ gram - 2 * across) * change).sum())) >= least:
            break
        best, least = ridge, error
    return best


def _products(x: Tensor, y: Tensor, prior: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of inputs with themselves, and of what the prior leaves with them, float64."""
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    scaled = x if weight is None else x * weight.flatten()[:, None]
    gram = (scaled.T @ x).double()
    return gram, (y.T @ scaled).double() - prior.double() @ gram


def _ridge_solution(ridge: float, gram: Tensor, across: Tensor) -> Tensor:
    return torch.cholesky_solve(across.T, torch.linalg.cholesky(_damped(gram, ridge))).T


# --- layers -----------------------------------------------------------------------------------------------------------


def _cut_attention(
    wide: Tensor, x: Tensor, weights: Weights, found: Weights, layer: int, kept: Tensor, shape: Shape, narrow: Shape
) -> tuple[Tensor, Tensor]:
    z, states = _gained(wide, x, weights, found, norm_gain(layer, "attention"), kept, shape.eps)
    head_dim = weights[matrix(layer, "q")].shape[0] // shape.heads
    products = [F.linear(z, weights[matrix(layer, name)]) for name in "qkv"]
    outputs = _by_windows(shape, *products)
    heads = drop_head(outputs.flatten(0, 1), weights[matrix(layer, "o")], shape.heads, narrow.heads)
    rows = _rows(heads, head_dim)
    shared = _rows(heads // (shape.heads // shape.kv_heads), head_dim)
    readers = [(matrix(layer, name), chosen) for name, chosen in zip("qkv", (rows, shared, shared), strict=True)]
    _read(states, products, readers, weights, found, kept)
    wide = wide + F.linear(outputs, weights[matrix(layer, "o")])
    own = _by_windows(narrow, *(F.linear(states, found[matrix(layer, name)]) for name in "qkv"))
    prior = weights[matrix(layer, "o")][kept][:, rows]
    return wide, _add(x, own, wide[..., kept], prior, found, matrix(layer, "o"))


def _cut_mlp(
    wide: Tensor, x: Tensor, weights: Weights, found: Weights, layer: int, kept: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    z, states = _gained(wide, x, weights, found, norm_gain(layer, "mlp"), kept, shape.eps)
    products = [F.linear(z, weights[matrix(layer, name)]) for name in ("gate", "up")]
    readers = [(matrix(layer, name), torch.arange(products[0].shape[-1])) for name in ("gate", "up")]
    _read(states, products, readers, weights, found, kept)
    wide = wide + F.linear(gated(*products), weights[matrix(layer, "down")])
    own = gated(*(F.linear(states, found[matrix(layer, name)]) for name in ("gate", "up")))
    return wide, _add(x, own, wide[..., kept], weights[matrix(layer, "down")][kept], found, matrix(layer, "down"))


def _gained(
    wide: Tensor, x: Tensor, weights: Weights, found: Weights, name: str, kept: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Both models' normed inputs. The narrow one's gain makes up for the channels that its mean square misses."""
    z = normed(wide, weights[name], eps)
    gain = weights[name][kept]
    states = normed(x, gain, eps)
    ratio = (states * z[..., kept]).sum() / states.square().sum()
    found[name] = gain * ratio
    return z, states * ratio


def _read(
    states: Tensor, products: Sequence[Tensor], readers: Sequence[tuple[str, Tensor]], weights: Weights, found: Weights,
    kept: Tensor,
) -> None:  # fmt: skip
    """Solve the matrices that read one input, by name and chosen rows, for the wide model's products."""
    prior = torch.cat([weights[name][rows][:, kept] for name, rows in readers])
    target = torch.cat([product[..., rows] for product, (_, rows) in zip(products, readers, strict=True)], -1)
    matrices = solved(states, target, prior).split([len(rows) for _, rows in readers])
    found.update({name: own.contiguous() for (name, _), own in zip(readers, matrices, strict=True)})


def _add(x: Tensor, own: Tensor, target: Tensor, prior: Tensor, found: Weights, name: str) -> Tensor:
    """Solve what a branch writes, so that the stream becomes the wide one's; the stream after it. A token counts by
    the inverse of its mean square, because norms read the stream: else a few massive tokens would decide."""
    weight = 1 / target.square().mean(-1)
    found[name] = solved(own, target - x, prior, weight)
    return x + F.linear(own, found[name])


def _final_gain(wide: Tensor, x: Tensor, weights: Weights, table: Tensor, kept: Tensor, eps: float) -> Tensor:
    """The last norm's gain, float32 [channels], that brings the logits nearest: least squares over the vocabulary."""
    z = normed(wide, weights[FINAL_NORM], eps).flatten(0, 1)
    states = normed(x, torch.ones(len(kept)), eps).flatten(0, 1)
    prior = weights[FINAL_NORM][kept]
    left = ((states.T @ states) * (table.T @ table)).double()
    right = ((z @ (weights[EMBEDDING].T @ table)) * states).sum(0).double()
    return prior + torch.linalg.solve(_damped(left), right - left @ prior.double()).float()


def _written(z: Tensor, weights: Weights, layer: int, part: str, shape: Shape) -> Tensor:
    if part == "attention":
        products = (F.linear(z, weights[matrix(layer, name)]) for name in "qkv")
        return F.linear(_by_windows(shape, *products), weights[matrix(layer, "o")])
    return F.linear(
        gated(*(F.linear(z, weights[matrix(layer, name)]) for name in ("gate", "up"))), weights[matrix(layer, "down")]
    )


def _site(z: Tensor, readers: Sequence[Tensor]) -> Site:
    z = z.flatten(0, 1)
    moments = (z.T @ z).double() / len(z)
    grams = [(reader.T @ reader).double() for reader in readers]
    return Site(moments, torch.stack([gram / (gram * moments).sum() for gram in grams]).sum(0))


def _by_windows(shape: Shape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = zip(*(states.split(_WINDOWS) for states in (query, key, value)), strict=True)
    return torch.cat([attended(query, key, value, shape) for query, key, value in parts])


def _rows(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _damped(moments: Tensor, ridge: float = 1e-4) -> Tensor:
    size = moments.shape[-1]
    return moments + ridge * moments.diagonal().mean() * torch.eye(size, dtype=moments.dtype)

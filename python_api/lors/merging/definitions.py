"""Every method by its definition in docs/methods.md, one tensor at a time, in float64 numpy: what `verify` compares with.

Written to be read, not to be fast: full SVDs, whole tensors, all experts at once. Nothing of the engine, the methods' modules
or the kernels is used but `random_bits` and `random_key`, which define the random numbers, and what reads statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lors_kernels import random_key
from lors_kernels.counter_random import random_bits

from ..experts.statistics import read_statistics

Parameters = Mapping[str, Any]
Array = np.ndarray


class Expert(NamedTuple):
    """One tensor of an expert, float64."""

    name: str
    values: Array  # W_t
    delta: Array  # W_t - W0, rounded to float32
    exact: Array  # the same, not rounded where it is known by factors
    stored: tuple[Array, Array, Array] | None = None  # of an expert file, all it knows of delta: left, right and S
    svd: tuple[Array, Array, Array] | None = None  # of a boosted delta, in the order that it had before


class Merged(NamedTuple):
    values: Array  # float64
    energies: Array | None = None  # of delta, L and S, sums of squares over the experts; None: the report has none


def merged(
    method: str,
    base: Array,
    experts: Sequence[Expert],
    models: Sequence[Parameters],
    shared: Parameters,
    stream: str,
    seed: int,
) -> Merged:
    """The merged tensor, from the parameters of each expert and of the whole merge; `stream` is the tensor's name."""
    weights, scale = [model.get("weight", 1.0) for model in models], shared.get("lambda", 1.0)
    deltas = [expert.delta for expert in experts]
    if method in ("lors", "svp", "magnitude_prune"):
        settings = [(model.get("rank", 0), model.get("density", 0.0)) for model in models]
        return added(base, experts, [scale * weight for weight in weights], settings)
    if method == "task_arithmetic":
        total = sum(weights) if shared["normalize"] else 1.0
        divisor = total if abs(total) >= 1e-8 else 1.0
        return added(base, experts, [scale * weight / divisor for weight in weights])
    if method == "linear":
        total = sum(weights) if shared["normalize"] else 1.0
        return Merged(sum(w / total * expert.values for w, expert in zip(weights, experts, strict=True)))
    if method == "slerp":
        return Merged(on_the_sphere(shared["t"], base, experts[0].values))
    if method == "model_stock":
        return Merged(base + stock(np.stack(deltas), shared["filter_wise"]))
    if method == "tsv":
        return Merged(base + scale * task_singular_vectors(experts, weights))
    if method == "lors_parts":
        return Merged(base + scale * parts(experts, models, shared["orthogonal"]))
    if method == "regmean":
        used = [w * e.exact for w, e in zip(weights, experts, strict=True) if w]
        read = [read_statistics(m["statistics"], stream, base.shape) for m, w in zip(models, weights, strict=True) if w]
        return Merged(base + scale * nearest_outputs(used, read, shared["alpha"], shared["ridge"]) if used else base)
    if method in ("iso_cts", "wudi"):
        used = [w * e.exact for w, e in zip(weights, experts, strict=True) if w]
        if not used:
            return Merged(base)
        if method == "iso_cts":
            return Merged(base + scale * isotropic_task_specific(used, shared["common"]))
        return Merged(base + scale * least_interference(used, shared["ridge"], shared["towards"]))
    if method == "iso_c":
        return Merged(base + scale * isotropic(sum(w * e.exact for w, e in zip(weights, experts, strict=True))))
    keys = [random_key(seed, expert.name, stream) for expert in experts]
    masks = [kept(method, d, model, key) for d, model, key in zip(deltas, models, keys, strict=True)]
    change = consensus(deltas, masks, weights, method in ("ties", "dare_ties", "della", "breadcrumbs_ties"), shared)
    return Merged(base + scale * change, squares((d, 0, d * mask) for d, mask in zip(deltas, masks, strict=True)))


def rest(rule: str, base: Array, experts: Sequence[Expert], models: Sequence[Parameters], shared: Parameters) -> Merged:
    """A tensor that the method does not treat."""
    own = shared.get("rest_lambda")
    average, arithmetic = (own, own) if own is not None else (1.0, shared.get("lambda", 1.0))
    weights = {
        "base": [0.0 for _ in models],
        "average": [average / len(models) for _ in models],
        "task_arithmetic": [arithmetic * model.get("weight", 1.0) for model in models],
    }[rule]
    return added(base, experts, weights)


# --- sums of what each expert contributes ----------------------------------------------------------------------------


def added(
    base: Array,
    experts: Sequence[Expert],
    weights: Sequence[float],
    settings: Sequence[tuple[float, float]] | None = None,
) -> Merged:
    """W0 + sum_t weight_t (L_t + S_t) with (rank, density) of each expert; without settings S_t is all of delta_t."""
    total, terms = base.copy(), []
    for expert, weight, (rank, density) in zip(experts, weights, settings or [(0, 1.0)] * len(experts), strict=True):
        if weight:
            low, sparse = reduced(expert, rank, density)
            total += weight * (low + sparse)
            terms.append((expert.exact, low, sparse))
    return Merged(total, squares(terms))


def reduced(expert: Expert, rank: float, density: float) -> tuple[Array, Array]:
    """(L, S): the truncated SVD of delta and the int(density * n) largest entries of what it leaves."""
    delta, low = expert.exact, np.zeros_like(expert.exact)
    r = 0 if not rank else max(1, int(rank * min(delta.shape))) if rank < 1 else int(rank)
    if expert.stored is not None:
        left, right, sparse = expert.stored
        if r:
            low = left[:, :r] @ right[:, :r].T
        if left.shape[1]:
            delta = left @ right.T + sparse
        left_over = sparse if r == left.shape[1] else delta - low
    else:
        if r:
            u, sigma, v = expert.svd or np.linalg.svd(delta, full_matrices=False)
            low = (u[:, :r] * sigma[:r]) @ v[:r]
        left_over = delta - low
    return low, np.where(largest(left_over, int(density * delta.size)), left_over, 0.0)


def largest(x: Array, k: int) -> Array:
    """A mask of the k largest magnitudes, of equal ones the first in row-major order."""
    magnitude = np.abs(x).ravel()
    mask = np.full(magnitude.size, k >= magnitude.size)
    if 0 < k < magnitude.size:
        least = np.partition(magnitude, magnitude.size - k)[magnitude.size - k]
        mask = magnitude > least
        mask[np.flatnonzero(magnitude == least)[: k - np.count_nonzero(mask)]] = True
    return mask.reshape(x.shape)


def squares(terms: Any) -> Array:
    """Of delta, L and S; what L adds to the energy is what it takes from delta."""
    total = np.zeros(3)
    for delta, low, sparse in terms:
        whole = np.square(delta).sum()
        total += whole, whole - np.square(delta - low).sum(), np.square(sparse).sum()
    return total


# --- trimmed task vectors --------------------------------------------------------------------------------------------


def kept(method: str, delta: Array, model: Parameters, key: int) -> Array:
    """Which entries of a task vector are kept."""
    density, size = model["density"], delta.size
    if density >= 1:
        return np.ones(delta.shape, bool)
    if method == "ties":
        return largest(delta, max(1, int(density * size)) if density > 0 else 0)
    if method.startswith("breadcrumbs"):
        count = int(density * size)
        outliers = min(int(model["gamma"] * size), size - count)
        return largest(delta, outliers + count) & ~largest(delta, outliers)
    chance = np.full(delta.shape, density) if method.startswith("dare") else by_rank(delta, density, model["epsilon"])
    return random_bits(key, 0, size).reshape(delta.shape) < np.floor(chance * 2.0**32)


def by_rank(delta: Array, density: float, epsilon: float) -> Array:
    """DELLA's probabilities: density - epsilon for the smallest entry of a row (second axis) to density + epsilon."""
    rows = np.abs(delta) if delta.ndim > 1 else np.abs(delta).reshape(1, -1)
    count = rows.shape[1]
    if count == 1 or density <= 0:
        return np.full(delta.shape, density)
    rank = rows.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return (density - epsilon + 2 * epsilon * rank / (count - 1)).reshape(delta.shape)


def consensus(
    deltas: Sequence[Array], masks: Sequence[Array], weights: Sequence[float], elect: bool, shared: Parameters
) -> Array:
    """The weighted sum of what is kept; of the entries that agree with the sign of the sum, if there is an election."""
    terms = []
    for delta, mask, weight in zip(deltas, masks, weights, strict=True):
        before, after = np.abs(delta).sum(), np.abs(delta[mask]).sum()
        factor = before / after if shared["rescale"] and min(before, after) >= 1e-7 else 1.0
        # in float32: where experts all but cancel the election depends on its rounding
        terms.append(np.where(mask, delta, 0).astype(np.float32) * np.float32(factor) * np.float32(weight))
    total = sum(terms, np.zeros_like(terms[0]))
    if not elect:
        divisor = math.fsum(weights)
        return total / (divisor if shared["normalize"] and abs(divisor) >= 1e-8 else 1.0)
    agree = [np.where(total >= 0, term > 0, term < 0) for term in terms]
    chosen, chosen_weight = np.zeros(total.shape), np.zeros(total.shape)
    for a, term, w in zip(agree, terms, weights, strict=True):
        chosen += np.where(a, term, 0)
        chosen_weight += np.where(a, w, 0)
    return chosen / np.where(chosen_weight == 0, 1.0, chosen_weight) if shared["normalize"] else chosen


# --- all experts together --------------------------------------------------------------------------------------------


def on_the_sphere(t: float, base: Array, tuned: Array) -> Array:
    lengths = [norm if (norm := np.linalg.norm(x)) > 1e-8 else 1.0 for x in (base, tuned)]
    cosine = np.clip(np.vdot(base, tuned) / (lengths[0] * lengths[1]), -1, 1)
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * tuned
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * tuned) / np.sin(angle)


def stock(deltas: Array, filter_wise: bool) -> Array:
    """t * mean(delta), t = N c / (1 + (N - 1) c) with c the mean cosine between two experts, of the tensor or of each row."""
    count, shape = len(deltas), deltas.shape[1:]
    rows = deltas.reshape(count, -1, shape[-1] if filter_wise and shape else deltas[0].size)
    norms = np.linalg.norm(rows, axis=2)
    cosines = [
        (rows[i] * rows[j]).sum(axis=1) / np.maximum(norms[i] * norms[j], 1e-6) for i in range(count) for j in range(i)
    ]
    c = np.clip(cosines, -1, 1).mean(axis=0)
    below = 1 + (count - 1) * c
    t = np.where(np.abs(below) < 1e-6, 0.0, count * c / np.where(np.abs(below) < 1e-6, 1.0, below))
    return (t[:, None] * rows.mean(axis=0)).reshape(shape)


def there(sigma: Array, shape: tuple[int, ...]) -> Array:
    """Which singular values are not zero."""
    return sigma > max(shape) * 2.0**-53 * sigma.max(initial=0.0)


def nearest_orthonormal(x: Array) -> Array:
    u, sigma, v = np.linalg.svd(x, full_matrices=False)
    found = there(sigma, x.shape)
    return u[:, found] @ v[found]


def task_singular_vectors(experts: Sequence[Expert], weights: Sequence[float]) -> Array:
    used = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if weight]
    lefts, sigmas, rights = [], [], []
    for expert, weight in used:
        delta = expert.exact
        u, sigma, v = expert.svd or np.linalg.svd(delta, full_matrices=False)
        found = there(sigma, delta.shape)
        found[int(min(delta.shape) * (1 / len(used))) :] = False  # rounded as FusionBench does
        lefts.append(u[:, found])
        sigmas.append(weight * sigma[found])
        rights.append(v[found].T)
    if not used or not sum(map(len, sigmas)):
        return np.zeros_like(experts[0].exact)
    left, right = (nearest_orthonormal(np.concatenate(vectors, axis=1)) for vectors in (lefts, rights))
    return (left * np.concatenate(sigmas)) @ right.T


def parts(experts: Sequence[Expert], models: Sequence[Parameters], orthogonal: bool) -> Array:
    lefts, rights, scaled, low, sparse = [], [], [], np.zeros(experts[0].exact.shape), 0.0
    for expert, model in zip(experts, models, strict=True):
        delta = expert.exact
        u, sigma, v = expert.svd or np.linalg.svd(delta, full_matrices=False)
        rank = model.get("rank", int(min(delta.shape) * (1 / len(experts))))
        found = there(sigma, delta.shape)
        found[max(1, int(rank * min(delta.shape))) if rank < 1 else int(rank) :] = False
        own = (u[:, found] * sigma[found]) @ v[found]
        kept = largest(delta - own, int(model["density"] * delta.size))
        low, sparse = low + model["weight"] * own, sparse + model["sparse_weight"] * np.where(kept, delta - own, 0.0)
        lefts.append(u[:, found])
        rights.append(v[found].T)
        scaled.append(model["weight"] * sigma[found])
    if orthogonal and sum(x.size for x in scaled):
        left, right = (nearest_orthonormal(np.concatenate(vectors, axis=1)) for vectors in (lefts, rights))
        low = (left * np.concatenate(scaled)) @ right.T
    return low + sparse


def boosted(x: Array, share: float, zero: float) -> tuple[Array, Array, Array]:
    """(u, sigma, v): of the singular values that are more than `zero` of the largest, none below the first at which their
    running sum, largest first, reaches a share."""
    u, sigma, v = np.linalg.svd(x, full_matrices=False)
    large = sigma[sigma > zero * sigma[0]]
    if len(large):
        least = large[np.flatnonzero(np.cumsum(large) >= share * large.sum() * (1 - 1e-15))[0]]
        sigma = np.where(sigma > zero * sigma[0], np.maximum(sigma, least), sigma)
    return u, sigma, v


def isotropic(total: Array) -> Array:
    u, sigma, v = np.linalg.svd(total, full_matrices=False)
    found = there(sigma, total.shape)
    return sigma.mean() * (u[:, found] @ v[found])


def triplets(x: Array, count: int) -> tuple[Array, Array, Array]:
    """The `count` largest singular triplets but those of value 0."""
    u, sigma, v = np.linalg.svd(x, full_matrices=False)
    kept = np.flatnonzero(there(sigma, x.shape))[:count]
    return u[:, kept], sigma[kept], v[kept].T


def isotropic_task_specific(deltas: Sequence[Array], common: float) -> Array:
    total, least, count = np.sum(deltas, axis=0), min(deltas[0].shape), len(deltas)
    each = min(round((least - int(common * least)) / count), least // count)
    parts = [triplets(total, least - each * count)]
    outside = np.eye(len(total)) - parts[0][0] @ parts[0][0].T
    for delta in deltas:
        u, sigma, v = triplets(outside @ delta, each)
        kept = sigma > max(delta.shape) * 2.0**-53 * np.linalg.norm(
            delta
        )  # what is left over of delta, not of rounding
        parts.append((u[:, kept], sigma[kept], v[:, kept]))
    left, sigma, right = (np.concatenate([part[side] for part in parts], axis=-1) for side in range(3))
    return sigma.sum() / least * (nearest_orthonormal(left) @ nearest_orthonormal(right).T)


def least_interference(deltas: Sequence[Array], ridge: float, towards: str) -> Array:
    goal = sum(deltas) / (len(deltas) if towards == "mean" else 1)
    grams = [delta.T @ delta / max(np.square(delta).sum(), np.finfo(float).tiny) for delta in deltas]
    total = sum(grams)
    epsilon = ridge * np.trace(total) / len(total)
    if not epsilon:  # all are the base
        return np.zeros_like(goal)
    inverse = np.linalg.inv(total + epsilon * np.eye(len(total)))
    return (sum(delta @ gram for delta, gram in zip(deltas, grams, strict=True)) + epsilon * goal) @ inverse


def nearest_outputs(deltas: Sequence[Array], means: Sequence[Array], alpha: float, ridge: float) -> Array:
    shrunk = [np.where(np.eye(len(mean)) > 0, mean, alpha * mean) for mean in means]
    total = np.sum(shrunk, axis=0)
    epsilon = ridge * np.trace(total) / len(total)
    wanted = sum(delta @ mean for delta, mean in zip(deltas, shrunk, strict=True)) + epsilon * np.mean(deltas, axis=0)
    return np.linalg.solve(total + epsilon * np.eye(len(total)), wanted.T).T

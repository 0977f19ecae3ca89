"""Predict how many signs differ between two vectors of Gaussian entries, from their cosine alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

NODES = 24  # of each of four pieces of the quadrature; the error is below 1e-8
REACH = 9.0  # standard deviations beyond which a Gaussian density is negligible
NEAR_ONE = 1 - 1e-13


def opposite_share(cosine: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the share of opposite signs among the entries that both keep, for jointly Gaussian entries (X, Y).

    X and Y have the correlation ρ, and each keeps its largest magnitudes, |X| > s and |Y| > t:

        P(X > s, Y < −t) / (P(X > s, Y < −t) + P(X > s, Y > t))

    Law: arccos(ρ)/π where both keep everything; 1/2 for ρ = 0; 0 for ρ = 1.

    Args:
        cosine: ρ, of any shape.
        first, second: the share of the entries that each keeps, of shapes that broadcast to that of `cosine`.
    """
    rho, one, two = (np.ascontiguousarray(x, float).reshape(-1) for x in np.broadcast_arrays(cosine, first, second))
    found = np.empty(len(rho))
    for start in range(0, len(rho), 1 << 14):
        at = slice(start, start + (1 << 14))
        found[at] = _opposite_share(rho[at], one[at], two[at])
    return found.reshape(np.shape(cosine))


def _opposite_share(cosine: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    rho = torch.from_numpy(cosine).clamp(-NEAR_ONE, NEAR_ONE)
    s, t = (-torch.special.ndtri(torch.from_numpy(share).clamp(1e-12, 1) / 2) for share in (first, second))
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(NODES))
    spread = (1 - rho * rho).sqrt()
    # The integrand changes within `spread` of where −t − ρx or ρx − t passes 0: split the range there.
    bend = torch.where(rho.abs() > 1e-6, t / rho.abs().clamp_min(1e-6), s).clamp(s, s + REACH)
    width = 8 * spread / rho.abs().clamp_min(1e-3)
    edges = [s, (bend - width).clamp(s, s + REACH), bend, (bend + width).clamp(s, s + REACH), s + REACH]
    opposite = same = torch.zeros_like(rho)
    for low, high in pairwise(edges):
        x = low + (high - low) * (nodes.unsqueeze(1) + 1) / 2
        density = torch.exp(-x * x / 2) * weights.unsqueeze(1) * (high - low)
        opposite = opposite + (density * torch.special.ndtr((-t - rho * x) / spread)).sum(0)
        same = same + (density * torch.special.ndtr((rho * x - t) / spread)).sum(0)
    whole = opposite + same
    return torch.where(whole > 0, opposite / whole, 0.5).numpy()

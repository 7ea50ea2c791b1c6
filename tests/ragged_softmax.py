"""The ragged attention kernel written out, a softmax for each run, in any precision: what flash kernels must give."""

from __future__ import annotations

import torch


class RaggedSoftmax:
    """ilr_fast.flash_attention.RaggedKernel; its backward uses the given output and log-sum-exp, as flash does."""

    most_gathered = 8

    def forward(self, q, k, v, segments, scale, window):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        for rows, keys, scores, _ in runs(q, k, segments, scale, window):
            lse[:, rows] = scores.logsumexp(-1)
            weights = (scores - lse[:, rows, None]).exp()
            out[rows] = torch.einsum("hqk,khd->qhd", weights, expand(v[keys], q))
        return out, lse, None

    def backward(self, gradient, q, k, v, out, lse, state, segments, scale, window):
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (gradient * out).sum(-1).T  # [H, T]
        for rows, keys, scores, k_run in runs(q, k, segments, scale, window):
            weights = (scores - lse[:, rows, None]).exp()
            slope = torch.einsum("qhd,khd->hqk", gradient[rows], expand(v[keys], q))
            ds = weights * (slope - delta[:, rows, None]) * scale
            dq[rows] += torch.einsum("hqk,khd->qhd", ds, k_run)
            dk[keys] += folded(torch.einsum("hqk,qhd->khd", ds, q[rows]), k)
            dv[keys] += folded(torch.einsum("hqk,qhd->khd", weights, gradient[rows]), v)
        return dq, dk, dv


def runs(q, k, segments, scale, window):
    """(query rows, key rows, scores [H, Q, S] with -inf where not seen, keys expanded to all heads) of each run."""
    starts_q, starts_k = segments.starts_q.tolist(), segments.starts_k.tolist()
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        k_run = expand(k[keys], q)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k_run) * scale
        queries, size = scores.shape[1:]
        back = torch.arange(size - queries, size)[:, None] - torch.arange(size)
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        yield rows, keys, scores.masked_fill(~seen, float("-inf")), k_run


def expand(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def folded(x, like):
    return x.unflatten(1, (like.shape[1], -1)).sum(2)

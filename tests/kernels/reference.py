"""The kernels' definitions, one token at a time in float64: written for clarity, independent of the product."""

import torch


def selective_scan(x, dt, A, B, C, D, z, dt_bias, modality, document, h0=None):
    """All row tensors in time order (B, L, .), modality and document (B, L)."""
    Bn, L, _ = x.shape
    outputs, finals = [], []
    for b in range(Bn):
        h = torch.zeros_like(A) if h0 is None else h0[b]
        for t in range(L):
            new_document = t > 0 and document[b, t] != document[b, t - 1]
            if new_document or (t == 0 and h0 is None):
                h = torch.zeros_like(A)
            raw = dt[b, t] + dt_bias[modality[b, t]]
            delta = torch.log1p(torch.exp(raw))
            h = torch.exp(delta[:, None] * A) * h + (delta * x[b, t])[:, None] * B[b, t][None, :]
            y = h @ C[b, t] + D * x[b, t]
            outputs.append(y * z[b, t] / (1 + torch.exp(-z[b, t])))
        finals.append(h)
    return torch.stack(outputs).view_as(x), torch.stack(finals)


def causal_conv(x, weight, bias, document, initial=None):
    Bn, L, _ = x.shape
    K = weight.shape[1]
    outputs = []
    for b in range(Bn):
        for t in range(L):
            pre = bias
            for k in range(K):
                if t - k >= 0:
                    if document[b, t - k] == document[b, t]:
                        pre = pre + weight[:, K - 1 - k] * x[b, t - k]
                elif initial is not None and document[b, t] == document[b, 0]:
                    pre = pre + weight[:, K - 1 - k] * initial[b, K - 1 + t - k]
            outputs.append(pre / (1 + torch.exp(-pre)))
    return torch.stack(outputs).view_as(x)

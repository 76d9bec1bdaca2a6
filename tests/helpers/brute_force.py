"""InfoNCE by Python loops."""

import torch


def brute_force(a, b, scale, valid, group=None, intra=False, one_way=False, scored=False):
    """Row by row, with Python loops over what each equation names; `scored` is another way to the same."""
    n, total = len(a), 0
    rows = [i for i in range(n) if valid[i]]
    if not rows:
        return (a * 0).sum()
    for first, second in ((a, b), (b, a))[: 1 if one_way else 2]:
        for i in rows:
            others = [j for j in rows if j != i and (group is None or group[j] != group[i])]
            terms = [scale * first[i] @ second[i]] + [scale * first[i] @ second[j] for j in others]
            if intra:
                terms += [scale * first[i] @ first[k] for k in others]
            total = total - torch.log(torch.exp(terms[0]) / sum(torch.exp(t) for t in terms))
    return total / ((1 if one_way else 2) * len(rows))

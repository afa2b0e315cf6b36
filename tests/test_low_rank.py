"""Rows of low rank by tensor: every form of them against the rows written out."""

import pytest
import torch
from cases import F64, generator, normal

from nestopt_ext import _low_rank
from nestopt_ext._low_rank import ExplicitRows, LowRank, StackedRows, ZeroRows, explicit, stacked_low_rank
from nestopt_ext.curvature._example_rows import OuterRows, PickedRows, RemadeRows, SummedRows, block_of, gram_macs
from nestopt_ext.curvature._tape import OuterProducts, Picked, Rows


def outer(seed, copies, batch, positions, groups, out, features):
    """Gradients in factors, and written out."""
    left = normal(seed, copies * batch, positions, groups, out)
    right = normal(seed + 1, batch, positions, groups, features)
    rows = torch.einsum("jbtgo,btgi->jbgoi", left.view(copies, batch, positions, groups, out), right)
    return OuterProducts(left, right), rows.reshape(copies * batch, groups * out, features)


def blocks():
    """Name, block and its rows [r, *shape]."""
    sizes = {
        "one cotangent": (1, 5, 1, 1, 4, 3),
        "several cotangents": (3, 2, 1, 1, 4, 3),
        "positions": (1, 3, 4, 1, 2, 3),
        "positions, cheaper as gradients": (2, 2, 40, 1, 2, 3),
        "groups": (2, 3, 2, 3, 2, 2),
        "one output": (1, 6, 1, 1, 1, 5),
    }
    for name, size in sizes.items():
        gradients, rows = outer(1, *size)
        yield name, OuterRows(gradients, rows.shape[1:]), rows
    for name, table in (("picked", 20), ("picked, cheaper as columns", 4)):
        index = torch.randint(table, (3, 3), generator=generator(4))
        picked = Picked(normal(3, 6, 3, 2), index, table)
        rows = Picked(picked.left, index.repeat(2, 1), table).rows
        yield name, PickedRows(picked, rows.shape[1:]), rows
    rows = normal(2, 6, 4, 3)
    yield "explicit", ExplicitRows(rows), rows
    yield "of a number", ExplicitRows(normal(3, 5)), normal(3, 5)
    yield "empty", ExplicitRows(normal(3, 5, 0)), normal(3, 5, 0)
    yield "zero", ZeroRows(6, torch.Size([4, 3]), torch.device("cpu")), torch.zeros(6, 4, 3, dtype=F64)
    one, first = outer(4, 2, 3, 2, 1, 4, 3)
    other = normal(5, 6, 4, 3)
    yield "summed", SummedRows([OuterRows(one, first.shape[1:]), ExplicitRows(other)]), first + other
    yield "made anew", RemadeRows(lambda: one, 6, first[0]), first
    yield (
        "stacked",
        StackedRows([OuterRows(one, first.shape[1:]), ExplicitRows(other[:2])]),
        torch.cat([first, other[:2]]),
    )


BLOCKS = {name: (block, rows) for name, block, rows in blocks()}


def close(found, wanted):
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() if wanted.numel() else 0) <= 1e-13 * (1 + float(wanted.abs().sum()))


@pytest.mark.parametrize("pieces", [2**22, 60, 7])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_rows(name, pieces, monkeypatch):
    monkeypatch.setattr(_low_rank, "AT_ONCE", pieces)
    block, rows = BLOCKS[name]
    flat = rows.reshape(len(rows), -1)
    assert (block.count, block.shape, block.numel) == (len(rows), rows.shape[1:], flat.shape[1])
    entries = normal(6, *rows.shape[1:]).square() + 0.1
    for scale, wide in ((None, None), (0.5, 0.5), (torch.tensor(2.0, dtype=F64), 2.0), (entries, entries.reshape(-1))):
        gram = normal(7, len(rows), len(rows))
        wanted = gram + (flat if wide is None else flat * wide) @ flat.T
        block.add_gram(gram, scale)
        close(gram, wanted)
    for k in (1, 2, 5):
        v, c, onto = normal(8, k, *rows.shape[1:]), normal(9, k, len(rows)), normal(10, k, *rows.shape[1:])
        inside = normal(11, k, len(rows))
        wanted = inside + v.reshape(k, flat.shape[1]) @ flat.T
        block.add_projected(v, inside)
        close(inside, wanted)
        wanted = onto + (c @ flat).view(onto.shape)
        block.add_lifted(c, onto)
        close(onto, wanted)
    for start, stop in ((0, flat.shape[1]), (flat.shape[1] // 3, flat.shape[1] // 2), (0, min(1, flat.shape[1]))):
        if start < stop:
            close(block.columns(start, stop, F64), flat[:, start:stop])


def test_a_weight_and_its_bias_share_a_gram_matrix():
    for size in ((2, 3, 1, 1, 4, 3), (1, 4, 3, 1, 2, 5)):
        gradients, rows = outer(1, *size)
        bias = gradients.left.sum(1).flatten(1)
        gram = torch.zeros(len(rows), len(rows), dtype=F64)
        OuterRows(gradients, rows.shape[1:]).add_gram_with_bias(gram)
        close(gram, rows.flatten(1) @ rows.flatten(1).T + bias @ bias.T)


def test_sums_in_a_wider_dtype_keep_the_digits_of_single_precision():
    gradients, _ = outer(1, 2, 4, 3, 1, 30, 40)
    narrow = OuterProducts(gradients.left.float(), gradients.right.float())
    block = OuterRows(narrow, torch.Size([30, 40]))
    exact = block.columns(0, 1200, F64)
    gram = torch.zeros(8, 8, dtype=F64)
    block.add_gram(gram)
    close(gram, exact @ exact.T)
    v, c = normal(2, 1, 30, 40), normal(3, 1, 8)
    inside = torch.zeros(1, 8, dtype=F64)
    block.add_projected(v, inside)
    close(inside, v.flatten(1) @ exact.T)
    onto = torch.zeros(1, 30, 40, dtype=F64)
    block.add_lifted(c, onto)
    close(onto.flatten(1), c @ exact)


def test_uses_of_one_param_become_positions_or_a_sum():
    like = torch.empty(4, 3, dtype=F64)
    one, first = outer(1, 2, 3, 2, 1, 4, 3)
    two, second = outer(5, 2, 3, 5, 1, 4, 3)
    block = block_of([one, two], 6, like)
    assert isinstance(block, OuterRows)
    close(block.columns(0, 12, F64), (first + second).flatten(1))
    rows = normal(3, 6, 12)
    block = block_of([one, Rows(rows)], 6, like)
    assert isinstance(block, SummedRows)
    close(block.columns(0, 12, F64), first.flatten(1) + rows)
    assert isinstance(block_of([], 6, like), ZeroRows)
    assert isinstance(block_of([Rows(rows)], 6, like), ExplicitRows)


def test_positions_make_gradients_cheaper_than_products():
    assert gram_macs(64, 64, 1, 100, 100)[0] < gram_macs(64, 64, 1, 100, 100)[1]
    assert gram_macs(64, 64, 1000, 8, 9)[0] > gram_macs(64, 64, 1000, 8, 9)[1]


def test_sums_of_matrices_of_low_rank():
    shapes = [(4, 3), (5,)]
    v = [normal(20 + i, 2, *s) for i, s in enumerate(shapes)]
    parts, factors, wanted = [], [2.0, -0.5, 3.0], torch.zeros(17, 17, dtype=F64)
    for n, rank in enumerate((3, 0, 4)):
        rows = [normal(30 * n + i, rank, *s) for i, s in enumerate(shapes)]
        weights = torch.rand(rank, generator=generator(n)).double()
        diagonal = None if n == 2 else [normal(50 + n + i, *s) for i, s in enumerate(shapes)]
        parts.append(explicit(rows, weights, diagonal))
        flat = torch.cat([r.flatten(1) for r in rows], 1)
        whole = (flat.T * weights) @ flat
        wanted += factors[n] * (
            whole if diagonal is None else whole + torch.cat([d.flatten() for d in diagonal]).diag()
        )
    found = stacked_low_rank(parts, factors)
    assert isinstance(found, LowRank) and len(found.weights) == 7
    product = found.lift(found.project(v) * found.weights)
    product = [p + d * t for p, d, t in zip(product, found.diagonal, v, strict=True)]
    flat = torch.cat([t.flatten(1) for t in v], 1)
    close(torch.cat([p.flatten(1) for p in product], 1), flat @ wanted)
    rows = torch.cat([r.flatten(1) for r in found.lift(torch.eye(7, dtype=F64))], 1)
    close(found.gram(), rows @ rows.T)
    entries = [normal(60 + i, *s).square() for i, s in enumerate(shapes)]
    close(found.gram(entries), (rows * torch.cat([e.flatten() for e in entries])) @ rows.T)

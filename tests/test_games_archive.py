"""The archive of a ride: what it keeps, what a file of it holds, and its pictures."""

import math

import pytest
import torch
from cases import F64

from nestopt_ext.games import (
    Archive,
    BranchStatus,
    EigenRidges,
    LyapunovBranches,
    momentum_map,
    plot_phase_portrait,
    plot_ride_tree,
    ridge_rider,
    sgd_map,
    small_ipd,
)
from nestopt_ext.hypergrad.loop import CheckpointError


def wells(w):
    return (w**4 / 4 - torch.tensor([1.0, 1.2], dtype=w.dtype) * w**2 / 2).sum(dim=1)


@pytest.fixture(scope="module")
def deep():
    """Two generations, from a saddle and a copy of it."""
    return ridge_rider(wells, torch.zeros(2, 2, dtype=F64), EigenRidges(step=0.05, finish=0.2))


@pytest.fixture(scope="module")
def flat():
    """One generation of a game, with a start that is not finite."""
    start = torch.tensor([[0.5, 0.4], [math.nan, 0.0]], dtype=F64)
    return ridge_rider(
        sgd_map(small_ipd(batch=1), 5.0), start, LyapunovBranches(max_steps=60, ascent_steps=5), max_depth=1
    )


def fields(record):
    return [v.tolist() if isinstance(v, torch.Tensor) else v for v in vars(record).values()]


@pytest.mark.parametrize("name", ["deep", "flat"])
def test_a_file_holds_all_of_it(name, request, tmp_path):
    archive = request.getfixturevalue(name)
    archive.save(tmp_path / "ride.pt")
    loaded = Archive.load(tmp_path / "ride.pt")
    torch.testing.assert_close(loaded.starts, archive.starts, rtol=0, atol=0, equal_nan=True)
    for kind in ("bifurcations", "branches", "solutions"):
        found, wanted = getattr(loaded, kind), getattr(archive, kind)
        assert [str(fields(r)) for r in found] == [str(fields(r)) for r in wanted]
        assert all(type(a) is type(b) for a, b in zip(found, wanted, strict=True))
    assert (loaded.pending, loaded.num_steps, loaded.complete) == (archive.pending, archive.num_steps, True)
    assert loaded.table() == archive.table()
    assert repr(loaded) == repr(archive)


def test_an_empty_archive_is_saved_too(tmp_path):
    Archive().save(tmp_path / "ride.pt")
    loaded = Archive.load(tmp_path / "ride.pt")
    assert not loaded.complete
    assert loaded.solutions == []


def test_a_file_that_is_none_is_refused(tmp_path, deep):
    path = tmp_path / "ride.pt"
    with pytest.raises(CheckpointError, match="there is no such file"):
        Archive.load(path)
    deep.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        Archive.load(path)
    torch.save({"version": 2, "starts": None}, path)
    with pytest.raises(CheckpointError, match="is not an archive of a ride"):
        Archive.load(path)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("pending", None, ["x"]),
        ("pending", None, [10**6]),
        ("settings", None, []),
        ("starts", None, 3),
        ("ride", None, {}),
        ("search", None, 3),
        ("branches", None, torch.zeros(3)),
        ("branches", "id", {"rows": [], "values": []}),
        ("branches", "direction", ["x"]),
        ("branches", "status", [{"status": "best"}]),
        ("bifurcations", "parent", [10**6]),
        ("solutions", "branches", [3]),
        ("ride", "ids", [10**6]),
        ("ride", "state", 5),
        ("ride", "steps", torch.zeros(1)),
    ],
)
def test_a_file_whose_parts_do_not_go_together_is_refused(tmp_path, part, name, value):
    asked = iter([False, True])
    method = EigenRidges(step=0.2, max_steps=3)
    begun = ridge_rider(lambda w: -w.square().sum(1), torch.zeros(1, 2), method, should_stop=lambda: next(asked))
    path = tmp_path / "ride.pt"
    begun.save(path)
    state = torch.load(path, weights_only=True)
    if name is None:
        state[part] = value
    else:
        whole = state[part].get(name) if state[part] else None
        state[part] = {**state[part], name: value * len(whole) if isinstance(value, list) and whole else value}
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="is not an archive of a ride"):
        Archive.load(path)


def test_records_stand_at_their_ids_and_know_their_way(deep):
    for records in (deep.bifurcations, deep.branches, deep.solutions):
        assert [record.id for record in records] == list(range(len(records)))
    for solution in deep.solutions:
        first = deep.branches[solution.branches[0]]
        assert torch.equal(first.end, solution.state)
        assert deep.fingerprint(first.id) == solution.fingerprint
        assert all(deep.branches[i].solution == solution.id for i in solution.branches)
        assert [b.depth for b in deep.path(first.id)] == [1, 2]
    assert len(deep.solutions) == 4


def test_a_start_has_what_it_shares(deep, flat):
    assert deep.bifurcations[1].same_as == 0
    assert deep.children(1) == deep.children(0) != []
    assert len(deep.found_from(0)) == len(deep.found_from(1)) == 4
    assert len(flat.found_from(0)) == 2
    assert flat.found_from(1) == []
    assert {b.status for b in flat.bifurcations if b.start == 1} == {BranchStatus.non_finite}


def test_the_table_says_what_was_found(deep):
    lines = deep.table().splitlines()
    assert lines[0].split() == ["solution", "losses", "last", "step", "curvature", "branches", "fingerprint"]
    assert len(lines) == 5
    assert lines[1].split()[:2] == ["0", f"{deep.solutions[0].losses[0]:.4g}"]
    assert lines[1].split()[-2:] == ["0+", "0+"]


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["deep", "flat"])
def test_a_tree_is_drawn(name, request, tmp_path):
    pytest.importorskip("matplotlib")
    archive = request.getfixturevalue(name)
    plot_ride_tree(archive, tmp_path / "tree.png", title="a tree")
    assert is_png(tmp_path / "tree.png")


@pytest.mark.parametrize("make", [sgd_map, lambda game, lr: momentum_map(game, lr, 0.5)])
def test_a_portrait_is_drawn(make, flat, tmp_path):
    pytest.importorskip("matplotlib")
    step = make(small_ipd(batch=1), 5.0)
    path = tmp_path / "portrait.png"
    plot_phase_portrait(step, path, bounds=((-4, 6), (-4, 6)), archive=flat, horizon=3, resolution=11, num_steps=20)
    assert is_png(path)


def test_pictures_of_bad_arguments(flat, tmp_path):
    with pytest.raises(ValueError, match="plot_ride_tree: archive must hold at least one bifurcation"):
        plot_ride_tree(Archive(), tmp_path / "x.png")
    with pytest.raises(TypeError, match="plot_ride_tree: archive must be an Archive; got int"):
        plot_ride_tree(3, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"plot_phase_portrait: bounds\[1\] must be a smaller and a larger number"):
        plot_phase_portrait(lambda x: x, tmp_path / "x.png", bounds=((0, 1), (1, 0)))
    assert not list(tmp_path.iterdir())

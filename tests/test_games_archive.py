"""The archive of a ride: what it keeps, what a file of it holds, and its pictures."""

import dataclasses
import math

import pytest
import torch
from cases import F64

from nestopt_ext.games import (
    Archive,
    Bifurcation,
    Branch,
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
from nestopt_ext.games._ride_tree import _Layout
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


def test_the_table_says_why_branches_came_to_nothing(flat):
    start = torch.zeros(2, dtype=F64)
    assert Archive().table().splitlines()[1:] == ["nothing has been ridden yet"]
    bowl = ridge_rider(lambda w: w.square().sum(dim=1), start, EigenRidges())
    assert bowl.table().splitlines()[1:] == ["no branches: no start has a curvature below -1e-06, so no ridge"]
    shallow = ridge_rider(wells, start, EigenRidges(step=0.05), max_depth=1)
    least = min(branch.curvature[1] for branch in shallow.branches)
    reason = f"a saddle, curvature down to {least:.2g}; raise max_depth or min_curvature"
    assert shallow.table().splitlines()[1:] == [f"4 of 4 branches without a solution: {reason}"]
    outside = ridge_rider(wells, start, EigenRidges(step=0.05), divergence=0.1)
    reason = "it left the bounds; take shorter steps"
    assert outside.table().splitlines()[1:] == [f"4 of 4 branches without a solution: {reason}"]
    stopped = ridge_rider(wells, start, EigenRidges(step=0.05), max_steps=2)
    assert stopped.table().splitlines()[1:] == [
        "4 of 4 branches without a solution: it has not been ridden to its end yet"
    ]
    assert len(flat.table().splitlines()) == 1 + len(flat.solutions)


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["deep", "flat"])
def test_a_tree_is_drawn(name, request, tmp_path):
    pytest.importorskip("matplotlib")
    archive = request.getfixturevalue(name)
    plot_ride_tree(archive, tmp_path / "tree.png", title="a tree")
    assert is_png(tmp_path / "tree.png")


@pytest.fixture
def axes():
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_tree_says_where_each_branch_leads(deep, axes):
    plot_ride_tree(deep, axes=axes, labels=["a", "b", "c", "d"], title="a tree")
    names = [text for text in texts(axes) if text in "abcd"]
    assert names == ["abcd"[b.solution] for b in deep.branches if b.solution is not None]
    assert "as start 0" in texts(axes) and "start 1" in texts(axes)
    assert axes.get_legend_handles_labels()[1] == ["branching", "branched at before", "a", "b", "c", "d"]
    # every branch ends at a height of its own, and no two lines cross
    ends = [line.get_ydata()[-1] for line in axes.lines if len(line.get_xdata()) == 3]
    assert len(set(ends)) == len(ends) == len(deep.branches)


def test_a_tree_tells_what_was_not_ridden_and_what_failed(axes):
    method = EigenRidges(step=0.05, finish=0.2)
    some = ridge_rider(wells, torch.zeros(2, dtype=F64), method, max_branches=3, max_depth=1)
    some.branches[0] = dataclasses.replace(some.branches[0], status=BranchStatus.diverged)
    plot_ride_tree(some, axes=axes)
    assert axes.get_legend_handles_labels()[1] == ["branching", "not ridden yet", "failed", "no solution"]
    assert {line.get_linestyle() for line in axes.lines if len(line.get_xdata()) == 3} == {"-", "--", ":"}


def test_a_tree_may_be_deeper_than_calls_may(axes):
    place = Bifurcation(0, 0, None, torch.zeros(1), (), None, BranchStatus.completed)
    way = torch.ones(1)
    archive, count = Archive(), 1500
    archive.bifurcations = [dataclasses.replace(place, id=i, parent=i - 1 if i else None) for i in range(count)]
    archive.branches = [Branch(i, i, 0, i + 1, 0, 1, 1.0, 1.0, way, None, way, way) for i in range(count)]
    layout = _Layout(archive)
    assert layout.num_rows == 1 and set(layout.branches.values()) == {-1.0}


@pytest.mark.parametrize("make", [sgd_map, lambda game, lr: momentum_map(game, lr, 0.5)])
def test_a_portrait_is_drawn(make, flat, tmp_path):
    pytest.importorskip("matplotlib")
    step = make(small_ipd(batch=1), 5.0)
    path = tmp_path / "portrait.png"
    plot_phase_portrait(step, path, bounds=((-4, 6), (-4, 6)), archive=flat, horizon=3, resolution=11, num_steps=20)
    assert is_png(path)


def test_ways_go_from_the_bifurcation_to_the_solution(flat, axes):
    step = sgd_map(small_ipd(batch=1), 5.0)
    plot_phase_portrait(step, axes=axes, probabilities=True, archive=flat, horizon=2, resolution=5, labels=["C", "D"])
    assert axes.get_legend_handles_labels()[1] == ["branching", "start", "climb (as the crow flies)", "C", "D"]
    ways = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) > 20][1::2]  # each over a white one
    assert len(ways) == len(flat.branches)
    for way, branch in zip(ways, flat.branches, strict=True):
        source = flat.bifurcations[branch.bifurcation].state
        assert way[0].tolist() == pytest.approx(torch.sigmoid(source).tolist())
        assert way[-1].tolist() == pytest.approx(torch.sigmoid(branch.end).tolist())
    assert axes.get_xlim() == axes.get_ylim() == (0, 1)


def test_so_many_ways_are_drawn_as_can_be_told_apart(axes):
    """Of two sinks that many long spirals run into, each has one at least."""
    turn = 0.999 * torch.tensor([[math.cos(0.1), -math.sin(0.1)], [math.sin(0.1), math.cos(0.1)]])

    def step(w):
        centre = torch.stack([2 * torch.sign(w[:, 0]), torch.zeros_like(w[:, 0])], dim=1)
        return centre + (w - centre) @ turn.T

    starts = torch.tensor([[side * (2 + 0.01 * i), 1.0] for side in (-1, 1) for i in range(20)])
    method = LyapunovBranches(max_steps=2000, ascent_steps=0, sizes=(0.1,))
    found = ridge_rider(step, starts, method, max_depth=1, distance=1.0)
    plot_phase_portrait(step, axes=axes, bounds=[(-4, 4), (-2, 2)], archive=found, resolution=5)
    ways = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) > 100][1::2]
    assert len(found.solutions) == 2 and len(found.branches) == 80
    assert 2 <= len(ways) < 20
    assert {way[-1, 0] > 0 for way in ways} == {False, True}


class Agree:
    """Two players in float32, who want the same sign."""

    def __init__(self):
        self.players = [torch.zeros(1, requires_grad=True) for _ in range(2)]

    def losses(self, players):
        return [-(torch.tanh(players[0]) * torch.tanh(players[1])).sum()] * 2


@pytest.mark.parametrize("make", [sgd_map, lambda game, lr: momentum_map(game, lr, 0.5)])
def test_a_portrait_of_a_float32_map_is_drawn(make, tmp_path):
    pytest.importorskip("matplotlib")
    step = make(Agree(), 0.5)
    found = ridge_rider(step, None, LyapunovBranches(max_steps=20, ascent_steps=2, sizes=(0.5,)), max_depth=1)
    shift = torch.tensor([0.1, 0.2])  # a function knows no dtype but that of its constants
    plane = ridge_rider(lambda w: w @ torch.eye(2) + shift, torch.zeros(2), LyapunovBranches(max_steps=3), max_depth=1)
    for name, drawn, archive in (("game", step, found), ("map", lambda w: w @ torch.eye(2) + shift, plane)):
        plot_phase_portrait(drawn, tmp_path / name, bounds=((-2, 2), (-2, 2)), archive=archive, resolution=5)
        assert is_png(tmp_path / name)


def test_a_map_may_take_a_gradient_of_its_own(tmp_path):
    def step(w):
        with torch.enable_grad():
            w = w if w.requires_grad else w.detach().requires_grad_()
            return w - 0.2 * torch.autograd.grad(wells(w).sum(), w, create_graph=True)[0]

    def closed_form(w):
        return w - 0.2 * (w**3 - torch.tensor([1.0, 1.2], dtype=w.dtype) * w)

    for problem, method in (
        (wells, EigenRidges(step=0.05, finish=step)),
        (None, LyapunovBranches(max_steps=30, ascent_steps=2, num_directions=2, sizes=(0.5, 1.0))),
    ):
        start = torch.full((2,), 0.1 if problem is None else 0.0, dtype=F64)
        found = ridge_rider(problem or step, start, method, key="parameters", max_depth=2)
        plain = dataclasses.replace(method, finish=closed_form) if problem else method
        wanted = ridge_rider(problem or closed_form, start, plain, key="parameters", max_depth=2)
        assert len(found.branches) == len(wanted.branches) > 4
        for branch, other in zip(found.branches, wanted.branches, strict=True):
            assert not branch.end.requires_grad
            torch.testing.assert_close(branch.end, other.end)
    pytest.importorskip("matplotlib")
    plot_phase_portrait(step, tmp_path / "map", bounds=((-2, 2), (-2, 2)), archive=found, resolution=5)
    assert is_png(tmp_path / "map")


def test_the_legend_of_a_portrait_names_what_is_drawn(deep):
    matplotlib = pytest.importorskip("matplotlib.figure")
    axes = matplotlib.Figure().subplots()
    descent = sgd_map(small_ipd(batch=1), 5.0)
    plot_phase_portrait(descent, axes=axes, bounds=((-2, 2), (-2, 2)), archive=deep, resolution=5)
    names = axes.get_legend_handles_labels()[1]
    assert names[:2] == ["branching", "no solution"]  # the first generation ends at saddles; no start beside a diamond
    assert len(names) == 2 + len(deep.solutions)


def test_pictures_of_bad_arguments(flat, tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match="plot_ride_tree: archive must hold at least one bifurcation"):
        plot_ride_tree(Archive(), path)
    with pytest.raises(TypeError, match="plot_ride_tree: archive must be an Archive; got int"):
        plot_ride_tree(3, path)
    with pytest.raises(ValueError, match="plot_ride_tree: path must be given, or axes to draw into; got neither"):
        plot_ride_tree(flat)
    with pytest.raises(ValueError, match="plot_ride_tree: labels must be one for each of 2 solutions; got 1"):
        plot_ride_tree(flat, path, labels=["C"])
    with pytest.raises(ValueError, match=r"plot_phase_portrait: bounds\[1\] must be a smaller and a larger number"):
        plot_phase_portrait(lambda x: x, path, bounds=((0, 1), (1, 0)))
    with pytest.raises(ValueError, match="plot_phase_portrait: bounds must be given unless in probabilities"):
        plot_phase_portrait(lambda x: x, path)
    with pytest.raises(ValueError, match=r"bounds\[0\]\[1\] must be a probability; got 2"):
        plot_phase_portrait(lambda x: x, path, bounds=((0, 2), (0, 1)), probabilities=True)
    assert not list(tmp_path.iterdir())

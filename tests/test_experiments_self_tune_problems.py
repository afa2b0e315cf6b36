"""What self-tuning runs are made of: networks, hyperparameters, text, searches."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from nestopt_ext.experiments.data import DataError, Part
from nestopt_ext.experiments.formats import FormatError
from nestopt_ext.experiments.self_tune import METHODS, SelfTuneConfig, make_problem, models, self_tune, space, text
from nestopt_ext.experiments.self_tune.batches import Chunks, Shuffled
from nestopt_ext.experiments.self_tune.loop_learner import LoopLearner
from nestopt_ext.experiments.self_tune.response_learner import ResponseLearner
from nestopt_ext.experiments.self_tune.search import Unavailable, make_search
from nestopt_ext.experiments.tune import Interrupted

WORDS = "the cat sat on the mat and the dog sat on the cat while the mat sat still"


@pytest.fixture
def corpus_dir(tmp_path):
    for part, lines in (("train", 6), ("valid", 3), ("test", 3)):
        (tmp_path / f"ptb.{part}.txt").write_text(f" {WORDS} \n" * lines)
    return tmp_path


# Networks


@pytest.mark.parametrize(
    ("name", "shape", "width", "parameters", "rates"),
    [
        # The published sizes, counted by hand: weights and biases of every layer.
        ("mlp", (1, 28, 28), 1200, 784 * 1200 + 1200 + 1200 * 1200 + 1200 + 12010, 3),
        ("simple-cnn", (1, 28, 28), 16, 416 + 12832 + 1568 * 1568 + 1568 + 15690, 4),
        (
            "alexnet",
            (3, 32, 32),
            64,
            1792 + 110784 + 663936 + 884992 + 590080 + 1024 * 4096 + 4096 + 4096 * 4096 + 4096 + 40970,
            8,
        ),
        ("vgg16", (3, 32, 32), 64, 14714688 + 2 * 4224 + 2 * (512 * 512 + 512) + 5130, 8),
        ("resnet18", (3, 32, 32), 64, 11173962, 5),
    ],
)
def test_networks_have_their_published_sizes(name, shape, width, parameters, rates):
    with torch.device("meta"):
        model = models.build(name, shape, 10, width, shift=0.0, scale=1.0, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(models.dropouts(model)) == rates


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28)])
def test_networks_fit_pictures_of_any_size(name, shape):
    model = models.build(name, shape, 7, 2, shift=0.5, scale=2.0, seed=3).eval()
    x = torch.rand(2, *shape)
    assert model(x).shape == (2, 7)
    again = models.build(name, shape, 7, 2, shift=0.5, scale=2.0, seed=3).eval()
    assert torch.equal(model(x), again(x))
    shifted = models.build(name, shape, 7, 2, shift=0.0, scale=1.0, seed=3).eval()
    torch.testing.assert_close(shifted((x - 0.5) / 2), model(x))


class Coloured:
    """A few pictures of 16x16 in colours."""

    def __call__(self, name, data_dir):
        from nestopt_ext.experiments.data import CIFAR10_CLASSES, Dataset

        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator).numpy()
        labels = torch.arange(40).remainder(10).numpy()
        return Dataset(name, CIFAR10_CLASSES, 255, images, labels, images[:10], labels[:10])


@pytest.fixture
def coloured(monkeypatch):
    monkeypatch.setattr("nestopt_ext.experiments.data.load", Coloured())


@pytest.mark.parametrize(
    ("model", "count"), [("mlp", 3), ("simple-cnn", 6), ("alexnet", 18), ("vgg16", 18), ("resnet18", 15)]
)
def test_every_network_takes_a_step_of_every_kind(coloured, model, count):
    config = SelfTuneConfig(data="cifar10", model=model, width=2, batch_size=16, warmup=0, train_steps=1).resolved()
    problem = make_problem(config)
    assert len(problem.space) == count
    assert [len(part) for part in (problem.split.train, problem.split.valid, problem.split.test)] == [32, 8, 10]
    for learner in (
        ResponseLearner(problem, "delta-stn"),
        ResponseLearner(problem, "stn"),
        LoopLearner(problem, {d.name: d.start for d in problem.space}),
        LoopLearner(problem, tuned=True),
    ):
        weights = [p for p in learner_model(learner).general_parameters() if p.dim() > 1]
        before = [p.detach().clone() for p in weights]
        learner.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        scores = learner.scores()
        assert math.isfinite(scores["valid_loss"]) and 0 <= scores["test_accuracy"] <= 1


def learner_model(learner):
    return learner.model if isinstance(learner, LoopLearner) else learner.trainer.model


def test_pixels_lie_between_0_and_1_and_are_standardized_inside(coloured):
    problem = make_problem(SelfTuneConfig(data="cifar10", model="mlp", width=2).resolved())
    x = problem.split.train.x
    assert x.min() == 0 and x.max() == 1
    standardized = problem.plain[0](x)
    assert standardized.mean().abs() < 1e-5 and standardized.std() == pytest.approx(1, abs=1e-4)


# Hyperparameters


def test_hyperparameters_start_where_they_should_and_stay_in_their_range():
    dimensions = [*space.rates(["p"]), *space.cutout(32), *space.colours(), *space.affine(), *space.activation()]
    dimensions += [space.extra(name) for name in space.EXTRAS]
    hparams = space.hyper_parameters(dimensions, 1.0, torch.device("cpu"))
    assert {n: v.item() for n, v in hparams.values().items()} == pytest.approx({d.name: d.start for d in dimensions})
    for end in (0, 1):
        values = space.inside(dimensions, {d.name: d.search[end] for d in dimensions})
        hparams.assign(values)
        found = {n: v.item() for n, v in hparams.values().items()}
        assert found == pytest.approx(values, rel=1e-3, abs=1e-6)
        assert all(abs(values[d.name] - d.search[end]) <= 1e-3 * (d.search[1] - d.search[0]) for d in dimensions)
    assert (dimensions[1].start, dimensions[1].low, dimensions[1].high) == (4, 2, 24)


@pytest.mark.parametrize("method", ["random", "tpe", "gp", "grid"])
def test_searches_stay_in_range_and_do_not_depend_on_torch(method):
    pytest.importorskip("optuna")
    dimensions = [*space.rates(["p"]), *space.cutout(32), space.extra("weight-decay")]

    def asked(seed):
        search, found = make_search(method, dimensions, 12, 3), []
        for number in range(12):
            torch.manual_seed(seed + number)
            found.append(search.ask())
            search.tell(None if number == 2 else (found[-1]["p"] - 0.4) ** 2)
        return found

    found = asked(0)
    assert found == asked(100)
    for values in found:
        assert all(d.search[0] <= values[d.name] <= d.search[1] for d in dimensions)
        assert values["cutout_holes"] == int(values["cutout_holes"])
    assert len({tuple(values.values()) for values in found}) == 12
    if method == "gp":  # it has learned where the minimum is
        assert abs(found[-1]["p"] - 0.4) < 0.1


def test_a_grid_is_gone_through_once():
    search = make_search("grid", space.rates(["p", "q"]), 10, 0)
    found = []
    while not search.exhausted:
        found.append(tuple(search.ask().values()))
        search.tell(1.0)
    assert sorted(found) == [(p, q) for p in (0, 0.375, 0.75) for q in (0, 0.375, 0.75)] and found != sorted(found)
    many = make_search("grid", space.rates(map(str, range(18))), None, 0)  # 3^18 points
    assert set(many.ask().values()) == {0, 0.375, 0.75} and not many.exhausted


def test_gp_without_scipy_is_refused(monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr("nestopt_ext.experiments.self_tune.search.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="needs SciPy"):
        make_search("gp", space.rates(["p"]), 10, 0)


# Batches


def test_batches_are_the_part_in_a_new_order_each_time():
    part = Part(torch.arange(7.0), torch.arange(7))
    batches = Shuffled(part, 3, seed=1)
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 3 and [len(y) for _, y in first] == [3, 3, 1]
    orders = [torch.cat([y for _, y in epoch]) for epoch in (first, second)]
    assert not torch.equal(*orders) and all(sorted(order.tolist()) == list(range(7)) for order in orders)
    assert all(torch.equal(x, y.float()) for x, y in first)


# Text


def test_corpus_is_read_as_words_with_an_end_of_each_line(corpus_dir):
    corpus = text.read_corpus(corpus_dir)
    assert corpus.vocabulary == ("the", "cat", "sat", "on", "mat", "and", "dog", "while", "still", "<eos>")
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [6 * 19, 3 * 19, 3 * 19]
    assert [corpus.vocabulary[n] for n in corpus.valid[:19].tolist()] == [*WORDS.split(), "<eos>"]
    (corpus_dir / "ptb.test.txt").write_text("the bird sat\n")
    with pytest.raises(FormatError, match=r"ptb\.test\.txt.*'bird'"):
        text.read_corpus(corpus_dir)
    (corpus_dir / "ptb.train.txt").write_text(f"{WORDS} <unk>\n")
    assert text.read_corpus(corpus_dir).test.tolist() == [0, 9, 2, 10]


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe\x00", "must be a text"), (b" \n\n", "must hold words")])
def test_a_file_that_is_no_text_is_refused(corpus_dir, content, message):
    (corpus_dir / "ptb.valid.txt").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        text.read_corpus(corpus_dir)


def test_missing_text_is_said(corpus_dir):
    (corpus_dir / "ptb.valid.txt").unlink()
    for place, message in ((None, "needs --data-dir"), (corpus_dir, r"no ptb\.valid\.txt")):
        with pytest.raises(DataError, match=message):
            text.read_corpus(place)
    (corpus_dir / "ptb.valid.txt").write_text("the cat\n")
    with pytest.raises(DataError, match="too short for 40 columns"):
        make_problem(SelfTuneConfig(data="ptb", data_dir=str(corpus_dir)).resolved())


def test_chunks_cover_a_text_once():
    columns = text.columns(torch.arange(23), 2)
    assert columns.shape == (11, 2)
    chunks = Chunks(columns, 4)
    found = list(chunks)
    assert len(chunks) == len(found) == 3
    assert torch.equal(torch.cat([x for x, _ in found]), columns[:-1])
    assert torch.equal(torch.cat([y for _, y in found]), columns[1:])


@pytest.fixture
def language(corpus_dir):
    return SelfTuneConfig(
        method=("delta-stn",),
        data="ptb",
        data_dir=str(corpus_dir),
        width=6,
        batch_size=3,
        bptt=7,
        epochs=2,
        warmup=1,
        lr=1.0,
        hyper_lr=0.1,
        trials=1,
    ).resolved()


def test_every_method_tunes_the_language_model(language):
    pytest.importorskip("optuna")
    result = self_tune(dataclasses.replace(language, method=METHODS[:6]))
    for method in result.methods:
        assert method.skipped is None
        assert all(point["valid_loss"] < math.log(10) for point in method.points)  # that of ten words alike
    assert result.method("ift").fixed == ["dropout_embedding", "dropconnect"]
    start, end = ({d.name: d.start for d in result.problem.space}, result.method("ift").final["values"])
    moved = {name for name in start if end[name] != pytest.approx(start[name], rel=1e-4)}
    assert moved == set(start) - {"dropout_embedding", "dropconnect"}


@pytest.mark.parametrize("method", ["delta-stn", "ift"])
def test_the_language_model_continues_bit_for_bit(language, tmp_path, method):
    config = dataclasses.replace(language, method=(method,))
    whole = self_tune(config)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        self_tune(config, tmp_path, should_stop=lambda: next(asked))
    resumed = self_tune(config, tmp_path, resume=True)
    for point, other in zip(whole.methods[0].points, resumed.methods[0].points, strict=True):
        assert {**point, "seconds": 0} == {**other, "seconds": 0}


def test_the_state_is_carried_from_chunk_to_chunk(language):
    problem = make_problem(language)
    model = problem.model().eval()
    with torch.no_grad(), model.at_centre():
        (whole, *_), targets, _ = problem.forward(model, (problem.train[:-1], problem.train[1:]), None)
        carry, parts = None, []
        for batch in problem.train_batches():
            (logits, *_), _, carry = problem.forward(model, batch, carry)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts), whole)
    loss = torch.nn.functional.cross_entropy(whole.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(problem.valid_criterion()((whole,), targets), loss)


def test_perplexity_is_what_the_table_shows(language):
    from nestopt_ext.experiments.self_tune.report import tables

    result = self_tune(dataclasses.replace(language, epochs=1, method=("delta-stn",)))
    (header, rows), _ = tables(result)
    assert header[4] == "valid perplexity" and rows[0][4] == f"{math.exp(result.methods[0].best['valid_loss']):.2f}"


def test_corpus_is_found_where_the_archive_unpacks_it(corpus_dir):
    inner = corpus_dir / "simple-examples" / "data"
    inner.mkdir(parents=True)
    for path in corpus_dir.glob("ptb.*"):
        path.rename(inner / path.name)
    assert len(text.read_corpus(Path(corpus_dir)).vocabulary) == 10

"""The response LSTM against a cell written out, torch's LSTM, forward AD and the double-backward construction."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from nestopt_ext.response import DeltaStnLSTM, DeltaStnTrainer, HyperParameters, Sample, StnLSTM, StnModel, using_sample
from nestopt_ext.response.dropconnect import dropped_weight

N, T, B, IN, H = 3, 4, 3, 3, 2
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
OPTIONS = {
    "one-layer": {},
    "two-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "two-layers-first-no-bias": {"num_layers": 2, "batch_first": True, "bias": False},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def make(options, dtype=torch.float64, layer=StnLSTM, **more):
    """An LSTM with a response that differs from zero, an input and a state."""
    lstm = layer(IN, H, **options, **more, dtype=dtype, num_hparams=N)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            if name.startswith("gate_weight"):
                parameter.normal_()
    x = torch.randn((B, T, IN) if lstm.batch_first else (T, B, IN), dtype=dtype)
    cells = lstm.num_layers * (2 if lstm.bidirectional else 1)
    return lstm, x, tuple(torch.randn(cells, B, H, dtype=dtype) for _ in range(2))


def defined(lstm, params, x, state, h):
    """Example by example, with effective weights, step by step as the equations stand."""
    x = x.transpose(0, 1) if lstm.batch_first else x
    outputs, h_n, c_n = [], [], []
    for b, gate_input in enumerate(h.expand(B, N)):
        layer_input, place = list(x[:, b]), 0
        h_ends, c_ends = [], []
        for layer in range(lstm.num_layers):
            ways = []
            for way in ("", "_reverse")[: 1 + lstm.bidirectional]:
                maps = {}
                for part in ("ih", "hh"):
                    name = f"{part}_l{layer}{way}"
                    gates = params[f"gate_weight_{name}"] @ gate_input
                    w = params[f"weight_{name}"] + gates[: 4 * H, None] * params[f"response_weight_{name}"]
                    bias = torch.zeros_like(w[:, 0])
                    if lstm.bias:
                        bias = params[f"bias_{name}"] + gates[4 * H :] * params[f"response_bias_{name}"]
                    maps[part] = (w, bias)
                h_t, c_t = state[0][place, b], state[1][place, b]
                hidden = []
                for x_t in reversed(layer_input) if way else layer_input:
                    z = sum(w @ v + bias for (w, bias), v in zip(maps.values(), (x_t, h_t), strict=True))
                    i, f, g, o = z.reshape(4, H)
                    c_t = f.sigmoid() * c_t + i.sigmoid() * g.tanh()
                    h_t = o.sigmoid() * c_t.tanh()
                    hidden.append(h_t)
                ways.append(hidden[::-1] if way else hidden)
                h_ends.append(h_t)
                c_ends.append(c_t)
                place += 1
            layer_input = [torch.cat(both) for both in zip(*ways, strict=True)]
        outputs.append(torch.stack(layer_input))
        h_n.append(torch.stack(h_ends))
        c_n.append(torch.stack(c_ends))
    output = torch.stack(outputs, 1)
    return [output.transpose(0, 1) if lstm.batch_first else output, torch.stack(h_n, 1), torch.stack(c_n, 1)]


def flat(answer):
    output, (h_n, c_n) = answer
    return [output, h_n, c_n]


def with_gradients(outputs, sources):
    """Outputs, and the gradients of a fixed random combination of all their elements."""
    torch.manual_seed(1)
    total = sum((torch.randn_like(y) * y).sum() for y in outputs)
    found = torch.autograd.grad(total, sources, allow_unused=True)
    return [*outputs, *[torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]]


def assert_close(found, wanted, dtype=torch.float64):
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape and f.dtype == w.dtype
        torch.testing.assert_close(f, w, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * (1 + w.abs().max().item()))


@each_dtype
@each_option
@pytest.mark.parametrize("rows", [B, 1])
def test_output_and_gradients_are_those_of_the_definition(options, dtype, rows):
    lstm, x, state = make(options, dtype)
    h = torch.randn(rows, N, dtype=dtype, requires_grad=True)
    sources = [x.requires_grad_(), *(s.requires_grad_() for s in state), h, *lstm.parameters()]
    found = with_gradients(flat(lstm(x, state, h)), sources)
    assert_close(found, with_gradients(defined(lstm, dict(lstm.named_parameters()), x, state, h), sources), dtype)
    if rows == 1:
        lstm.fused = True
        for training in (True, False):
            assert_close(with_gradients(flat(lstm.train(training)(x, state, h)), sources), found, dtype)


@each_option
@pytest.mark.parametrize("layer", [StnLSTM, DeltaStnLSTM])
@pytest.mark.parametrize("fused", [True, False])
def test_without_a_response_it_is_the_plain_lstm(options, layer, fused):
    lstm, x, state = make(options, layer=layer, fused=fused)
    plain = nn.LSTM(IN, H, **options, dtype=x.dtype)
    found = lstm.load_state_dict(plain.state_dict(), strict=False)
    assert found.unexpected_keys == [] and all(k.startswith(("response_", "gate_weight_")) for k in found.missing_keys)
    for hx in (state, None):
        wanted = flat(plain(x, hx))
        for rows in (1, B):
            assert_close(flat(lstm(x, hx, x.new_zeros(rows, N))), wanted)
        assert_close(flat(lstm(x, hx)), wanted)
        with using_sample(Sample(None, {}, linearized=True)):
            assert_close(flat(lstm(x, hx)), wanted)


@each_option
@pytest.mark.parametrize(
    ("dtype", "moves"),
    [(torch.float32, "everything"), *((torch.float64, moves) for moves in ("everything", "gates", "input", "state"))],
    ids=str,
)
def test_linearized_is_the_jvp_in_input_state_and_gate_input(options, dtype, moves):
    lstm, x, state = make(options, dtype, DeltaStnLSTM)
    points = {"x": x, "h_0": state[0], "c_0": state[1], "h": x.new_zeros(B, N)}
    moving = {"everything": points, "gates": ["h"], "input": ["x"], "state": ["c_0"]}[moves]
    along = {name: torch.randn_like(points[name], requires_grad=True) for name in moving}
    sources = [*along.values(), *(points[name].requires_grad_() for name in ("x", "h_0", "c_0")), *lstm.parameters()]

    def at(*values):
        p = {**points, **dict(zip(along, values, strict=True))}
        return flat(lstm(p["x"], (p["h_0"], p["c_0"]), p["h"]))

    with forward_ad.dual_level(), using_sample(Sample(along.get("h"), {}, linearized=True)):
        given = {n: forward_ad.make_dual(p, along[n]) if n in along else p for n, p in points.items()}
        y = [forward_ad.unpack_dual(t) for t in flat(lstm(given["x"], (given["h_0"], given["c_0"])))]
        found = with_gradients([t.primal for t in y] + [t.tangent for t in y], sources)
    start = [points[name] for name in along]
    primals, moved = jvp(at, tuple(start), tuple(along.values()))
    assert_close(found, with_gradients(primals + moved, sources), dtype)
    zeros = [torch.zeros_like(p, requires_grad=True) for p in start]
    y = at(*(p + z for p, z in zip(start, zeros, strict=True)))
    v = [torch.zeros_like(t, requires_grad=True) for t in y]
    pulled = torch.autograd.grad(y, zeros, v, create_graph=True)
    moved = torch.autograd.grad(pulled, v, list(along.values()), create_graph=True)
    assert_close(found, with_gradients([*y, *moved], sources), dtype)


@pytest.mark.parametrize("linearized", [False, True])
def test_twice_differentiable(linearized):
    lstm, x, state = make({}, num_layers=2)
    names, values = zip(*lstm.named_parameters(), strict=True)
    h = torch.randn(B, N, dtype=x.dtype, requires_grad=True)

    def call(x, h_0, c_0, h, *values):
        params = dict(zip(names, values, strict=True))
        if not linearized:
            return tuple(flat(functional_call(lstm, params, (x, (h_0, c_0), h))))
        with forward_ad.dual_level(), using_sample(Sample(h, {}, linearized=True)):
            y = flat(functional_call(lstm, params, (x, (h_0, c_0))))
            return tuple(sum(forward_ad.unpack_dual(t)) for t in y)

    inputs = (x[:2].requires_grad_(), *(s.requires_grad_() for s in state), h, *values)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=not linearized, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_the_response_step_has_no_weight_gradients_inside_the_recurrence():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm")
            return func(*args, **(kwargs or {}))

    lstm, x, _ = make({}, layer=DeltaStnLSTM)
    for name, parameter in lstm.named_parameters():
        parameter.requires_grad_(name.startswith("response_"))
    with Products() as products:
        with forward_ad.dual_level(), using_sample(Sample(torch.randn(B, N, dtype=x.dtype), {}, linearized=True)):
            primal, tangent = forward_ad.unpack_dual(lstm(x)[0])
        assert not primal.requires_grad
        tangent.sum().backward()
    gates, for_all_steps = 4, 5  # W x, V x, V h; two gradients of V
    assert products.count == gates + for_all_steps + T + 2 * (T - 1)  # W h; W dh and its transpose


# ---- which calls torch's kernel takes --------------------------------------------------------------------------------


@pytest.fixture
def kernel_calls(monkeypatch):
    calls = []
    kernel = torch.lstm
    monkeypatch.setattr(torch, "lstm", lambda *args: calls.append(1) or kernel(*args))
    return calls


def test_the_kernel_takes_what_is_differentiated_no_further(kernel_calls):
    """The general step of the trainer, and evaluations; each with the numbers of the cells."""
    lstm, x, _ = make({}, layer=DeltaStnLSTM)
    model = StnModel(lstm, HyperParameters(dtype=x.dtype).add("a", [0.1] * N, shape=(N,)), centred=True)

    def answer(first_order, fused):
        lstm.fused = fused
        with model.at_centre(first_order=first_order):
            output = model(x)[0]
        return [output, *torch.autograd.grad(output.square().sum(), list(model.general_parameters()))]

    by_kernel = answer(True, None)
    assert len(kernel_calls) == 1
    assert_close(by_kernel, answer(True, False))
    answer(False, None)
    for unconstrained in (model.hparams.unconstrained, model.hparams.perturbed(B)):
        lstm.fused = None
        with model.at(unconstrained):
            model(x)
    model.eval()
    model(x)  # with a graph to the hyperparameters
    assert len(kernel_calls) == 1
    wanted = answer(False, None)[0]
    with torch.no_grad():
        lstm.fused = None
        assert_close([model(x)[0]], [wanted])
        assert len(kernel_calls) == 2
        with forward_ad.dual_level(), model.at_centre():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            assert forward_ad.unpack_dual(model(dual)[0]).tangent is not None
        torch.func.vmap(lambda row: lstm(row.unsqueeze(1), gate_input=row.new_zeros(N)), 1)(x)
    assert len(kernel_calls) == 2


def test_the_trainer_lets_the_kernel_take_its_general_step(kernel_calls):
    def trained(fused):
        torch.manual_seed(0)
        lstm, x, _ = make({}, layer=DeltaStnLSTM, fused=fused)
        model = StnModel(lstm, HyperParameters(dtype=x.dtype).add("a", [0.1] * N, shape=(N,)), centred=True)

        def forward(model, batch, carry):
            output, carry = model(batch, carry)
            return output, batch, carry

        trainer = DeltaStnTrainer(
            model, lambda output, target: output.square().mean(), [x, x], [x], forward=forward, warmup_epochs=0,
            train_steps=1, generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
        for _ in range(3):
            trainer.advance()
        return [*model.parameters()]

    found = trained(None)
    assert len(kernel_calls) == 3  # two general steps, and the evaluation at the end of the epoch
    assert_close(found, trained(False))
    assert len(kernel_calls) == 3


# ---- dropout --------------------------------------------------------------------------------------------------------


def seeded(call):
    torch.manual_seed(3)
    return call()


@each_option
@pytest.mark.parametrize("fused", [True, False])
def test_dropped_weights_are_those_of_a_plain_lstm_with_dropped_weights(options, fused):
    lstm, x, state = make(options, weight_dropout="rate", fused=fused)
    sample = Sample(torch.randn(1, N, dtype=x.dtype), {"rate": x.new_tensor([0.4])})
    with using_sample(sample):
        found = seeded(lambda: flat(lstm(x, state)))
    plain = nn.LSTM(IN, H, **options, dtype=x.dtype)
    at = {r.name: r.at(sample.gate_input[0]) for r in lstm.responses()}
    torch.manual_seed(3)
    for name in [name for name in at if name.startswith("weight_hh")]:
        at[name] = dropped_weight(at[name], p=torch.tensor(0.4, dtype=x.dtype))[0]
    assert_close(found, flat(functional_call(plain, at, (x, state))))
    lstm.eval()
    with using_sample(sample):
        assert_close(flat(lstm(x, state)), flat(lstm(x, state, sample.gate_input)))


def test_dropped_weights_are_the_same_for_each_example_and_in_the_linearization():
    lstm, x, _ = make({"num_layers": 2}, layer=DeltaStnLSTM, weight_dropout="rate")
    h = torch.randn(B, N, dtype=x.dtype)
    values = {"rate": torch.full((B,), 0.5, dtype=x.dtype)}

    def at(h):
        with using_sample(Sample(h, values)):
            return seeded(lambda: lstm(x)[0])

    one_by_one = torch.cat([at(h_b[None])[:, [b]] for b, h_b in enumerate(h)], 1)
    assert_close([at(h)], [one_by_one])
    with forward_ad.dual_level(), using_sample(Sample(h, values, linearized=True)):
        y = forward_ad.unpack_dual(seeded(lambda: lstm(x)[0]))
    assert_close(y, jvp(at, (torch.zeros_like(h),), (h,)))


def test_dropout_between_layers_is_that_of_torch_and_not_behind_the_last():
    lstm, x, _ = make({"num_layers": 2, "dropout": 1.0})
    first = StnLSTM(H, H, dtype=x.dtype, num_hparams=N)
    first.load_state_dict({k.replace("_l1", "_l0"): v for k, v in lstm.state_dict().items() if k.endswith("_l1")})
    h = torch.randn(B, N, dtype=x.dtype)
    assert_close([lstm(x, None, h)[0]], [first(x.new_zeros(T, B, H), None, h)[0]])
    lstm.dropout = 0.5
    ones = seeded(lambda: lstm(x, None, h)[0])
    assert not torch.allclose(ones, lstm.eval()(x, None, h)[0])


# ---- what torch's layer does, this does -----------------------------------------------------------------------------


@each_option
def test_copies_pickles_state_dicts_and_conversions(options):
    lstm, x, state = make(options)
    h = torch.randn(B, N, dtype=x.dtype)
    wanted = flat(lstm(x, state, h))
    other, _, _ = make(options)
    other.load_state_dict(lstm.state_dict())
    for copied in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), other):
        assert_close(flat(copied(x, state, h)), wanted)
    y = copy.deepcopy(lstm).to(torch.float32)(x.float(), tuple(s.float() for s in state), h.float())[0]
    assert y.dtype == torch.float32
    half = h.float()
    with torch.autocast("cpu", torch.bfloat16):
        lstm.float()
        states = tuple(s.float() for s in state)
        for answer in (lstm(x.float(), states, half), lstm(x.float(), states)):
            assert all(t.dtype == torch.bfloat16 for t in flat(answer))
        with forward_ad.dual_level(), using_sample(Sample(half, {}, linearized=True)):
            moving = tuple(forward_ad.make_dual(s, torch.ones_like(s)) for s in states)
            dual = [forward_ad.unpack_dual(t) for t in flat(lstm(x.float(), moving))]
        assert all(t.primal.dtype == t.tangent.dtype == torch.bfloat16 for t in dual)
        assert (lstm(x.float(), states, half)[0] - wanted[0]).abs().max() < 0.1


def test_vmap_over_gate_inputs_and_over_networks():
    lstm, x, state = make({"num_layers": 2})
    h = torch.randn(2, B, N, dtype=x.dtype)
    found = vmap(lambda h: flat(lstm(x, state, h)))(h)
    assert_close(found, [torch.stack(t) for t in zip(*(flat(lstm(x, state, h_i)) for h_i in h), strict=True)])
    other, _, _ = make({"num_layers": 2})
    stacked, _ = torch.func.stack_module_state([lstm, other])
    found = vmap(lambda params, h: functional_call(lstm, params, (x, state, h))[0])(stacked, h)
    assert_close([found], [torch.stack([lstm(x, state, h[0])[0], other(x, state, h[1])[0]])])


@each_option
def test_one_example_without_a_dimension_for_it(options):
    lstm, x, state = make(options)
    h = torch.randn(N, dtype=x.dtype)
    batch_dim = 0 if lstm.batch_first else 1
    wanted = flat(lstm(x, state, h))
    found = flat(lstm(x.select(batch_dim, 0), tuple(s[:, 0] for s in state), h))
    assert_close(found, [wanted[0].select(batch_dim, 0), wanted[1][:, 0], wanted[2][:, 0]])


def test_no_examples():
    lstm, x, _ = make({})
    output, (h_n, _) = lstm(x[:, :0], None, x.new_zeros(0, N))
    assert output.shape == (T, 0, H) and h_n.shape == (1, 0, H)


def test_responses_name_every_parameter_of_the_plain_lstm():
    lstm, _, _ = make({"bidirectional": True})
    names = [r.name for r in lstm.responses()]
    assert sorted(names) == sorted(k for k, _ in nn.LSTM(IN, H, bidirectional=True).named_parameters())
    assert repr(StnLSTM(2, 3, num_layers=2, num_hparams=N)) == "StnLSTM(2, 3, num_layers=2, num_hparams=3)"


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_what_makes_no_call_is_refused():
    lstm, x, state = make({})
    short = partial(torch.zeros, dtype=x.dtype)
    with pytest.raises(ValueError, match=r"StnLSTM: gate_input must .* or \(3, 3\); got \(4, 3\).*dimension 1"):
        lstm(x, state, short(4, N))
    with pytest.raises(ValueError, match=r"StnLSTM: input must have shape \(T, B, 3\) .*; got \(4, 3, 2\)"):
        lstm(short(4, B, 2))
    with pytest.raises(ValueError, match=r"got \(0, 3, 3\)"):
        lstm(short(0, B, IN))
    with pytest.raises(ValueError, match=r"h_0 must have shape .* \(1, 3, 2\); got \(1, 1, 2\)"):
        lstm(x, (state[0][:, :1], state[1]))
    with pytest.raises(ValueError, match=r"c_0 must have shape .* \(1, 3, 2\); got \(2, 3, 2\)"):
        lstm(x, (state[0], short(2, B, H)))
    with pytest.raises(TypeError, match=r"StnLSTM: input must be a Tensor; got a PackedSequence. Pad it"):
        lstm(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3, 2])))
    lstm.weight_dropout = "rate"
    with pytest.raises(RuntimeError, match="StnLSTM: must be called with a sample"):
        lstm(x)
    with using_sample(Sample(None, {})), pytest.raises(KeyError, match="rate"):
        lstm(x)
    with (
        using_sample(Sample(None, {"rate": torch.zeros(1, 2)})),
        pytest.raises(ValueError, match=r"'rate' must be one number"),
    ):
        lstm(x)


def test_constructors_refuse_what_makes_no_layer():
    with pytest.raises(ValueError, match="DeltaStnLSTM: batch_dim must be 0 with batch_first=True; got 1"):
        DeltaStnLSTM(2, 3, batch_first=True, num_hparams=1, batch_dim=1)
    with pytest.raises(ValueError, match="StnLSTM: proj_size must be 0; got 2"):
        StnLSTM(2, 3, proj_size=2, num_hparams=1)
    with pytest.raises(ValueError, match="StnLSTM: num_hparams must be at least 1; got 0"):
        StnLSTM(2, 3, num_hparams=0)

"""What holds for every shape, dtype, number of experts, rank, weight and mask."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig, RouterInputs, flow
from moe_lora.losses import base_loss, boundary_loss, consistency_loss, detail_loss
from moe_lora.masks import analyze
from moe_lora.save_and_load import load_adapter, save_adapter

examples = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 5)


def normal(seed: int, *shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(kind: str, seed: int, *shape: int) -> tuple[Tensor, int | None]:
    """Rows that sum to 1, and how many of their entries differ from 0."""
    logits = normal(seed, *shape)
    experts = shape[-1]
    if kind == "soft":
        return logits.softmax(-1), None
    k = 1 if kind == "one-hot" else 1 + seed % experts
    kept = logits.topk(k, -1).indices
    masked = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    return masked.softmax(-1), k


def slow_layer(x, weight, bias, A, B, weights, scaling):
    """One sample, one token, one expert at a time; `(batch, tokens, in)` and `(B, T, E)`."""
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            y = weight @ x[b, t] + bias
            for e in range(A.shape[0]):
                y = y + weights[b, t, e] * scaling * (B[:, e] @ (A[e] @ x[b, t]))
            rows.append(y)
    return torch.stack(rows).view(x.shape[0], x.shape[1], -1)


@examples
@given(
    batch=st.integers(1, 3),
    tokens=st.none() | sizes,
    width=sizes,
    out=sizes,
    experts=sizes,
    r=st.integers(1, 4),
    alpha=st.sampled_from([0.5, 1.0, 7.0]),
    kind=st.sampled_from(["soft", "one-hot", "topk"]),
    level=st.sampled_from(["fixed", "sample", "token"]),
    tell=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=seeds,
)
def test_a_layer_and_its_gradients_are_those_of_the_slow_loop(
    batch, tokens, width, out, experts, r, alpha, kind, level, tell, dtype, seed
):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(width, out)).to(dtype)
    config = MoELoraConfig(
        r=r, lora_alpha=alpha, num_experts=experts, target_modules=["0"], init_lora_weights=False
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    adapter = layer.moe_lora_experts["default"]
    shape = (batch, width) if tokens is None else (batch, tokens, width)
    x = normal(seed, *shape, dtype=dtype).requires_grad_()
    levels = {"fixed": (experts,), "sample": (batch, experts), "token": (batch, tokens, experts)}
    given_shape = levels["sample" if level == "token" and tokens is None else level]
    weights, k = weights_of(kind, seed + 1, *given_shape)
    weights = (
        weights.float().requires_grad_() if dtype != torch.float64 else (weights.requires_grad_())
    )
    with moe_lora.route(model, weights, top_k=k if tell else None):
        found = model(x)
    assert found.dtype == dtype
    cotangent = normal(seed + 2, *found.shape, dtype=dtype)
    learned = (x, weights, adapter.lora_A, adapter.lora_B)
    gradients = torch.autograd.grad(found, learned, cotangent)

    inputs = [t.detach().double().requires_grad_() for t in learned]
    x_, w_, A, B = inputs
    tokens_ = x_ if tokens is not None else x_[:, None]
    if len(given_shape) == 1:
        w_ = w_[None, None].expand(batch, tokens_.shape[1], -1)
    elif len(given_shape) == 2:
        w_ = w_[:, None].expand(-1, tokens_.shape[1], -1)
    linear = layer.base_layer
    expected = slow_layer(
        tokens_, linear.weight.detach().double(), linear.bias.detach().double(), A, B, w_, alpha / r
    ).view(found.shape)
    oracle = list(torch.autograd.grad(expected, inputs, cotangent.double()))
    if tell and k is not None and len(given_shape) == 2:
        # No gradient reaches the weights of experts that are not computed.
        oracle[1] = oracle[1].where(weights != 0, 0.0)
    for got, wanted in zip((found, *gradients), (expected, *oracle), strict=True):
        tolerance = TOLERANCE[dtype] * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@st.composite
def masks(draw, fewest: int = 1, smallest: int = 1) -> Tensor:
    side = st.integers(smallest, 24)
    count, height, width = draw(st.integers(fewest, 3)), draw(side), draw(side)
    samples = []
    for _ in range(count):
        kind = draw(st.sampled_from(["empty", "full", "pixel", "soft", "hard", "box", "faint"]))
        mask = torch.zeros(1, height, width)
        generator = torch.Generator().manual_seed(draw(seeds))
        if kind == "full":
            mask += 1
        elif kind == "pixel":
            mask[0, draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = 1
        elif kind in ("soft", "hard", "faint"):
            mask = torch.rand(1, height, width, generator=generator)
            mask = mask.round() if kind == "hard" else mask * (0.04 if kind == "faint" else 1)
        elif kind == "box":
            top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
            mask[0, top:, left:] = 1
        samples.append(mask)
    return torch.stack(samples)


@examples
@given(mask=masks(), with_image=st.booleans(), seed=seeds)
def test_every_mask_is_described_by_finite_numbers_in_their_ranges(mask, with_image, seed):
    count, _, height, width = mask.shape
    image = normal(seed, count, 3, height, width, dtype=torch.float32).sigmoid()
    mask = mask.requires_grad_()
    info = analyze(mask, image if with_image else None)
    for name in ("area_ratio", "edge_complexity", "boundary_smoothness", "detail_complexity"):
        values = getattr(info, name)
        if values is None:
            continue
        assert values.shape == (count,), name
        assert values.isfinite().all(), name
        assert ((values >= 0) & (values <= 1)).all(), (name, values)
    assert torch.allclose(info.area_ratio, mask.mean((1, 2, 3)))
    assert ((info.mask_latent >= 0) & (info.mask_latent <= 1)).all()
    for (left, top, right, bottom), one in zip(info.bbox.tolist(), mask, strict=True):
        inside = (one[0] >= 0.5).nonzero()
        if len(inside) == 0:
            assert (left, top, right, bottom) == (0, 0, 0, 0)
        else:
            ends = inside.amax(0) + 1
            assert [top, left, bottom, right] == [*inside.amin(0).tolist(), *ends.tolist()]
    info.features().sum().backward()
    assert mask.grad.isfinite().all()


@examples
@given(mask=masks(fewest=2), seed=seeds)
def test_a_mask_is_described_alike_alone_and_in_a_batch(mask, seed):
    whole = analyze(mask).features()
    for i in range(len(mask)):
        alone = analyze(mask[i : i + 1]).features()
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-5, atol=1e-5)


class Given(moe_lora.Router):
    """Answers with the logits that it finds in its inputs."""

    def logits(self, inputs: RouterInputs) -> Tensor:
        return inputs.model_inputs["logits"]


@examples
@given(
    batch=st.integers(1, 4),
    tokens=st.none() | sizes,
    experts=st.integers(1, 6),
    strategy=st.sampled_from(["soft", "hard", "topk"]),
    temperature=st.floats(0.05, 20.0),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    data=st.data(),
    seed=seeds,
)
def test_weights_of_a_router_are_a_choice_of_top_k_that_sums_to_one(
    batch, tokens, experts, strategy, temperature, scale, data, seed
):
    names = [f"{name}_expert" for name in "abcdef"[:experts]]
    top_k = data.draw(st.integers(1, experts)) if strategy == "topk" else None
    hint = data.draw(st.none() | st.sampled_from([f"{n[0]}_focus" for n in names]))
    router = Given().configure(names, strategy=strategy, temperature=temperature, top_k=top_k)
    shape = (batch, experts) if tokens is None else (batch, tokens, experts)
    logits = (normal(seed, *shape, dtype=torch.float32) * scale).requires_grad_()
    hidden = torch.zeros(batch, tokens or 1, 2)
    weights, raw = router(RouterInputs(hidden, task_hint=hint, model_inputs={"logits": logits}))
    assert weights.shape == shape
    assert raw is logits
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))
    if strategy == "hard":
        assert (weights.count_nonzero(-1) == 1).all()
    elif strategy == "topk":
        assert (weights.count_nonzero(-1) <= top_k).all()
        if scale == 1.0 and temperature >= 1:  # no underflow
            assert (weights.count_nonzero(-1) == top_k).all()
    weights.square().sum().backward()
    assert logits.grad.isfinite().all()


REGION_LOSSES = {
    "boundary": lambda *args: boundary_loss(*args, width=2),
    "consistency": consistency_loss,
    "detail": detail_loss,
}


@pytest.mark.parametrize("name", REGION_LOSSES)
@examples
@given(mask=masks(smallest=4), seed=seeds)
def test_a_region_loss_is_finite_not_negative_and_zero_at_the_optimum(name, mask, seed):
    loss = REGION_LOSSES[name]
    count, _, height, width = mask.shape
    target = normal(seed, count, 3, height, width, dtype=torch.float32).sigmoid()
    prediction = normal(seed + 1, count, 3, height, width, dtype=torch.float32).requires_grad_()
    value = loss(prediction, target, mask)
    value.backward()
    assert value.isfinite()
    assert value >= 0
    assert prediction.grad.isfinite().all()
    best = target.clone().requires_grad_()
    zero = loss(best, target, mask)
    zero.backward()
    assert zero == 0
    assert torch.equal(best.grad, torch.zeros_like(best))


@examples
@given(
    shape=st.lists(sizes, min_size=2, max_size=5),
    weighting=st.sampled_from(["none", "sigma_sqrt", "cosmap"]),
    seed=seeds,
)
def test_the_base_loss_is_finite_and_zero_at_the_optimum(shape, weighting, seed):
    velocity = normal(seed, *shape, dtype=torch.float32).requires_grad_()
    target = normal(seed + 1, *shape, dtype=torch.float32)
    sigma = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    value = base_loss(velocity, target, sigma=sigma, weighting=weighting)
    value.backward()
    assert value.isfinite()
    assert value >= 0
    assert velocity.grad.isfinite().all()
    assert base_loss(target, target, sigma=sigma, weighting=weighting) == 0


@examples
@given(shape=st.lists(sizes, min_size=2, max_size=5), seed=seeds)
def test_the_flow_goes_there_and_back(shape, seed):
    x0, noise = normal(seed, *shape), normal(seed + 1, *shape)
    sigma = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)).double()
    sigma = sigma * 0.9 + 0.1
    x_t, v = flow.interpolate(x0, noise, sigma), flow.velocity(x0, noise)
    torch.testing.assert_close(flow.velocity_to_x0(x_t, v, sigma), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.x0_to_velocity(x_t, x0, sigma), v, rtol=1e-9, atol=1e-9)


@examples
@given(batch=st.integers(1, 3), channels=sizes, rows=sizes, columns=sizes, seed=seeds)
def test_packing_goes_there_and_back(batch, channels, rows, columns, seed):
    latents = normal(seed, batch, channels, 2 * rows, 2 * columns)
    packed = flow.pack_latents(latents)
    assert packed.shape == (batch, rows * columns, 4 * channels)
    assert torch.equal(flow.unpack_latents(packed, 2 * rows, 2 * columns), latents)
    for i in range(rows):
        for j in range(columns):
            patch = latents[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(packed[:, i * columns + j], patch.flatten(1))


@st.composite
def configs(draw) -> MoELoraConfig:
    experts = draw(st.integers(1, 4))
    strategy = draw(st.sampled_from(["soft", "hard", "topk"]))
    layers = draw(st.lists(st.sampled_from(["first", "second", "head"]), min_size=1, unique=True))
    ranks, numbers = st.integers(1, 5), st.floats(0.1, 64.0)
    fixed = draw(st.booleans())
    return MoELoraConfig(
        r=draw(ranks),
        lora_alpha=draw(numbers),
        lora_dropout=draw(st.sampled_from([0.0, 0.5])),
        target_modules=draw(st.sampled_from([layers, f"({'|'.join(layers)})"])),
        expert_names=draw(
            st.permutations([f"expert {name}" for name in "абвг"]).map(lambda n: n[:experts])
        ),
        router="fixed" if fixed else None,
        router_kwargs={"weights": [1 / experts] * experts} if fixed else {},
        routing_strategy=strategy,
        routing_temperature=draw(numbers),
        top_k=draw(st.integers(1, experts)) if strategy == "topk" else None,
        use_rslora=draw(st.booleans()),
        init_lora_weights=draw(st.sampled_from([False, True, "gaussian"])),
        rank_pattern=draw(st.dictionaries(st.sampled_from(layers), ranks)),
        alpha_pattern=draw(st.dictionaries(st.sampled_from(layers), numbers)),
        modules_to_save=None if "head" in layers else draw(st.none() | st.just(["head"])),
    )


@examples
@given(config=configs(), seed=seeds)
def test_every_config_and_its_weights_come_back_from_a_file(make_mlp, config, seed):
    torch.manual_seed(seed)
    model = get_peft_model(make_mlp(), config).eval()
    loaded = make_mlp().eval()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        read = PeftConfig.from_pretrained(folder)
        load_adapter(loaded, folder, "another name")
    assert {**read.to_dict(), "inference_mode": False, "auto_mapping": None} == config.to_dict()
    x = normal(seed, 2, 6, dtype=torch.float32)
    assert torch.equal(loaded(x), model(x))

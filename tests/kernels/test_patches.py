"""gather_patches and embed_patches: which pixels, in which order, with which arithmetic, and the
gradients.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mae_kernels import backend, embed_patches, gather_patches
from mae_kernels._pixels import listed_lines_op, pixel_stats
from tests.kernels.calls import assert_equals_reference


def by_hand(images, ids, patch, mean=(0.0,), std=(1.0,)) -> torch.Tensor:
    """float64, one patch at a time, by slicing."""
    columns = images.shape[3] // patch
    x = images.double() / (255 if images.dtype == torch.uint8 else 1)
    centre, scale = (torch.tensor(t).to(x)[:, None, None] for t in (mean, std))
    x = (x - centre) / scale
    out = x.new_zeros(*ids.shape, images.shape[1] * patch * patch)
    for b, row in enumerate(ids.tolist()):
        for k, i in enumerate(row):
            top, left = i // columns * patch, i % columns * patch
            out[b, k] = x[b, :, top : top + patch, left : left + patch].reshape(-1)
    return out


def make_images(
    layout: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    x = torch.randint(0, 256, shape, device=device)
    x = x.to(torch.uint8) if dtype == torch.uint8 else (x / 100 - 1).to(dtype)
    if layout == "nhwc":
        return x.to(memory_format=torch.channels_last)
    if layout == "cropped":
        # a view with other pixels all around it
        other = 255 if dtype == torch.uint8 else float("nan")
        return torch.nn.functional.pad(x, (2, 3, 1, 2), value=other)[:, :, 1:-2, 2:-3]
    if layout == "expanded":
        return x[:1].expand(shape)
    return x


def make_ids(batch: int, patches: int, keep: int, device: torch.device) -> torch.Tensor:
    return torch.stack([torch.randperm(patches) for _ in range(batch)])[:, :keep].to(device)


CASES = [  # B, C, H, W, P, K
    (2, 3, 32, 48, 16, 3),
    (3, 1, 28, 14, 14, 2),
    (2, 4, 24, 8, 8, 1),
    (1, 3, 15, 25, 5, 15),
]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("case", "layout", "dtype"),
    [  # every two of the three together at least once
        (case, layout, dtype)
        for i, case in enumerate([*CASES, (2, 3, 8, 8, 4, 0)])
        for j, layout in enumerate(["nchw", "nhwc", "cropped", "expanded"])
        for k, dtype in enumerate([torch.uint8, torch.float32, torch.float16])
        if (i + j + k) % 4 in (0, 1)
    ],
)
def test_gather_patches_equals_slicing(
    case: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch, channels, height, width, patch, keep = case
    images = make_images(layout, dtype, (batch, channels, height, width), device)
    ids = make_ids(batch, height // patch * (width // patch), keep, device)
    before = images.clone()
    mean, std = [0.4, 0.5, 0.6, 0.1][:channels], [0.2, 0.3, 0.25, 1.5][:channels]
    plain = gather_patches(images, ids, patch)
    scaled = gather_patches(images, ids, patch, mean=mean, std=std, dtype=torch.float32)
    assert plain.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    assert plain.is_contiguous()
    rtol, atol = (1e-6, 1e-7) if dtype == torch.uint8 else (0, 0)
    torch.testing.assert_close(plain.double(), by_hand(images, ids, patch), rtol=rtol, atol=atol)
    want = by_hand(images, ids, patch, mean, std)
    torch.testing.assert_close(scaled.double(), want, rtol=2e-6, atol=2e-6)
    assert torch.equal(images.nan_to_num(7), before.nan_to_num(7))
    assert torch.equal(plain, gather_patches(images, ids, patch))


@pytest.mark.parametrize("channels", [1, 3])
def test_compiled_code_on_a_cpu_copies_lines_with_one_operator(channels: int) -> None:
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(gather_patches, backend=record, fullgraph=True)
    images = make_images("nchw", torch.uint8, (2, channels, 8, 12), torch.device("cpu"))
    ids = make_ids(2, 6, 3, images.device)
    expected = by_hand(images, ids, 4).float()
    torch.testing.assert_close(compiled(images, ids, 4), expected)
    assert "listed_lines" in graphs[0]
    for order in ("crp", "rpc"):
        torch.library.opcheck(listed_lines_op, (images, ids, 4, order))
    with pytest.raises(IndexError, match="needs 0 to 5"):
        compiled(images, ids + 6, 4)
    with torch.device("meta"):  # the default device does not matter
        torch.testing.assert_close(gather_patches(images, ids, 4), expected)
    # needs a gradient, is not contiguous: torch's own operators
    for odd in (images.float().requires_grad_(), images.transpose(2, 3).contiguous().mT):
        torch._dynamo.reset()
        compiled(odd, ids, 4)
        assert "listed_lines" not in graphs[-1]


def test_mean_and_std_are_one_number_or_one_per_channel() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    ids = make_ids(2, 4, 3, torch.device("cpu"))
    same, each = ([0.5] * 3, [0.25] * 3), ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    for mean, std, want in [(0.5, 0.25, same), ([0.5], (0.25,), same), (*each, each)]:
        got = gather_patches(images, ids, 4, mean=mean, std=std)
        torch.testing.assert_close(got.double(), by_hand(images, ids, 4, *want), rtol=0, atol=2e-6)
        with backend("registered"):
            again = gather_patches(images, ids, 4, mean=mean, std=std)
        assert torch.equal(again, got)


def test_python_numbers_are_copied_to_the_device_once() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    first = pixel_stats(images, 0.125, [0.5, 0.25, 2.0])
    assert pixel_stats(images, 0.125, (0.5, 0.25, 2)) is first
    with FakeTensorMode() as mode:
        assert isinstance(pixel_stats(mode.from_tensor(images), 0.125, 0.5), FakeTensor)
        pixel_stats(images, 0.25, 0.5)  # made under a mode: not kept
    assert not isinstance(pixel_stats(images, 0.25, 0.5), FakeTensor)


@pytest.mark.kernel
def test_embed_patches_equals_a_convolution_in_fp64(device: torch.device) -> None:
    for (batch, channels, height, width, patch, keep), dtype in zip(
        CASES, [torch.uint8, torch.float32, torch.uint8, torch.float32], strict=True
    ):
        images = make_images("nhwc", dtype, (batch, channels, height, width), device)
        patches, depth = height // patch * (width // patch), 10
        ids = make_ids(batch, patches, keep, device)
        weight = torch.randn(depth, channels, patch, patch, device=device)
        bias = torch.randn(depth, device=device)
        pos = torch.randn(patches, depth, device=device)
        upstream = torch.randn(batch, keep, depth, device=device)

        def ours(w, b, p, images=images, ids=ids):
            return embed_patches(images, ids, w, b, p[None], mean=0.4, std=0.3)

        def convolve(w, b, p, images=images, ids=ids, patch=patch):
            x = images.to(w.dtype) / (255 if images.dtype == torch.uint8 else 1)
            x = torch.nn.functional.conv2d((x - 0.4) / 0.3, w, b, stride=patch).flatten(2)
            return torch.stack([row[:, i].t() for row, i in zip(x, ids, strict=True)]) + p[ids]

        assert_equals_reference(ours, convolve, (weight, bias, pos), upstream, atol=2e-6)


@pytest.mark.kernel
@pytest.mark.parametrize(("batch", "listed"), [(3, 5), (9, 70)])
def test_embed_patches_sums_every_gradient_of_a_repeated_patch(
    batch: int, listed: int, device: torch.device
) -> None:
    """Twice, four times and in one image only; a table of slots per patch would keep one of the
    gradients.
    """
    images = torch.rand(batch, 1, 8, 12, device=device)
    ids = torch.randint(0, 6, (batch, listed), device=device)
    ids[:, -1], ids[0] = ids[:, 0], 2
    weight = torch.randn(5, 1, 4, 4, device=device, requires_grad=True)
    pos = torch.randn(6, 5, device=device, requires_grad=True)
    upstream = torch.randn(batch, listed, 5, device=device)
    out = embed_patches(images, ids, weight, None, pos)
    got = torch.autograd.grad(out, (weight, pos), upstream, retain_graph=True)
    want = torch.zeros(6, 5, dtype=torch.float64)
    for i, row in zip(ids.flatten().tolist(), upstream.flatten(0, 1).double().cpu(), strict=True):
        want[i] += row
    torch.testing.assert_close(got[1].double().cpu(), want, rtol=1e-5, atol=1e-5)
    vectors = by_hand(images, ids, 4).flatten(0, 1)
    products = upstream.double().flatten(0, 1).t() @ vectors
    torch.testing.assert_close(got[0].double().view(5, 16), products, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], torch.autograd.grad(out, pos, upstream)[0])


@pytest.mark.kernel
@pytest.mark.parametrize("positions", ["none", "per image"])
def test_embed_patches_without_positions_or_with_those_of_each_image(positions, device) -> None:
    images = torch.rand(2, 3, 8, 12, device=device)
    ids = make_ids(2, 6, 4, images.device)
    weight, bias = torch.randn(5, 3, 4, 4, device=device), torch.randn(5, device=device)
    pos = torch.randn(2, 6, 5, device=device)
    upstream = torch.randn(2, 4, 5, device=device)

    def ours(w, b, p):
        tokens = embed_patches(images, ids, w, b, None if positions == "none" else p)
        return tokens + 0 * p.sum()

    def separate(w, b, p):
        tokens = torch.nn.functional.conv2d(images.to(w.dtype), w, b, stride=4)
        tokens = tokens.flatten(2).transpose(1, 2) + p * (positions != "none")
        return tokens.gather(1, ids[..., None].expand(-1, -1, 5))

    assert_equals_reference(ours, separate, (weight, bias, pos), upstream)


def test_embed_patches_of_volumes_and_signals_equals_a_convolution() -> None:
    """The recipe of kernels/README.md: patches as vectors are images of V channels."""
    ids = make_ids(2, 8, 3, torch.device("cpu"))
    pos, bias = torch.randn(8, 5), torch.randn(5)
    at = ids[..., None].expand(-1, -1, 5)
    volume, weight_3d = torch.randn(2, 3, 4, 8, 12), torch.randn(5, 3, 2, 4, 6)
    signal, weight_1d = torch.randn(2, 3, 40), torch.randn(5, 3, 5)
    x = volume.reshape(2, 3, 2, 2, 2, 4, 2, 6).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(2, 8, -1)
    y = signal.reshape(2, 3, 8, 5).transpose(1, 2).flatten(2)
    in_3d = torch.nn.functional.conv3d(volume, weight_3d, bias, stride=(2, 4, 6))
    in_1d = torch.nn.functional.conv1d(signal, weight_1d, bias, stride=5)
    for vectors, weight, tokens in ((x, weight_3d, in_3d), (y, weight_1d, in_1d)):
        weight = weight.flatten(1)[..., None, None]
        got = embed_patches(vectors.transpose(1, 2)[..., None], ids, weight, bias, pos)
        want = (tokens.flatten(2).transpose(1, 2) + pos).gather(1, at)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradcheck_of_float_images() -> None:
    ids = make_ids(2, 6, 3, torch.device("cpu"))
    weight, bias, pos = (torch.randn(n, dtype=torch.float64) for n in ((3, 3, 2, 2), (3,), (6, 3)))
    images = torch.rand(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    for name in ("auto", "registered"):
        with backend(name):
            assert torch.autograd.gradcheck(lambda x: gather_patches(x, ids, 2, mean=0.1), images)
            assert torch.autograd.gradcheck(
                lambda x: embed_patches(x, ids, weight, bias, pos, std=0.3), images
            )


U8 = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
IDS = torch.zeros(2, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"images": U8.int()}, TypeError, "images: got dtype torch.int32, needs uint8 or a float"),
        ({"images": U8[0]}, ValueError, r"images: got shape \(3, 8, 8\), needs \[B, C, H, W\]"),
        ({"patch_size": 3}, ValueError, "images: got 8 x 8 pixels.*divisible by patch_size = 3"),
        ({"patch_size": 0}, ValueError, "patch_size: got 0, needs at least 1"),
        ({"patch_size": 4.0}, TypeError, "patch_size: got float, needs an int"),
        ({"ids": IDS.int()}, TypeError, "ids: got dtype torch.int32, needs torch.int64"),
        ({"ids": IDS[:1]}, ValueError, r"ids: got shape \(1, 1\), needs \[B, K\] = \(2, any\)"),
        ({"ids": IDS - 1}, ValueError, "ids: got ids from -1 to -1, needs ids from 0 to 3"),
        ({"mean": [0.5, 0.4]}, ValueError, "mean: got 2 numbers, needs one, .* per .*channel = 3"),
        ({"std": torch.ones(3)}, TypeError, "std: got a tensor, needs Python numbers"),
        ({"std": [1, 1, 0]}, ValueError, "std: got .* needs positive"),
        ({"dtype": torch.int8}, TypeError, "dtype: got torch.int8, needs a floating"),
    ],
)
def test_gather_patches_names_a_bad_argument(change, error, text: str) -> None:
    with pytest.raises(error, match=text):
        gather_patches(**{"images": U8, "ids": IDS, "patch_size": 4, **change})


WEIGHT = torch.zeros(5, 3, 4, 4)
EMBED = {"images": U8, "ids": IDS, "weight": WEIGHT, "bias": None, "pos_embed": torch.zeros(4, 5)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": WEIGHT[:, :1]}, "images: got 3 channels, needs the weight's C = 1"),
        ({"weight": WEIGHT[..., :2]}, "weight: got shape .* needs a square patch"),
        ({"weight": WEIGHT.to("meta")}, "weight: got device meta, needs the device of images, cpu"),
        ({"bias": torch.zeros(4)}, r"bias: got shape \(4,\), needs \[D\] = \(5\)"),
        ({"pos_embed": torch.zeros(5, 5)}, r"pos_embed: got .*5, 5\), needs \[L, D\] = \(4, 5\)"),
    ],
)
def test_embed_patches_names_a_bad_argument(change, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        embed_patches(**{**EMBED, **change})

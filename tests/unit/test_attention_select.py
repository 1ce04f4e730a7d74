"""The choice of attention backends: who is refused, by what capability says and by what a probe finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mirai_dist.attention import sdpa, select, split
from mirai_dist.attention.patterns import TORCH, Backends, BySegment, Pattern, Seen, Together, by_dense
from mirai_dist.attention.select import Candidate, Choice, Need, Unavailable, first_that_serves
from mirai_dist.config import RecipeError, load, schema
from mirai_dist.cycle.attending import attention_of
from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan import Clean, Held, History, WanModel, WanShape
from mirai_kernels.chunk_attention.reference import chunk_attention

TINY = Path(__file__).parents[1] / "procs" / "tiny.yaml"
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NEED = Need("cpu", torch.bfloat16, (12, 128))


# --- broken backends -----------------------------------------------------------------------------------------


class Wrong(torch.autograd.Function):
    """Exact forward; backward that is wrong in one gradient, by a factor near one."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, which: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.which = which
        return sdpa.dense(q, k, v)

    @staticmethod
    def backward(ctx: Any, towards: Tensor) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in ctx.saved_tensors]
            found = list(torch.autograd.grad(sdpa.dense(*leaves), leaves, towards))
        found[ctx.which] = found[ctx.which] * 0.9
        return *found, None


class SwappedSegments:
    """Teacher forcing that lets a noisy segment see the clean version of itself."""

    def causal(self, segment_tokens: int) -> Pattern:
        return BySegment().causal(segment_tokens)

    def teacher_forced(self, segment_tokens: int) -> Pattern:
        return BySegment().causal(segment_tokens)


def no_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa.dense(q, k, v).detach()


def no_gradient_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa.dense(q, k.detach(), v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa.dense(q * 1.1, k, v)


def last_key_lost(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa.dense(q, k[:, :-1], v[:, :-1])


def not_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa.dense(q, k, v) * float("nan")


def raises(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise KeyError("no kernel for this card\nsecond line")


def narrow_heads_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa.dense(q, k, v) if q.shape[-1] <= 64 else unscaled(q, k, v)


BROKEN: list[tuple[Callable[..., Tensor], str]] = [
    (lambda q, k, v: Wrong.apply(q, k, v, 0), "its gradient of q is off by 1.0e-01"),
    (lambda q, k, v: Wrong.apply(q, k, v, 1), "its gradient of k is off by 1.0e-01"),
    (lambda q, k, v: Wrong.apply(q, k, v, 2), "its gradient of v is off by 1.0e-01"),
    (no_gradient, "fails with RuntimeError: element 0 of tensors does not require grad"),
    (no_gradient_of_keys, "fails with RuntimeError: The differentiated Tensor at index 1"),
    (causal, "its output is off by"),
    (unscaled, "its output is off by"),
    (last_key_lost, "its output is off by"),
    (not_finite, "its output is off by nan"),
    (raises, "fails with KeyError: 'no kernel for this card"),
    (narrow_heads_only, "at heads of 128"),
]


@pytest.mark.parametrize(("broken", "reason"), BROKEN)
def test_a_broken_backend_is_refused_and_the_next_one_serves(broken: Pattern, reason: str) -> None:
    candidates = [Candidate("broken", lambda: broken), Candidate("sound", lambda: sdpa.dense)]
    found = first_that_serves(candidates, NEED, select.probe_dense)
    assert (found.name, found.backend) == ("sound", sdpa.dense)
    ((name, why),) = found.refused
    assert name == "broken" and reason in why and "\n" not in why


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_backend_serves(dtype: torch.dtype) -> None:
    for backend, probe in ((sdpa.dense, select.probe_dense), (BySegment(), select.probe_segments)):
        assert probe(backend, Need("cpu", dtype, (12, 20, 128))) == ""  # type: ignore[arg-type]


def test_float32_rounded_to_ten_bits_is_not_float32() -> None:
    """As tensor cores do, where they may."""

    def coarse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa.dense(*(each + (each.half().float() - each).detach() for each in (q, k, v)))

    assert "its output is off by" in select.probe_dense(coarse, Need("cpu", torch.float32, (128,)))


def test_rules_over_segments_are_probed_each() -> None:
    reason = select.probe_segments(SwappedSegments(), NEED)
    assert reason.startswith("teacher_forced: its output is off by")


def test_without_training_a_forward_is_enough() -> None:
    candidate = Candidate("forward", lambda: no_gradient)
    found = first_that_serves([candidate], Need("cpu", torch.float32, (12,), trained=False), select.probe_dense)
    assert found.name == "forward" and not found.refused
    assert first_that_serves([candidate], NEED, select.probe_dense).backend is None


# --- packages that are not there, or are broken --------------------------------------------------------------


def missing() -> Any:
    raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")


def unloadable() -> Any:
    raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104")


@pytest.mark.parametrize(
    ("load", "reason"),
    [(missing, "package flash_attn is not installed"), (unloadable, "fails with ImportError: flash_attn_2_cuda.so: ")],
)
def test_a_package_that_does_not_load_is_refused(load: Callable[[], Any], reason: str) -> None:
    found = first_that_serves([Candidate("flash", load)], NEED, select.probe_dense)
    assert found.backend is None and found.refused[0][1].startswith(reason)


# --- capability ----------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Need]]:
    """`card(major)`: what a bf16 run needs on a CUDA device of that compute capability."""

    def of(major: int, dtype: torch.dtype = torch.bfloat16) -> Need:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
        return Need("cuda", dtype, (128,))

    yield of


def fit(need: Need) -> list[str]:
    return [each.name for each in select.DENSE if not each.unfit(need)]


def test_what_a_card_can_do(card: Callable[..., Need]) -> None:
    torches = ["sdpa-flash", "sdpa-efficient", "sdpa"]
    assert fit(card(7)) == ["xformers", *torches]
    assert fit(card(8)) == ["flash-2", "cudnn", "xformers", *torches]
    assert fit(card(9)) == ["flash-4", "flash-3", "flash-2", "cudnn", "xformers", *torches]
    assert fit(card(10)) == ["flash-4", "flash-2", "cudnn", "xformers", *torches]
    assert fit(card(9, torch.float32)) == ["xformers", *torches]
    assert fit(NEED) == ["sdpa-flash", "sdpa"]


def test_cudnn_comes_before_flash_attention_2_on_hopper_alone(card: Callable[..., Need]) -> None:
    def position(need: Need, name: str) -> int:
        return list(select._names("auto", need)).index(name)

    for major in (9, 10, 12):
        need = card(major)
        assert position(need, "cudnn") < position(need, "flash-2") < position(need, "sdpa")
    assert "cudnn" not in select._names("auto", card(8))
    assert list(select._names("flash", card(9))) == ["flash-3", "flash-4", "flash-2"]
    assert all(select._names("auto", card(major))[-1] == "sdpa" for major in (7, 8, 9, 10))


# --- the choice ----------------------------------------------------------------------------------------------


def test_the_choice_on_a_cpu() -> None:
    choice = select.select("auto", "auto", NEED)
    assert choice.backends == TORCH and (choice.dense, choice.segments) == ("sdpa", "dense")
    assert choice.told() == {
        "dense": "sdpa",
        "segments": "dense calls, segment by segment",
        "behind": "dense calls",
        "refused": {"flash-2, xformers": "needs a CUDA device"},
    }
    named = select.select("sdpa-flash", "dense", NEED)
    assert named.backends == by_dense(sdpa.FLASH) and not named.refused


@pytest.mark.parametrize("name", ["cudnn", "flash", "xformers", "sdpa-efficient"])
def test_a_named_backend_serves_or_nothing_does(name: str) -> None:
    with pytest.raises(Unavailable, match=r"needs a CUDA device\); choose auto or sdpa-flash or sdpa$") as raised:
        select.select(name, "auto", NEED)
    assert raised.value.key == "attention" and str(raised.value).startswith(f"{name} cannot be used here (")


def test_flex_is_refused_where_it_cannot_train() -> None:
    with pytest.raises(Unavailable, match=r"flex: has no backward on CPU\); choose auto or dense$") as raised:
        select.select("auto", "flex", NEED)
    assert raised.value.key == "segment_attention"


def test_parts_are_joined_where_the_kernels_serve_and_a_library_gives_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton does not run here: what it would compute comes from the references, so that the probes decide."""
    monkeypatch.setattr(split, "load_behind", lambda dense, by: split.Behind(dense, by, joined, Runs))
    monkeypatch.setattr(split, "load_prefix", lambda by: split.Prefix(by, over_prefixes))
    need = replace(NEED, no_kernels="")
    choice = select.select("sdpa-flash", "auto", need)
    assert (choice.behind, choice.segments) == (select.SPLIT, select.PREFIX) and not choice.refused
    assert choice.backends.behind == split.Behind(sdpa.FLASH, "cpu", joined, Runs)
    assert choice.told()["behind"] == "no gradient towards a cache"
    assert select.select("sdpa", "dense", need).segments == "dense"
    leaky = select.select("sdpa", "prefix", replace(need, cached_gradient=True))
    assert (leaky.behind, leaky.segments) == ("dense", "prefix") and leaky.backends.behind == Together()
    assert leaky.refused == (
        ("split", "computes no gradient towards a cache, which rollout.kv_grad leaky asks for"),
    )


def test_parts_that_are_wrong_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    off = partial(joined, wrong=1e-2)
    monkeypatch.setattr(split, "load_behind", lambda dense, by: split.Behind(dense, by, off, Runs))
    monkeypatch.setattr(split, "load_prefix", lambda by: split.Prefix(by, lambda q, k, v, **_: sdpa.dense(q, k, v)))
    choice = select.select("sdpa", "auto", replace(NEED, no_kernels="", dtype=torch.float32))
    assert (choice.behind, choice.segments) == ("dense", "dense") and choice.backends == TORCH
    reasons = dict(choice.refused)
    assert reasons["prefix"].startswith("causal: its output is off by")
    assert reasons["split"].startswith("its output is off by") and "at heads of 12" in reasons["split"]


@pytest.mark.parametrize("name", ["sdpa", "sdpa-flash"])
def test_prefixes_are_refused_by_name_without_the_kernels(name: str) -> None:
    with pytest.raises(Unavailable, match="prefix: needs the fused kernels, which this run does not use") as raised:
        select.select(name, "prefix", NEED)
    assert raised.value.key == "segment_attention" and str(raised.value).endswith("choose auto or dense")


def test_a_library_that_gives_no_parts_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "LIBRARIES", {})
    choice = select.select("sdpa", "auto", replace(NEED, no_kernels="", head_dims=(12,)))
    assert choice.behind == "dense"
    assert dict(choice.refused)["split"] == "joins parts of cudnn or sdpa-flash, and attention is by sdpa"


class Runs(NamedTuple):
    keys: Tensor
    values: Tensor
    runs: tuple[int, ...]


def joined(
    q: Tensor, own: tuple[Tensor, Tensor], cached: Runs | None, by: str, wrong: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What `chunk_attention` computes, by its reference."""
    assert by == "cpu"
    past = None
    if cached is not None:
        pairs = list(zip(cached.runs[::2], cached.runs[1::2], strict=True))
        past = tuple(torch.cat([each[:, a:b] for a, b in pairs], 1) for each in cached[:2])
    out, lse = chunk_attention(q, own, past)  # type: ignore[arg-type]
    return out + wrong, lse


def over_prefixes(q: Tensor, k: Tensor, v: Tensor, segment_tokens: int, doubled: bool, by: str) -> Tensor:
    assert by == "cpu"
    rule = BySegment().teacher_forced if doubled else BySegment().causal
    return rule(segment_tokens)(q, k, v)


def test_a_recipe_s_words_are_those_of_the_selection() -> None:
    fields = schema.Parallel.__dataclass_fields__
    words = set(fields["attention"].metadata["choices"])
    assert words == {"auto", "flash", *(each.name for each in select.DENSE if not each.name.startswith("flash-"))}
    segments = {"auto", select.BY_SEGMENT, select.FLEX.name, select.PREFIX}
    assert set(fields["segment_attention"].metadata["choices"]) == segments


def test_a_refusal_is_one_line_of_the_recipe() -> None:
    recipe = load(TINY, ("parallel.attention=xformers",)).recipe
    with pytest.raises(RecipeError) as raised:
        attention_of(recipe, CPU)
    assert str(raised.value) == (
        "parallel.attention: xformers cannot be used here (xformers: needs a CUDA device); "
        "choose auto or sdpa-flash or sdpa"
    )
    assert raised.value.exit_code == 20


def test_all_widths_of_heads_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    needs: list[Need] = []

    def noted(dense: str, segments: str, need: Need) -> Choice:
        needs.append(need)
        return Choice(TORCH, "sdpa", "dense", ())

    monkeypatch.setattr("mirai_dist.cycle.attending.select", noted)
    attention_of(load(TINY).recipe, CPU)
    attention_of(load(TINY, ("parallel.compute_dtype=bfloat16",)).recipe, CPU, trained=False)
    assert needs == [Need("cpu", torch.float32, (12, 14)), Need("cpu", torch.bfloat16, (12, 14), trained=False)]


# --- the seam ------------------------------------------------------------------------------------------------


class Noted:
    """Backends that note by which way they were called, and with how many queries and keys."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.backends = Backends(self.way("dense", sdpa.dense), self, self.behind)

    def way(self, name: str, attend: Pattern) -> Pattern:
        def noted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.calls.append((name, q.shape[1], k.shape[1]))
            return attend(q, k, v)

        return noted

    def behind(self, q: Tensor, own: tuple[Tensor, Tensor] | None, seen: Seen) -> Tensor:
        self.calls.append(("behind", q.shape[1], seen.keys.shape[1]))
        return Together()(q, own, seen)

    def causal(self, segment_tokens: int) -> Pattern:
        return self.way(f"causal {segment_tokens}", BySegment().causal(segment_tokens))

    def teacher_forced(self, segment_tokens: int) -> Pattern:
        return self.way(f"teacher-forced {segment_tokens}", BySegment().teacher_forced(segment_tokens))


def test_networks_attend_with_what_they_are_given() -> None:
    noted = Noted()
    shape = WanShape(dim=24, ffn_dim=32, heads=2, blocks=1, text_dim=8, channels=4, freq_dim=16)
    network = WanModel(shape, noted.backends)
    latent, time, text = torch.randn(1, 4, 4, 4, 6), torch.ones(1, 4), torch.randn(1, 5, 8)  # 6 tokens a frame
    network(latent, time[:, 0], text)
    network(latent, time, text, segment_frames=2)
    network(latent, time, text, clean=Clean(latent), segment_frames=2)
    assert noted.calls == [
        ("dense", 24, 24), ("dense", 24, 5),
        ("causal 12", 24, 24), ("dense", 24, 5),
        ("teacher-forced 12", 48, 48), ("dense", 48, 5),
    ]  # fmt: skip
    noted.calls.clear()
    past = tuple(Held(torch.randn(1, 40, 2, 12), torch.randn(1, 40, 2, 12), (0, 8), room) for room in ((), (8, 32)))
    network(latent, time, text, history=History(past[:1], first_frame=1))
    with torch.no_grad():
        network(latent, time, text, history=History(past[1:], first_frame=1))
    assert noted.calls == [("behind", 24, 40), ("dense", 24, 5)] * 2
    noted.calls.clear()
    Predictor(8, 6, heads=2, blocks=2, gated=False, backends=noted.backends).hidden(torch.randn(1, 7, 8))
    assert noted.calls == [("dense", 7, 7)] * 2

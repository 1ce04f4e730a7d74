"""Measures of a run's health: each against its closed form, and averaged over ranks as if there were one."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from mirai_dist.method import health
from mirai_dist.method.critic import critic_loss
from mirai_dist.method.flow import add_noise, clean_from_velocity, expand_like, shifted
from mirai_dist.method.health import Moved, Schedule, Scores, combined
from mirai_dist.observe.metrics import CAPACITY

SHAPE = (4, 6, 3, 2, 2)
SEGMENT = 2
TIMESTEPS = torch.tensor([10.0, 150.0, 500.0, 999.0])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(**given: Tensor) -> Scores:
    fields = {name: normal(seed) for seed, name in enumerate(("latents", "fake", "conditional", "real", "gradient"))}
    return Scores(**{"timesteps": TIMESTEPS.double(), **fields, **given})


def measured(parts: health.Parts) -> dict[str, float]:
    return combined({name: float(part) for name, part in parts.items()})


def averaged(*ranks: health.Parts) -> dict[str, float]:
    """What `Metrics.reduce` and `combined` make of the parts of several ranks."""
    assert len({tuple(parts) for parts in ranks}) == 1
    return combined({name: sum(float(parts[name]) for parts in ranks) / len(ranks) for name in ranks[0]})


def of_samples(which: slice, whole: Scores) -> Scores:
    return Scores(*(each[which] for each in whole))


def test_two_ranks_measure_what_one_does() -> None:
    """Unequal numbers of samples in a bucket, and of means between ranks, must not matter."""
    whole = scores(latents=normal(9) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(-1, 1, 1, 1, 1) + 5)
    halves = [health.measures(of_samples(which, whole), SEGMENT) for which in (slice(0, 2), slice(2, 4))]
    one, two = measured(health.measures(whole, SEGMENT)), averaged(*halves)
    # the Gaussian's variance is that of a rank's own micro-batch: a reference, not a mean
    for found in (one, two):
        del found["critic_error/to_gaussian"]
    assert two == pytest.approx(one, rel=1e-9)


def test_names_are_the_same_on_all_ranks_and_fit_in_a_reduction() -> None:
    """A rank without a sample in a bucket adds its name too; 21 segments of one frame, 16 channels."""
    wan = (1, 42, 16, 2, 2)
    fields = {name: normal(1, *wan) for name in ("latents", "fake", "conditional", "real", "gradient")}
    names = [health.measures(Scores(**fields, timesteps=torch.tensor([t])), 1).keys() for t in (10.0, 999.0)]
    assert names[0] == names[1]
    assert len(names[0]) <= CAPACITY - 40


def test_gradient_per_bucket() -> None:
    gradient = torch.tensor([1.0, -3.0, 5.0, 7.0]).view(-1, 1, 1, 1, 1).expand(SHAPE)
    found = measured(health.by_bucket("g", gradient.abs().mean(dim=(1, 2, 3, 4)), TIMESTEPS))
    assert found == {"g/t0-200": 2.0, "g/t400-600": 5.0, "g/t800-1000": 7.0}


def test_the_last_bucket_holds_1000() -> None:
    assert measured(health.by_bucket("g", torch.ones(2), torch.tensor([200.0, 1000.0]))) == {
        "g/t200-400": 1.0,
        "g/t800-1000": 1.0,
    }


def test_a_value_that_is_not_finite_stays_in_its_bucket() -> None:
    found = measured(health.by_bucket("g", torch.tensor([math.nan, 2.0, 3.0, 4.0]), TIMESTEPS))
    assert math.isnan(found["g/t0-200"]) and found["g/t400-600"] == 3.0 and found["g/t800-1000"] == 4.0


def test_critic_error_is_the_critics_own_loss() -> None:
    latents, noise, velocity = normal(1), normal(2), normal(3)
    noisy = add_noise(latents, noise, TIMESTEPS.double())
    fake = clean_from_velocity(noisy, velocity, TIMESTEPS.double())
    found = measured(health.critic_error(scores(latents=latents, fake=fake)))
    for rows, bucket in (([0, 1], "t0-200"), ([2], "t400-600"), ([3], "t800-1000")):
        critic = mock.Mock(return_value=velocity[rows])
        loss = critic_loss(critic, latents[rows], noise[rows], TIMESTEPS[rows], noise)
        assert found[f"critic_error/{bucket}"] == pytest.approx(loss.item(), rel=1e-9)


def test_a_critic_that_knows_mean_and_variance_alone_is_at_one() -> None:
    """Gaussian latents and their exact posterior mean, in a batch large enough for the law of large numbers."""
    shape = (64, 6, 3, 8, 8)
    spread, centre = torch.tensor([0.3, 1.0, 2.0]).view(3, 1, 1), torch.tensor([4.0, 0.0, -1.0]).view(3, 1, 1)
    latents, noise = centre + spread * normal(1, *shape), normal(2, *shape)
    timesteps = torch.linspace(50, 980, 64, dtype=torch.float64)
    sigma = expand_like(timesteps, latents)
    noisy = add_noise(latents, noise, timesteps)
    keep = (1 - sigma) * spread**2 / ((1 - sigma) ** 2 * spread**2 + sigma**2)
    best = centre + keep * (noisy - (1 - sigma) * centre)
    same = Scores(latents, timesteps, best, best, best, best)
    found = measured(health.critic_error(same))
    assert found["critic_error/to_gaussian"] == pytest.approx(1.0, rel=0.02)
    assert found["critic_error/to_teacher"] == 1.0
    worse = measured(health.critic_error(same._replace(fake=latents + 2 * (best - latents))))
    assert worse["critic_error/to_gaussian"] == pytest.approx(4.0, rel=0.02)
    assert worse["critic_error/to_teacher"] == pytest.approx(4.0)


def test_statistics_per_channel_and_segment() -> None:
    latents = normal(1)
    found = measured(health.statistics("latents", latents, SEGMENT))
    assert found["latents/all/std"] == pytest.approx(latents.std(correction=0).item())
    for channel in range(3):
        own = latents[:, :, channel]
        assert found[f"latents/channel-{channel:02d}/mean"] == pytest.approx(own.mean().item())
        assert found[f"latents/channel-{channel:02d}/std"] == pytest.approx(own.std(correction=0).item())
    for segment in range(3):
        own = latents[:, 2 * segment : 2 * segment + 2]
        assert found[f"latents/segment-{segment:02d}/mean"] == pytest.approx(own.mean().item())
        assert found[f"latents/segment-{segment:02d}/std"] == pytest.approx(own.std(correction=0).item())
    assert len(found) == 2 * (1 + 3 + 3)


def test_many_segments_are_pooled_and_none_is_lost() -> None:
    latents = torch.arange(50.0).view(1, 50, 1, 1, 1).expand(2, 50, 3, 2, 2)
    found = measured(health.statistics("latents", latents, 1))
    means = {name: value for name, value in found.items() if "segment" in name and name.endswith("mean")}
    assert len(means) <= health.MOST_SEGMENTS
    assert means["latents/segment-00/mean"] == 1.0 and means["latents/segment-48/mean"] == 48.5


def test_drift_is_the_distance_to_the_teachers_statistics() -> None:
    teacher = normal(1)
    moved = 2.0 * teacher + torch.tensor([0.0, 3.0, 0.0]).view(3, 1, 1)
    found = measured(health.measures(scores(latents=moved, conditional=teacher), SEGMENT))
    per_channel = teacher.transpose(0, 2).flatten(1)
    spread = per_channel.var(dim=1, correction=0).mean().sqrt()
    shift = (per_channel.mean(dim=1) + torch.tensor([0.0, 3.0, 0.0])).square().mean().sqrt() / spread
    assert found["drift/std"] == pytest.approx(2.0)
    assert found["drift/mean"] == pytest.approx(shift.item())


def test_motion_and_boundary_jump() -> None:
    """Steps of 1 inside segments and 3 across boundaries; the first step, of 100, counts as motion alone."""
    frames = torch.tensor([100.0, 200.0, 203.0, 204.0, 207.0, 208.0]).view(1, 6, 1, 1, 1).expand(SHAPE)
    found = measured(health.motion(frames, frames / 4) | health.boundary_jump(frames, SEGMENT))
    assert found["motion/latents"] == pytest.approx(108 / 5) and found["motion/relative"] == pytest.approx(4.0)
    assert found["boundary_jump"] == pytest.approx(3.0)
    assert health.boundary_jump(frames, 1) == {}


def test_score_scale() -> None:
    """Spread about each sample's channel means: a constant that guidance adds is a drift, no spread."""
    conditional = normal(1)
    real = 3.0 * conditional + 7.0
    found = measured(health.score_scale(scores(conditional=conditional, real=real, fake=real + 0.5)))
    centred = conditional - conditional.mean(dim=(1, 3, 4), keepdim=True)
    assert found["score/guided_std"] == pytest.approx(3.0)
    assert found["score/gap"] == pytest.approx(0.5 / centred.square().mean().sqrt().item())


# --- timesteps -----------------------------------------------------------------------------------------------

SCHEDULE = Schedule(shift=5.0, lowest=20.0, highest=980.0)


def drawn(shift: float, among: range = range(1000)) -> list[float]:
    return [min(max(shifted(i / 1000, shift), 20.0), 980.0) for i in among]


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_unshifted_is_the_inverse_of_shifted(shift: float) -> None:
    for u in (0.0, 0.1, 0.5, 0.99, 1.0):
        assert health.unshifted(shifted(u, shift), shift) == pytest.approx(u, abs=1e-12)


@pytest.mark.parametrize("among", [range(1000), range(500, 1000), range(250, 500), range(990, 1000)])
def test_the_right_schedule_does_not_deviate(among: range) -> None:
    assert health.timestep_deviation(drawn(5.0, among), SCHEDULE, among) == pytest.approx(0.0, abs=1e-9)


def test_a_deviation_is_in_standard_deviations_of_one_draw() -> None:
    """Without shift, u = s / (5 - 4 s) for uniform s: mean (5 ln 5 - 4) / 16, against 1/2 +- 1 / sqrt(12)."""
    expected = ((5 * math.log(5) - 4) / 16 - 0.5) * math.sqrt(12)
    free = Schedule(5.0, 0.0, 1000.0)
    unshifted = [float(i) for i in range(1000)]
    assert health.timestep_deviation(unshifted, free) == pytest.approx(expected, abs=5e-3)
    assert health.timestep_deviation([shifted(0.9, 5.0)], free) == pytest.approx(0.4 * math.sqrt(12), abs=5e-3)


def test_a_range_of_one_integer_and_no_draw() -> None:
    assert health.timestep_deviation([shifted(0.5, 5.0)], SCHEDULE, range(500, 501)) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="no timestep"):
        health.timestep_deviation([], SCHEDULE)


def test_step_list() -> None:
    steps = [1000, 750, 500, 250]
    used = (1000.0, 937.5, 833.3333333333, 625.0)
    assert health.step_list_error(used, steps, 5.0) == pytest.approx(0.0, abs=1e-6)
    assert health.step_list_error([float(s) for s in steps], steps, 5.0) == pytest.approx(375.0)  # 750: 3/8
    assert health.step_list_error(used[:3], steps, 5.0) == math.inf
    assert health.step_list_error((), [], 5.0) == 0.0


# --- updates -------------------------------------------------------------------------------------------------


def test_moved_fraction_and_update_ratio() -> None:
    weights = [torch.full((3, 4), 2.0), torch.zeros(8)]
    before = Moved(weights)
    weights[0][0] += 1.0
    found = measured(before.parts("critic"))
    assert found == pytest.approx({"moved/critic": 4 / 20, "update_ratio/critic": math.sqrt(4 / 48)})


def test_shards_sum_to_the_whole() -> None:
    whole = normal(1, 10, 4)
    shards, empty = [whole[:8].clone(), whole[8:].clone()], torch.zeros(0, 4)
    before = [Moved([shards[0]]), Moved([shards[1], empty]), Moved([empty])]
    everything = Moved([whole])
    for tensor in (whole[:3], shards[0][:3]):
        tensor.mul_(1.5)
    parts = [each.parts("x") for each in before]
    assert averaged(*parts) == pytest.approx(measured(everything.parts("x")))


def test_an_update_that_rounds_away_does_not_move() -> None:
    narrow, wide = torch.ones(6, dtype=torch.bfloat16), torch.ones(6)
    before = [Moved([narrow]), Moved([wide])]
    narrow += 1e-4
    wide += 1e-4
    assert [measured(each.parts("x"))["moved/x"] for each in before] == [0.0, 1.0]


def test_a_sample_of_the_weights_stands_for_all() -> None:
    weights = torch.ones(100, 10)
    before = Moved([weights], most=100)
    weights[:50] = 2.0
    parts = before.parts("x")
    assert float(parts["moved/x#n"]) == 100 and measured(parts)["moved/x"] == 0.5


def test_weights_that_cannot_be_viewed_are_refused() -> None:
    """A copy would show the old weights for ever."""
    with pytest.raises(RuntimeError, match="view"):
        Moved([torch.ones(4, 6).t()])


def test_gate_norms() -> None:
    modulation = torch.zeros(6, 4)
    modulation[2], modulation[5] = 3.0, torch.tensor([0.0, 2.0, 0.0, 2.0])
    expected = pytest.approx({"gate/attention": math.sqrt(4.5), "gate/ffn": 1.0})
    assert measured(health.gate_norms([(modulation, 0), (torch.zeros(6, 4), 0)])) == expected
    for split in range(7):  # rows on two ranks, of which one may hold no gate, or no row at all
        ranks = [health.gate_norms([(each[rows], rows.start) for each in (modulation, torch.zeros(6, 4))])
                 for rows in (slice(0, split), slice(split, 6))]
        assert averaged(*ranks) == expected


def test_plain_blocks_have_no_gates() -> None:
    assert measured(health.gate_norms([])) == {}


def test_combined_keeps_what_is_no_part() -> None:
    assert combined({"loss/dmd": 0.5, "a#x": 6.0, "a#n": 3.0, "b#x": 0.0, "b#n": 0.0}) == {"loss/dmd": 0.5, "a": 2.0}


def test_spread_of_a_constant_is_zero() -> None:
    """Rounding may leave a mean square below the squared mean."""
    assert combined({"a#x": 3.0, "a#xx": 9.0 - 2e-15}) == {"a/mean": 3.0, "a/std": 0.0}
    assert math.isnan(combined({"a#x": math.nan, "a#xx": math.nan})["a/std"])

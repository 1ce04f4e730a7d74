"""Which procedural worlds there can be: pictures with room for the shapes that move in them."""

from __future__ import annotations

from mirai_dist.config.schema import Video, World

PIXELS_PER_LATENT = 8


def impossible(world: World, video: Video) -> str:
    """What is wrong with a world for pictures of this size, and the way out; empty: nothing."""
    largest, travel = world.radius + world.radius_jitter, world.speed * (video.latent_frames - 1)
    side = PIXELS_PER_LATENT * min(video.latent_height, video.latent_width)
    if world.radius_jitter < 0 or world.radius - world.radius_jitter <= 0:
        what = f"world.radius {world.radius:g} +- {world.radius_jitter:g} is not positive"
        return f"{what}: lower world.radius_jitter"
    if world.speed <= 0 or side <= 2 * largest:
        what = f"world.radius {largest:g} and speed {world.speed:g} do not fit {side} pixels"
        return f"{what}: need a positive speed and a shape smaller than the picture"
    if world.level == "free" and side - 2 * largest <= travel:
        what = f"world.level free: a shape of half extent {largest:g} moving {travel:g} pixels in {video.latent_frames}"
        what = f"{what} latent frames has no free start in {side} pixels"
        return f"{what}: lower world.speed or world.radius, or set world.level=bounce"
    return ""

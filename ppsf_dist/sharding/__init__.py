"""What a shard is, the reduction of one flat buffer, and how ranks tell each other of a failure."""

from ppsf_dist.sharding.geometry import Box, flat_range, whole
from ppsf_dist.sharding.outcome import from_every_rank, raise_failures, together, told_by_first
from ppsf_dist.sharding.shard import Shard, plain_shard
from ppsf_dist.sharding.team import Team, everyone, team_of_ranks

__all__ = [
    "Box",
    "Shard",
    "Team",
    "everyone",
    "flat_range",
    "from_every_rank",
    "plain_shard",
    "raise_failures",
    "team_of_ranks",
    "together",
    "told_by_first",
    "whole",
]

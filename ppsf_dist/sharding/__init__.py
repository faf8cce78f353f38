"""What a shard is, and the reduction of one flat buffer."""

from ppsf_dist.sharding.geometry import Box, flat_range, whole
from ppsf_dist.sharding.shard import Shard, plain_shard
from ppsf_dist.sharding.team import Team, team_of_ranks

__all__ = ["Box", "Shard", "Team", "flat_range", "plain_shard", "team_of_ranks", "whole"]

"""What a shard is, which ones there are, the reduction of one flat buffer, and how ranks tell of a failure."""

from ppsf_dist.sharding.finding import (
    check_calling_framework,
    drop_gathered_copies,
    drop_gathered_weights,
    find_shards,
    find_team,
    refuse_unsupported,
)
from ppsf_dist.sharding.geometry import Box, flat_range, whole
from ppsf_dist.sharding.layouts import Group, Layout, Member, Part, State, find_layout
from ppsf_dist.sharding.outcome import from_every_rank, raise_failures, together, told_by_first
from ppsf_dist.sharding.placement import Placement, placement_of
from ppsf_dist.sharding.registry import register
from ppsf_dist.sharding.shard import Shard, plain_shard
from ppsf_dist.sharding.team import Team, everyone, team_of_ranks

__all__ = [
    "Box",
    "Group",
    "Layout",
    "Member",
    "Part",
    "Placement",
    "Shard",
    "State",
    "Team",
    "check_calling_framework",
    "drop_gathered_copies",
    "drop_gathered_weights",
    "everyone",
    "find_layout",
    "find_shards",
    "find_team",
    "flat_range",
    "from_every_rank",
    "placement_of",
    "plain_shard",
    "raise_failures",
    "refuse_unsupported",
    "register",
    "team_of_ranks",
    "together",
    "told_by_first",
    "whole",
]

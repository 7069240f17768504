"""Ownership, rules, plan and shards: which rank computes, holds and sends what."""

from disco.partition.cluster import Cluster, Link, Node
from disco.partition.cluster_plan import plan_for, shares_for
from disco.partition.exchange_plan import ExchangePlan
from disco.partition.plan import LayerPlan, Plan
from disco.partition.planner import Decisions, build_all, decide
from disco.partition.rank_builder import RankProgram
from disco.partition.share_choice import Problem
from disco.partition.wire_programs import with_wire_dtype

__all__ = [
    "Cluster",
    "Decisions",
    "ExchangePlan",
    "LayerPlan",
    "Link",
    "Node",
    "Plan",
    "Problem",
    "RankProgram",
    "build_all",
    "decide",
    "plan_for",
    "shares_for",
    "with_wire_dtype",
]

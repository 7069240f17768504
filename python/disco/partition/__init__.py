"""Ownership, rules, plan and shards: which rank computes, holds and sends what."""

from disco.partition.cluster import Cluster, Link, Node
from disco.partition.cluster_plan import Problem, choose_shares, plan_for
from disco.partition.plan import ExchangePlan, LayerPlan, Plan
from disco.partition.planner import Decisions, build_all, decide
from disco.partition.rank_builder import RankProgram

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
    "choose_shares",
    "decide",
    "plan_for",
]

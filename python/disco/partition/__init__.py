"""Ownership, rules, plan and shards: which rank computes, holds and sends what."""

from disco.partition.plan import ExchangePlan, LayerPlan, Plan
from disco.partition.planner import Decisions, build_all, decide
from disco.partition.rank_builder import RankProgram

__all__ = ["Decisions", "ExchangePlan", "LayerPlan", "Plan", "RankProgram", "build_all", "decide"]

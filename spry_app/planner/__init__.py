"""What a run would take on a device, before it starts and without its weights: every way to a gradient, and which one
to take.
"""

from spry_app.planner.advice import Advice
from spry_app.planner.plan import Asked, Plan, plan
from spry_app.planner.rows import Row

__all__ = ["Advice", "Asked", "Plan", "Row", "plan"]

"""What policies act in, and where their tasks come from.

A job names one of each: `learner.environment: metadist.environments:Navigation` (or a mapping of `name` and options),
`data.source: metadist.environments:Goals`; or its own `module:callable`.
"""

from metadist.environments.environment import Environment, Parameters, Step
from metadist.environments.gymnasium import Gymnasium, Variations
from metadist.environments.navigation import Goals, Navigation
from metadist.environments.point_mass import Directions, PointMass, Velocities

__all__ = [
    "Directions", "Environment", "Goals", "Gymnasium", "Navigation", "Parameters", "PointMass", "Step", "Variations",
    "Velocities",
]  # fmt: skip

"""Which study a game has."""

from .config import TOY_GAMES, RideConfig
from .gan import gan_study
from .polynomial_study import polynomial_study
from .shapes_study import shapes_study
from .study import Study
from .toy import toy_study


def make_study(config: RideConfig) -> Study:
    """The study of a configuration that is resolved."""
    if config.game in TOY_GAMES:
        return toy_study(config)
    if config.game == "gan":
        return gan_study(config)
    return polynomial_study(config) if config.game == "polynomial" else shapes_study(config)

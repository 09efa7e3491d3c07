"""What a job says (`schema`), how it is read (`load`), and the objects it means (`build`)."""

from metadist.config.load import dump_config, load_config
from metadist.config.schema import Config

__all__ = ["Config", "dump_config", "load_config"]

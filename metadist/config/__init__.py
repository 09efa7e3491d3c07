"""What a job says (`schema`), how it is read (`load`), and the objects it means (`build`)."""

from metadist.config.load import dump_config, given_settings, load_config, split_arguments
from metadist.config.schema import Config

__all__ = ["Config", "dump_config", "given_settings", "load_config", "split_arguments"]

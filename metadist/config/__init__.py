"""What a job may say (`schema`), and how it is read and written (`load`, `yaml`)."""

from metadist.config.load import dump_config, given_settings, load_config, shown, split_arguments
from metadist.config.schema import Config

__all__ = ["Config", "dump_config", "given_settings", "load_config", "shown", "split_arguments"]

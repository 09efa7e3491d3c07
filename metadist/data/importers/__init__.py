"""From what people have (zips, image folders, tables, text) to a dataset directory: one function per family.

Each takes `out` (the directory to write), `overwrite` (replace a dataset that is there) and `progress`, returns the
directory's path, raises InputError in one sentence, and leaves nothing behind when it does not succeed. A new one is a
file and its two lines here: its command is made from its signature and docstring, and without a `source` it is a
built-in family, `data.family`.
"""

from metadist.data.importers.cifar_fs import cifar_fs
from metadist.data.importers.digits import digits
from metadist.data.importers.images import images
from metadist.data.importers.omniglot import omniglot
from metadist.data.importers.sinusoid import sinusoid
from metadist.data.importers.table import table
from metadist.data.importers.text import text

__all__ = ["cifar_fs", "digits", "images", "omniglot", "sinusoid", "table", "text"]

"""Dataset builders: any record file, or the public hh-rlhf set, prepared once and then read by index.

Importing this package needs the `datasets` extra (tensorflow-datasets and array-record); TensorFlow itself is
never imported.
"""

from rlhf_jax.data.builders.hh import HHPreferences
from rlhf_jax.data.builders.local import Demonstrations, Preferences, Prompts, Rankings
from rlhf_jax.data.builders.source import RecordSource, open_source, prepare

__all__ = [
    "Demonstrations",
    "HHPreferences",
    "Preferences",
    "Prompts",
    "Rankings",
    "RecordSource",
    "open_source",
    "prepare",
]

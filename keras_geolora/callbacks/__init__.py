"""Callbacks that show, check, cut and compact adapters during training."""

from keras_geolora.callbacks.epoch_compaction import EpochCompaction
from keras_geolora.callbacks.epoch_cut import EpochCut
from keras_geolora.callbacks.rank_history import RankHistory
from keras_geolora.callbacks.rank_logger import RankLogger
from keras_geolora.callbacks.rank_tensor_board import RankTensorBoard
from keras_geolora.callbacks.silent_failure_guard import SilentFailureGuard

__all__ = [
    "EpochCompaction",
    "EpochCut",
    "RankHistory",
    "RankLogger",
    "RankTensorBoard",
    "SilentFailureGuard",
]

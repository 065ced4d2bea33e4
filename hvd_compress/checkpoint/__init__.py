"""Checkpoints of a whole job: a safetensors file a rank and a small JSON, checked before anything is loaded."""

from hvd_compress.checkpoint.background import PendingSave
from hvd_compress.checkpoint.files import CheckpointError
from hvd_compress.checkpoint.loading import load
from hvd_compress.checkpoint.saving import save

__all__ = ["CheckpointError", "PendingSave", "load", "save"]

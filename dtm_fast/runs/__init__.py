"""The run directory: a journal of finished measurements, and what was made of them."""

from dtm_fast.runs.directory import RunDirectory
from dtm_fast.runs.journal import SCHEMA_VERSION, Journal

__all__ = ["SCHEMA_VERSION", "Journal", "RunDirectory"]

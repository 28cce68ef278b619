"""Records of steps, and the journal that keeps them: plain bytes, read without torch."""

from jaguar.record.record import Record as Record
from jaguar.record.record import mean as mean

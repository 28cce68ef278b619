"""Records of steps, and the journal that keeps them: plain bytes, read without torch."""

from jaguar.record.header import DamagedJournal as DamagedJournal
from jaguar.record.journal import JOURNAL as JOURNAL
from jaguar.record.journal import Journal as Journal
from jaguar.record.mark import Mark as Mark
from jaguar.record.record import Record as Record
from jaguar.record.record import mean as mean

"""One page, or the same as data, on one or several records: what moved, since when, and how that is known."""

from diffsensor.report.page import describe as describe
from diffsensor.report.page import write_report as write_report

"""Where alerts go beside the record."""

from diffsensor.sinks.calls import Calls as Calls
from diffsensor.sinks.log import LogAlerts as LogAlerts
from diffsensor.sinks.webhook import Webhook as Webhook

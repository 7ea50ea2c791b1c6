"""What every test takes for granted: SIGINT interrupts, also where the runner was started in the background."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)

"""`python -m local.up`: start the whole platform, say when it is ready, keep it up until SIGINT or SIGTERM."""

import contextlib
import datetime
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator

from dotenv import find_dotenv, load_dotenv
from honcho.colour import get_colours
from honcho.printer import Message, Printer

from local import platform
from local.platform import CannotStart
from local.ports import PortTaken
from local.processes import ProcessEnded, Processes
from local.settings import load
from tasks.settings import SettingsError

#: A process that ends is started again after a pause, but not the third time within a minute.
MOST_ENDS = 3
WITHIN_S = 60.0
PAUSE_S = 1.0
#: The name in front of our own lines.
US = "platform"


class Screen:
    """Lines in honcho's form: time, name in a colour of its own, text."""

    def __init__(self) -> None:
        self._printer = Printer(sys.stdout)
        self._printer.width = max(map(len, [US, *platform.procfile()]))
        self._fresh: Iterator[str] = iter(get_colours())
        self._colours: dict[str, str | None] = {US: None}

    def show(self, name: str, line: str) -> None:
        """Print a line that a process said."""
        if name not in self._colours:
            self._colours[name] = next(self._fresh)
        message = Message("line", line, datetime.datetime.now(), name, self._colours[name])
        # The terminal or the reader of our pipe may be gone; that is no reason to stop serving.
        with contextlib.suppress(OSError):
            self._printer.write(message)

    def say(self, line: str) -> None:
        """Print a line of our own."""
        self.show(US, line)


def stay(processes: Processes, screen: Screen) -> None:
    """Start again what ends by itself. Raises ProcessEnded for one that cannot stay up."""
    commands = platform.procfile()
    ends: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MOST_ENDS))
    while True:
        time.sleep(PAUSE_S)
        process = processes.ended()
        if process is None:
            continue
        last = ends[process.name]
        last.append(time.monotonic())
        hopeless = len(last) == MOST_ENDS and last[-1] - last[0] < WITHIN_S
        if hopeless or process.exit_code == os.EX_CONFIG:
            raise ProcessEnded(process.obituary())
        screen.say(f"{process.name} ended with exit code {process.exit_code}; it is started again")
        processes.start(process.name, commands[process.name])


def main() -> None:
    """Exit code 0 after a signal, 1 if the platform cannot start or stay up."""
    load_dotenv(find_dotenv(usecwd=True))
    platform.interrupt_on_signals()
    screen = Screen()
    try:
        settings = load(os.environ)
        with platform.running(settings, os.environ, screen.say, screen.show) as processes:
            screen.say("everything is up; Ctrl-C ends it")
            screen.say(f"API        {settings.api_url}/api/v1/jobs")
            screen.say(f"console    {settings.api_url}/console")
            screen.say(f"docs       {settings.api_url}/docs")
            screen.say(f"Flower     {settings.flower_url}")
            screen.say(f"gpu_admin  {settings.gpu_admin_url}/docs")
            stay(processes, screen)
    except KeyboardInterrupt:
        pass
    except (SettingsError, PortTaken, CannotStart, ProcessEnded) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

"""Logging: every record, ours and the libraries', through structlog to standard error.

So do warnings, and exceptions that nobody caught, so that each is one line too.
"""

from __future__ import annotations

import logging
import logging.config
import sys
import threading
from types import TracebackType
from typing import Literal

import structlog


def configure_logging(level: str, style: Literal["console", "json"]) -> None:
    """Send all logs to standard error as ``style``, with the request id where there is one."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.typing.Processor]
    if style == "json":
        renderer = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # The fancier formatters print local variables, and with them prompts and keys.
        plain = structlog.dev.plain_traceback
        colors = sys.stderr.isatty()
        renderer = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "structlog": {
                    "()": structlog.stdlib.ProcessorFormatter,
                    "foreign_pre_chain": shared,
                    "processors": [
                        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                        *renderer,
                    ],
                }
            },
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": "structlog"},
            },
            "root": {"handlers": ["stderr"], "level": level.upper()},
            # One line a request comes from our own middleware.
            "loggers": {
                "uvicorn.access": {"level": "WARNING"},
                "alembic": {"level": "WARNING"},  # it tells of its own steps at every start
            },
        }
    )
    logging.captureWarnings(True)
    if style == "json":
        _log_uncaught()


def adopt_library_loggers() -> None:
    """Have records of libraries that write to the terminal themselves go where ours go.

    To be called once those libraries are imported, which is when they set that up.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
                logger.removeHandler(handler)
                logger.propagate = True


def hide_progress_bars() -> None:
    """Show none of those that libraries draw while a model loads: they are no log records."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _log_uncaught() -> None:
    """Log exceptions that end the process or a thread, or that came where none can be raised."""
    logger = logging.getLogger("uncaught")

    def on_exit(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            logger.critical("the process ends", exc_info=(kind, error, trace))

    def on_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            name = args.thread.name if args.thread else "unknown"
            logger.critical("thread %s ends", name, exc_info=args.exc_value)

    def on_unraisable(args: sys.UnraisableHookArgs) -> None:
        # The object's repr is left out: it may hold anything.
        logger.error("ignored an exception", exc_info=args.exc_value)

    sys.excepthook, threading.excepthook, sys.unraisablehook = on_exit, on_thread, on_unraisable

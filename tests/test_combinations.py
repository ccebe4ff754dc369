"""Any option of any axis goes with any preset, or is refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from policylab.config.build import check_parts, instantiate
from policylab.errors import UserError

ALGO = Path(__file__).parent.parent / "configs" / "algo"
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in ALGO.glob("*/*.yaml"))
#: One of each kind: a critic and several updates, a group and one update, the KL in the loss, a trust region.
PRESETS = (
    "ppo",
    "grpo",
    pytest.param("rloo", marks=pytest.mark.slow),
    pytest.param("trpo", marks=pytest.mark.slow),
)
REASONS = r"needs a critic|right for one update|reads neither|algo/reference is none|compares completions|trust region"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_fits_or_is_refused_with_the_reason(compose, preset, option):
    needed = ["algo.critic.init=some/folder"] if option == "critic=reward_model" else []
    config = compose([f"algo={preset}", f"algo/{option}", *needed])
    check_parts(config)  # no key of the preset is left over where the option has none
    try:
        instantiate(config.algo)
    except UserError as refusal:
        assert re.search(REASONS, str(refusal)), refusal

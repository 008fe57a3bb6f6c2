"""The shared cases on a device; skipped with the reason where there is none (LORS_REQUIRE=triton,cuda: a failure)."""

from __future__ import annotations

from gpu_suite import *

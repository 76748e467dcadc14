"""Which tests guard which module, and the mutants that no test can kill."""

from __future__ import annotations

# Module below shoulders/ -> the tests of its arithmetic, the fastest first.
TESTS: dict[str, tuple[str, ...]] = {
    "optimizers.py": ("tests/test_optimizers.py",),
    "student/adapters.py": (
        "tests/student/test_initial_weights.py",
        "tests/student/test_adapters.py",
        "tests/student/test_encoder.py",
    ),
    "student/base.py": ("tests/student/test_base.py", "tests/student/test_ladder.py"),
    "student/config.py": ("tests/student/test_config.py",),
    "student/convolutions.py": ("tests/student/test_adapters.py", "tests/student/test_encoder.py"),
    "student/encoder.py": (
        "tests/student/test_encoder_reference.py",
        "tests/student/test_encoder.py",
        "tests/student/test_ladder.py",
    ),
    "student/families.py": (
        "tests/student/test_encoder_reference.py",
        "tests/student/test_encoder.py",
        "tests/student/test_base.py",
    ),
    "student/kinds.py": ("tests/student/test_adapters.py", "tests/student/test_encoder.py"),
    "student/ladder.py": ("tests/student/test_adapters.py", "tests/student/test_encoder.py"),
    "tasks/average_precision.py": ("tests/tasks/test_average_precision.py", "tests/tasks/data/test_coco.py"),
    "training/optimizers.py": ("tests/training/test_optimizers.py",),
    "transfer/balance.py": ("tests/transfer/test_balance.py", "tests/transfer/test_losses.py"),
    "transfer/distances.py": ("tests/transfer/test_distances.py", "tests/transfer/test_losses.py"),
    "transfer/fvu.py": ("tests/transfer/test_fvu_reference.py", "tests/transfer/test_fvu.py"),
    "transfer/losses.py": ("tests/transfer/test_losses_reference.py", "tests/transfer/test_losses.py"),
    "transfer/projectors.py": (
        "tests/transfer/test_projectors_reference.py",
        "tests/transfer/test_projectors.py",
        "tests/transfer/test_losses.py",
    ),
    "transfer/standardize.py": ("tests/transfer/test_standardize_reference.py", "tests/transfer/test_standardize.py"),
}

# (module, function, before, after) -> why no test can kill it.
EQUIVALENT: dict[tuple[str, str, str, str], str] = {}

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
    "student/convolutions.py": (
        "tests/student/test_adapters.py",
        "tests/student/test_initial_weights.py",
        "tests/student/test_encoder_reference.py",
        "tests/student/test_encoder.py",
    ),
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
    "student/ladder.py": (
        "tests/student/test_adapters.py",
        "tests/student/test_initial_weights.py",
        "tests/student/test_encoder.py",
    ),
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
EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    (
        "optimizers.py",
        "MuonAdamW.__init__",
        "p.detach()",
        "p.view",
    ): "A parameter made of a view has no history: nn.Parameter detaches.",
    ("optimizers.py", "MuonAdamW.__init__", "fused=True", "fused=False"): "Speed only.",
    ("optimizers.py", "ema_update", "value.detach()", "(average, value)"): "Torch's update runs without gradient.",
    (
        "optimizers.py",
        "ema_update",
        "isinstance(pair[0], DTensor) == sharded",
        "isinstance(pair[0], DTensor) != sharded",
    ): "Only the order of the two lists changes.",
    ("optimizers.py", "ema_update", "pair[0]", "pair[1]"): "Average and value are both sharded or both whole.",
    (
        "optimizers.py",
        "ema_update",
        "update([average for average, _ in alike], [value for _, value in alike], 0)",
        "update([average for average, _ in alike], [value for _, value in alike], 1)",
    ): "Torch's update ignores how many values were averaged.",
    (
        "student/adapters.py",
        "LowRank.__init__",
        "nn.init.kaiming_uniform_(self.a.weight, a=5 ** 0.5)",
        "pass",
    ): "The same distribution as nn.Linear's own; the draws alone differ.",
    ("student/encoder.py", "Encoder.__init__", "optimize_for_inference(self.base)", "pass"): "Speed only.",
    ("student/encoder.py", "Encoder.run_base", "-2", "pixels.shape[2]"): "Pixels have four dimensions.",
    (
        "student/ladder.py",
        "Ladder.adapt",
        "0.0",
        "1.0",
    ): "A constant over all channels: each LayerNorm after it removes it.",
    (
        "student/convolutions.py",
        "Convolutions.adapt",
        "pixels.contiguous(memory_format=torch.channels_last)",
        "self.stem(pixels)",
    ): "Speed only.",
    (
        "student/convolutions.py",
        "Convolutions.adapt",
        "2:",
        "3:",
    ): "A map of the grid's size is then resized to its own size.",
    (
        "training/optimizers.py",
        "Optimizers.step",
        "self.train.ema or 0.0",
        "self.train.ema or 1.0",
    ): "Without ema there is no average that the decay could change.",
    (
        "training/optimizers.py",
        "Optimizers.ema_weights",
        "self.parameters[name].detach()",
        "self.parameters[name]",
    ): "The copy is read without gradient.",
    (
        "training/optimizers.py",
        "_empty_state",
        "torch.zeros_like(replicate(held))",
        "torch.ones_like(replicate(held))",
    ): "`restore` overwrites it.",
    (
        "training/optimizers.py",
        "_empty_state",
        "torch.zeros((), device=held.device)",
        "torch.ones((), device=held.device)",
    ): "`restore` overwrites it.",
    (
        "training/optimizers.py",
        "_empty_state",
        "torch.zeros_like(held)",
        "torch.ones_like(held)",
    ): "`restore` overwrites it.",
    ("transfer/balance.py", "dropping", "losses.detach()", "losses.argmax"): "An index has no gradient.",
    (
        "transfer/fvu.py",
        "_ridge_maps",
        "values.clamp_min(0)",
        "values + ridge",
    ): "Eigenvalues below 0 are rounding, of 1e-16 beside a ridge of 1e-6 or more.",
    (
        "transfer/fvu.py",
        "channel_standardized",
        "std > 1e-06 * (1 + mean.abs())",
        "std >= 1e-06 * (1 + mean.abs())",
    ): "They differ at one floating point number.",
    (
        "transfer/fvu.py",
        "channel_standardized",
        "torch.where(live, std, 1.0)",
        "torch.where(live, std, 2.0)",
    ): "It only avoids a division by 0; the outer `where` replaces the result.",
    (
        "transfer/losses.py",
        "teacher_losses",
        "name.split('/', 1)",
        "name.split('/', 2)",
    ): "The teacher is the first part of the tap either way.",
    (
        "transfer/projectors.py",
        "JointToStudent._latent",
        "torch.zeros(())",
        "torch.ones(())",
    ): "A constant over all channels, which the LayerNorm removes. (Of `count`, a test fails.)",
    (
        "transfer/projectors.py",
        "avg_pool_grid",
        "F.avg_pool2d(maps, factor) if divides else F.adaptive_avg_pool2d(maps, grid)",
        "F.adaptive_avg_pool2d(maps, grid)",
    ): "The same windows; avg_pool2d is faster.",
    (
        "transfer/standardize.py",
        "Standardizer.fit",
        "covariance.diagonal().clamp_min(0)",
        "covariance.diagonal()",
    ): "A variance below 0 is rounding, and below the limit either way.",
    (
        "transfer/standardize.py",
        "Standardizer.fit",
        "variance > tiny",
        "variance >= tiny",
    ): "They differ at one floating point number.",
    (
        "transfer/standardize.py",
        "equal_variance_rotation",
        "width - 1",
        "width - 2",
    ): "They differ at width 1 alone, where both rotations are 1.",
    (
        "transfer/standardize.py",
        "equal_variance_rotation",
        "variances.clamp_min(0)",
        "_givens_equalizer(variances)",
    ): "A variance below 0 is rounding.",
    (
        "transfer/standardize.py",
        "_givens_equalizer",
        "len(todo) > 1",
        "len(todo) >= 1",
    ): "The last channel has the mean variance: the loop ends there.",
    ("transfer/standardize.py", "_givens_equalizer", "1e-12 * target", "2e-12 * target"): "A tolerance for rounding.",
    (
        "transfer/standardize.py",
        "_givens_equalizer",
        "-c + (c * c - (a - target) * (b - target)).clamp_min(0).sqrt()",
        "-c - (c * c - (a - target) * (b - target)).clamp_min(0).sqrt()",
    ): "The other root of the same equation, as good as the first.",
    (
        "transfer/standardize.py",
        "_givens_equalizer",
        "-c",
        "c + (c * c - (a - target) * (b - target)).clamp_min(0).sqrt()",
    ): "c is 0: channels that are not done have no covariance.",
    (
        "transfer/standardize.py",
        "_givens_equalizer",
        "(c * c - (a - target) * (b - target)).clamp_min(0)",
        "c * c - (a - target) * (b - target)",
    ): "a <= target <= b: the product is never positive.",
    (
        "transfer/standardize.py",
        "_givens_equalizer",
        "todo.remove(low)",
        "pass",
    ): "A channel that is done has the mean variance and is not selected again.",
}

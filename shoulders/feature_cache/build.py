"""Building a cache: images are decoded once for all teachers, and the teachers are loaded one after another.

A builder locks as many shards as fit into memory as pixels, decodes their images, and runs one teacher after the other
on them. Any number of builders can work on one cache, whether started by torchrun or by hand. A lock ends with the
process that holds it, so the shards of a killed builder are computed by the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee

import numpy as np
from torch import Tensor
from tqdm import tqdm
from zlib_ng import zlib_ng

from shoulders.errors import DataError, Interrupted
from shoulders.feature_cache.codec import Codec, EncodeError
from shoulders.feature_cache.index import Numbers, RecordIndex
from shoulders.feature_cache.layout import write_layout
from shoulders.feature_cache.metadata import MANIFEST, SHARD
from shoulders.feature_cache.records import Bytes, pack
from shoulders.feature_cache.shard_files import write_shard
from shoulders.feature_cache.spec import SHARD_RECORDS, CacheSpec
from shoulders.feature_cache.teacher_runner import TeacherRunner, numeric_error
from shoulders.feature_cache.teacher_store import TeacherStore
from shoulders.feature_cache.verify import write_manifest
from shoulders.features import Batch
from shoulders.images import SkipReport
from shoulders.storage.locks import FileLocks
from shoulders.training.masked import FILE as NOT_FINITE_FILE
from shoulders.training.masked import Masked, MaskReport, count_images


@dataclass(frozen=True)
class BuildSettings:
    """How the work of a build is divided.

    Args:
        shard_records: number of records in a shard.
        batch: number of images to decode at a time; divides ``shard_records``.
        block_bytes: of decoded pixels in memory, unless one shard has more.
        max_block_shards: number of shards that one builder locks at a time; the others are left to other builders.
        poll_s: seconds between two attempts to lock a shard that another builder holds.
    """

    shard_records: int = SHARD_RECORDS
    batch: int = 128
    block_bytes: int = 2**30
    max_block_shards: int = 64
    poll_s: float = 0.5


DEFAULT_SETTINGS = BuildSettings()


class Builder:
    """One process that computes shards of a cache.

    Args:
        spec: of the cache.
        settings: how the work is divided.
        log: prints one line.
        signals: those that were received so far, see `catch_signals`.

    Raises:
        DataError: the cache has shards of another number of records.
    """

    def __init__(
        self, spec: CacheSpec, settings: BuildSettings, log: Callable[[str], None], signals: Sequence[int] = ()
    ) -> None:
        self.spec, self.settings, self.log, self.signals = spec, settings, log, signals
        self.locks = FileLocks(spec.path / ".locks")
        images, max_unreadable = spec.images.collection, spec.recipe.images.max_unreadable
        self.skipped = SkipReport(spec.path / "skipped.jsonl", len(images), max_unreadable)
        totals = count_images(spec.indices, spec.recipe.teacher_sources, images)
        limit = spec.recipe.transfer.max_not_finite
        self.masked = MaskReport(spec.path / NOT_FINITE_FILE, totals, limit, images.name_of_id, log)
        self.masked.resume()
        for name in filter(spec.has_layout, spec.fingerprints):
            store = spec.store(name)
            if store.shards.counts != spec.counts[name]:
                raise DataError(f"{store.folder}: has shards of another size; remove it, or build another cache")

    def compute_shards(self) -> None:
        """Return when every shard of every teacher exists, computed by this process or by another one.

        Raises:
            Interrupted: after SIGTERM, SIGINT or SIGUSR1.
            DataError: more images are unreadable than ``images.max_unreadable`` allows; complete shards are kept.
            NumericError: as `MaskReport.add`, or features that float16 cannot hold.
        """
        self.spec.path.mkdir(parents=True, exist_ok=True)
        names, has_logged = self.spec.unfinished(), False
        views = sum(map(self.spec.missing_records, names))
        with tqdm(total=views, unit=" views", leave=False, disable=None) as bar:
            while missing := self.spec.missing_by_shard(names):
                with ExitStack() as locks:
                    block = self._lock_block(missing, locks)
                    if block:
                        self._compute_block(block, bar)
                        continue
                self._stop_if_signalled()
                if not has_logged:
                    self.log(f"waiting for {self.locks.holder(SHARD.format(min(missing)))}")
                    has_logged = True
                time.sleep(self.settings.poll_s)

    def write_manifests(self) -> None:
        """Verify all shards and write the manifests; one process does it, and the others wait.

        Raises:
            Interrupted: after SIGTERM, SIGINT or SIGUSR1.
        """
        while names := self.spec.unfinished():
            with self.locks.claim("finish") as is_ours:
                if is_ours:
                    views = sum(len(self.spec.indices[name]) for name in names)
                    with tqdm(total=views, unit=" records", leave=False, disable=None) as bar:
                        for name in names:
                            write_manifest(self.spec.store(name), partial(self._advance, bar))
            if not is_ours:
                self._stop_if_signalled()
                time.sleep(self.settings.poll_s)

    def _advance(self, bar: tqdm, records: int) -> None:
        bar.update(records)
        self._stop_if_signalled()

    def _stop_if_signalled(self) -> None:
        if self.signals:
            raise Interrupted(self.signals[0])

    def views_to_draw(self, names: Iterable[str]) -> int:
        """Number of views in the missing shards of some teachers."""
        return sum(len(self.spec.shard_range(shard)) for shard in self.spec.missing_by_shard(names))

    def block_views(self) -> int:
        """Number of views whose pixels are in memory at a time."""
        return min(len(self.spec.index), self._block_shards() * self.spec.shard_records)

    def _block_shards(self) -> int:
        """Number of shards that this process computes at a time."""
        bytes_per_view = sum(3 * h * w for h, w in self.spec.sizes)
        fits = self.settings.block_bytes // (bytes_per_view * self.spec.shard_records)
        return max(1, min(self.settings.max_block_shards, fits))

    def _lock_block(self, missing: dict[int, list[str]], locks: ExitStack) -> dict[int, list[str]]:
        """Lock as many missing shards as fit into memory, among those that no other process has locked."""
        limit = self._block_shards()
        block: list[int] = []
        for shard in missing:
            if len(block) < limit and locks.enter_context(self.locks.claim(SHARD.format(shard))):
                block.append(shard)
        still_missing = self.spec.missing_by_shard(_teachers_of(missing))  # others may have finished some by now
        return {shard: still_missing[shard] for shard in block if shard in still_missing}

    def _compute_block(self, block: dict[int, list[str]], bar: tqdm) -> None:
        """Write some shards: decode their images once, and run one teacher after the other on them."""
        parts = {shard: self._parts(shard) for shard in block}
        numbers = [part for shard_parts in parts.values() for part in shard_parts]
        decoded = zip(numbers, self._report_skipped(self.spec.draw(self.spec.index, numbers)), strict=True)
        names = _teachers_of(block)
        streams = list(tee(decoded, len(names)))
        for name in names:
            stream, runner = streams.pop(0), self.spec.load_runner(name)
            store = self._open_store(name, runner)
            for shard, lacking in block.items():
                batches = islice(stream, len(parts[shard]))
                if name in lacking:
                    size = self.spec.counts[name][shard] * store.shards.record_bytes
                    # if a shard was removed, the new one may differ in the last digits of its features
                    (store.folder / MANIFEST).unlink(missing_ok=True)
                    write_shard(store.shards.path(shard), self._records(store, runner, batches, bar), size)
                else:
                    deque(batches, maxlen=0)

    def _report_skipped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; too many unreadable images stop the build, as they stop training."""
        for batch in batches:
            self.skipped.add(batch.skipped)
            yield batch

    def _parts(self, shard: int) -> list[Numbers]:
        """The records of a shard, divided into batches."""
        records = self.spec.shard_range(shard)
        return _divide(records.start, records.stop, self.settings.batch)

    def _records(
        self, store: TeacherStore, runner: TeacherRunner, batches: Iterable[tuple[Numbers, Batch]], bar: tqdm
    ) -> Iterator[Bytes]:
        """The packed records of one teacher; a record is empty if its image could not be decoded, or its features are
        not finite."""
        for numbers, batch in batches:
            self._stop_if_signalled()
            _, records = store.index.select(self.spec.index.views_of(numbers))
            if not len(records):
                continue
            own_batch = store.index.restrict(batch)
            payload = np.zeros((len(records), store.codec.payload_bytes), np.uint8)
            checksums: list[int | None] = [None] * len(records)
            not_finite: set[int] = set()
            if len(own_batch):
                rows = store.index.records_of(own_batch) - records[0]
                encoded, kept = self._encode(store.codec, runner, own_batch)
                payload[rows[kept]] = encoded.cpu().numpy()
                not_finite = {*rows.tolist()} - {*rows[kept].tolist()}
                for row, pixels in zip(rows, own_batch.rendered[runner.size].numpy(), strict=True):
                    checksums[row] = zlib_ng.crc32(pixels)
            yield pack(payload, checksums, store.index.keys(records), store.salt, not_finite)
            bar.update(len(records))

    def _encode(self, codec: Codec, runner: TeacherRunner, batch: Batch) -> tuple[Tensor, Numbers]:
        """The payloads (b, bytes) of the images of a batch whose features are finite, and their rows (b,) in it."""
        features = runner(batch)
        rows = next(iter(features.values())).rows
        kept = np.arange(len(batch)) if rows is None else rows.cpu().numpy()
        bad = np.setdiff1d(np.arange(len(batch)), kept)
        self.masked.add([Masked(runner.name, int(identity)) for identity in batch.ids.numpy()[bad]])
        try:
            return codec.encode(features), kept
        except EncodeError as error:
            image = self.spec.images.collection.name_of_id(int(batch.ids[kept[error.image]]))
            raise numeric_error(runner.name, error, repr(image)) from error

    def _open_store(self, name: str, runner: TeacherRunner) -> TeacherStore:
        """The store of a teacher; its layout is written now, unless this or another process has done so before."""
        while not self.spec.has_layout(name):
            with self.locks.claim(f"layout-{name}") as is_ours:
                if is_ours and not self.spec.has_layout(name):
                    self._write_layout(name, runner)
            if not is_ours:
                time.sleep(self.settings.poll_s)
        return self.spec.store(name)

    def _write_layout(self, name: str, runner: TeacherRunner) -> None:
        index = self.spec.indices[name]
        layout = write_layout(
            self.spec.folders[name],
            runner,
            partial(self._draw_range, index),
            index.first_heldout,
            self.spec.counts[name],
            self.spec.fingerprints[name],
            self.spec.recipe.cache,
        )
        for field, fvu in layout["reconstruction_fvu"].items():
            self.log(f"  {name}/{field}: reconstruction fvu {fvu:.2e}")

    def _draw_range(self, index: RecordIndex, first: int, end: int) -> Iterator[Batch]:
        return self.spec.draw(index, _divide(first, end, self.settings.batch))


def _divide(first: int, end: int, size: int) -> list[Numbers]:
    """The numbers [first, end) in parts of ``size``; the last one may be smaller."""
    return [np.arange(start, min(start + size, end)) for start in range(first, end, size)]


def _teachers_of(missing: Mapping[int, list[str]]) -> list[str]:
    """The teachers that lack any of the shards, in order."""
    return list(dict.fromkeys(name for names in missing.values() for name in names))

"""Making a cache: images are decoded once for all teachers, teachers are loaded one after another.

A builder claims as many shards as their pixels fit into memory, decodes their images, and takes one teacher after the
other through them. Any number of builders may work on one cache, ranks of torchrun or programs started by hand: claims
are locks on disk that fall with the process that holds them, and what a killed one left undone is taken up.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice, tee

import numpy as np
from torch import Tensor
from tqdm import tqdm
from zlib_ng import zlib_ng

from shoulders.config.recipe import Recipe
from shoulders.distributed.device import this_device, use_bf16
from shoulders.distributed.signals import catch_signals
from shoulders.errors import Interrupted
from shoulders.feature_cache import store
from shoulders.feature_cache.ask import TeacherRunner, refusal
from shoulders.feature_cache.codec import Codec, EncodeError
from shoulders.feature_cache.fingerprint import asked_of, fingerprints, sizes_of
from shoulders.feature_cache.index import Index, Numbers
from shoulders.feature_cache.plan import write_plan
from shoulders.feature_cache.read import TeacherStore, check_fingerprint, command, folder_of, indices_of, views_of
from shoulders.feature_cache.verify import finish
from shoulders.features import Batch
from shoulders.images import SkipReport, listed_batches, open_images
from shoulders.storage.locks import FileLocks
from shoulders.teachers import Teacher
from shoulders.training.preflight import check_teaching

SHARD_RECORDS = 256
BATCH = 128  # images that are decoded at a time: divides a shard
BLOCK_BYTES = 2**30  # of decoded pixels in memory
BLOCK_SHARDS = 64  # at most, so that several builders have something to share
WAIT_S = 0.5


class Builder:
    """One process at work on a cache.

    Args:
        recipe: with a cache.path and a number of views.
        extra_teachers: teachers beside those of the recipe.
        say: for one line at a time.

    Raises:
        RecipeError: the recipe cannot be cached.
        DataError: the folder holds a cache of something else; it is left as it is.
    """

    def __init__(self, recipe: Recipe, extra_teachers: Mapping[str, Teacher], say: Callable[[str], None]) -> None:
        self.recipe, self.extra_teachers, self.say = recipe, dict(extra_teachers), say
        check_teaching(recipe, self.extra_teachers)
        self.path, views = folder_of(recipe), views_of(recipe)
        self.images = open_images(recipe.images, recipe.train.seed)
        asked = asked_of(recipe, self.extra_teachers)
        self.device = this_device(int(os.environ.get("LOCAL_RANK", "0")))
        self.bf16 = use_bf16(recipe.train.precision, self.device)
        self.prints = fingerprints(recipe, asked, self.images, self.bf16)
        self.folders = {name: self.path / one.folder for name, one in asked.items()}
        self.sizes = sizes_of(recipe, asked)
        self.indices = indices_of(recipe, asked, self.images, views)
        self.index = Index(self.images, views)  # of all images: what its shards hold is drawn together
        self.shards = -(-len(self.index) // SHARD_RECORDS)
        self.counts = {name: self._counts(index) for name, index in self.indices.items()}
        for name, fields in self.prints.items():
            if (plan := self.folders[name] / store.PLAN).exists():
                check_fingerprint(plan.parent, store.read_json(plan).get("fingerprint", {}), fields)
        self.claims = FileLocks(self.path / ".locks")
        self.skipped = SkipReport(
            self.path / "skipped.jsonl", len(self.images.collection), recipe.images.max_unreadable
        )
        self.asked_to_stop: list[int] = []

    def _counts(self, index: Index) -> list[int]:
        """The records of a teacher in each shard: of one that is asked about some sources alone, fewer."""
        rows = np.arange(len(self.index))
        if index.home is not None:
            rows, _ = index.counting(self.index.wanted(rows))
        return np.bincount(rows // SHARD_RECORDS, minlength=self.shards).tolist()

    def unfinished(self) -> list[str]:
        """The teachers whose cache is not whole."""
        return [name for name in self.prints if not (self.folders[name] / store.MANIFEST).exists() or self.lacks(name)]

    def shelf(self, name: str) -> TeacherStore:
        """What there is of a teacher, once it is planned."""
        return TeacherStore(
            self.folders[name], self.prints[name], command(self.recipe), self.indices[name], whole=False
        )

    def load(self, name: str) -> TeacherRunner:
        """A live teacher."""
        return TeacherRunner(name, self.recipe, self.extra_teachers, self.bf16, self.device)

    def draw(self, index: Index, parts: list[Numbers]) -> Iterator[Batch]:
        """The views of records, at the sizes of all teachers."""
        wanted = (index.wanted(numbers) for numbers in parts)
        return listed_batches(self.images, wanted, self.sizes, self.recipe.images, self.recipe.train.seed)

    def work(self) -> None:
        """Until every shard of every teacher is there, by this process or another.

        Raises:
            Interrupted: after SIGTERM or SIGINT.
            DataError: more images are unreadable than ``images.max_unreadable`` allows; what is made is kept.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        names, told = self.unfinished(), False
        views = sum(map(self.missing, names))
        with tqdm(total=views, unit=" views", leave=False, disable=None) as bar, catch_signals() as self.asked_to_stop:
            while left := self._shards_left(names):
                with ExitStack() as held:
                    ours = self._claim(left, held)
                    if ours:
                        self._fill(ours, bar)
                        continue
                if self.asked_to_stop:
                    raise Interrupted(self.asked_to_stop[0])
                if not told:
                    self.say(f"waiting for {self.claims.holder(store.SHARD.format(min(left)))}")
                    told = True
                time.sleep(WAIT_S)

    def _shards_left(self, names: list[str]) -> dict[int, list[str]]:
        """Shards that some teacher lacks, with those teachers."""
        left: dict[int, list[str]] = {}
        for name in names:
            for shard in self.lacks(name):
                left.setdefault(shard, []).append(name)
        return dict(sorted(left.items()))

    def lacks(self, name: str) -> list[int]:
        """The shards of a teacher that are not there."""
        if not (self.folders[name] / store.PLAN).exists():
            return [shard for shard, count in enumerate(self.counts[name]) if count]
        shards = self.shelf(name).shards
        return [shard for shard in range(self.shards) if not shards.has(shard)]

    def to_draw(self, names: list[str]) -> int:
        """Views in the shards that some of the teachers lack."""
        return sum(len(part) for shard in self._shards_left(names) for part in self._parts(shard))

    def missing(self, name: str) -> int:
        """Records of the shards that a teacher lacks."""
        return sum(self.counts[name][shard] for shard in self.lacks(name))

    def block_shards(self) -> int:
        """How many shards are worked on together."""
        pixels = sum(3 * h * w for h, w in self.sizes)
        return max(1, min(BLOCK_SHARDS, BLOCK_BYTES // (pixels * SHARD_RECORDS)))

    def block_views(self) -> int:
        """How many views wait in memory, decoded, for the next teacher."""
        return min(len(self.index), self.block_shards() * SHARD_RECORDS)

    def _claim(self, left: dict[int, list[str]], held: ExitStack) -> dict[int, list[str]]:
        """As many of the shards as fit into memory and nobody else is at work on."""
        most = self.block_shards()
        ours: list[int] = []
        for shard in left:
            if len(ours) < most and held.enter_context(self.claims.claim(store.SHARD.format(shard))):
                ours.append(shard)
        now = self._shards_left(_in_order(left))
        return {shard: now[shard] for shard in ours if shard in now}  # some may have been finished before the claim

    def _fill(self, ours: dict[int, list[str]], bar: tqdm) -> None:
        """Write the shards: decode once, and take one teacher after the other through what was decoded."""
        parts = [(shard, part) for shard in ours for part in self._parts(shard)]
        decoded = zip(parts, self._counted(self.draw(self.index, [part for _, part in parts])), strict=True)
        names = _in_order(ours)
        streams = list(tee(decoded, len(names)))
        for name in names:
            stream, asking = streams.pop(0), self.load(name)
            shelf = self._planned(name, asking)
            for shard, lacking in ours.items():
                mine = ((part, batch) for (_, part), batch in islice(stream, len(self._parts(shard))))
                if name in lacking:
                    size = self.counts[name][shard] * shelf.shards.record
                    # a shard that was removed may come back with other last digits
                    (self.folders[name] / store.MANIFEST).unlink(missing_ok=True)
                    store.write_shard(shelf.shards.path(shard), self._records(shelf, asking, mine, bar), size)
                else:
                    deque(mine, maxlen=0)

    def _counted(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; training would refuse too many unreadable images, and so does this."""
        for batch in stream:
            self.skipped.add(batch.skipped)
            yield batch

    def _parts(self, shard: int) -> list[Numbers]:
        first = shard * SHARD_RECORDS
        numbers = np.arange(first, min(first + SHARD_RECORDS, len(self.index)))
        return [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]

    def _records(
        self, shelf: TeacherStore, asking: TeacherRunner, stream: Iterable[tuple[Numbers, Batch]], bar: tqdm
    ) -> Iterator[store.Bytes]:
        """Sealed records of the views asked for; those whose image could not be decoded hold nothing."""
        for numbers, batch in stream:
            if self.asked_to_stop:
                raise Interrupted(self.asked_to_stop[0])
            _, mine = shelf.index.counting(self.index.wanted(numbers))
            if not len(mine):
                continue
            theirs = shelf.index.among(batch)
            payload = np.zeros((len(mine), shelf.codec.bytes), np.uint8)
            seen: list[int | None] = [None] * len(mine)
            if len(theirs):
                rows = shelf.index.of(theirs) - mine[0]
                payload[rows] = self._encode(shelf.codec, asking, theirs).cpu().numpy()
                for row, pixels in zip(rows, theirs.rendered[asking.size].numpy(), strict=True):
                    seen[row] = zlib_ng.crc32(pixels)
            yield store.seal(payload, seen, shelf.index.keys(mine), shelf.salt)
            bar.update(len(mine))

    def _encode(self, codec: Codec, asking: TeacherRunner, batch: Batch) -> Tensor:
        try:
            return codec.encode(asking(batch))
        except EncodeError as error:
            raise refusal(
                asking.name, error, repr(self.images.collection.name_of_id(int(batch.ids[error.row])))
            ) from error

    def _planned(self, name: str, asking: TeacherRunner) -> TeacherStore:
        """The teacher's plan: written now, or by another process, or long ago."""
        while not (self.folders[name] / store.PLAN).exists():
            with self.claims.claim(f"plan-{name}") as ours:
                if ours and not (self.folders[name] / store.PLAN).exists():
                    index = self.indices[name]
                    plan = write_plan(
                        self.folders[name],
                        asking,
                        partial(self._draw_range, index),
                        index.first_heldout,
                        self.counts[name],
                        self.prints[name],
                        self.recipe.cache,
                    )
                    for part, lost in plan["lost"].items():
                        self.say(f"  {name}/{part}: storing loses {lost:.2e} of the variance (fvu)")
            if not ours:
                time.sleep(WAIT_S)
        return self.shelf(name)

    def _draw_range(self, index: Index, first: int, end: int) -> Iterator[Batch]:
        return self.draw(index, [np.arange(start, min(start + BATCH, end)) for start in range(first, end, BATCH)])

    def finish(self) -> None:
        """Read everything back and write the manifests; one process does it, the others wait."""
        while names := self.unfinished():
            with self.claims.claim("finish") as ours:
                if ours:
                    views = sum(len(self.indices[name]) for name in names)
                    with tqdm(total=views, unit=" records", leave=False, disable=None) as bar:
                        for name in names:
                            finish(self.shelf(name), bar.update)
            if not ours:
                time.sleep(WAIT_S)


def _in_order(lacking: Mapping[int, list[str]]) -> list[str]:
    """The teachers that lack any of the shards."""
    return list(dict.fromkeys(name for names in lacking.values() for name in names))

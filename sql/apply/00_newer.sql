-- A sequence number in comparable form: its epoch, then the number. '<number>' has no named epoch, '<number>@<epoch>'
-- has that one; anything else sorts before both.
CREATE OR REPLACE FUNCTION standpipe.place(seq text) RETURNS bigint[] LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN seq ~ '^[0-9]{1,18}$' THEN ARRAY[0, seq::bigint]
        WHEN seq ~ '^[0-9]{1,18}@[0-9]{1,13}$'
            THEN ARRAY[split_part(seq, '@', 2)::bigint, split_part(seq, '@', 1)::bigint]
        ELSE ARRAY[-1, -1]::bigint[]
    END
$$;

-- Whether a version has a named epoch.
CREATE OR REPLACE FUNCTION standpipe.is_named(rev text, seq text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(position('@' IN seq) > 0, coalesce(rev, '') <> '')
$$;

-- Which of two versions of one record or register is newer: the given one, or the one that the row, the tombstone or
-- the register was written with. A strict total order.
--
-- An epoch is the time, by Redis's clock, at which the numbering of an origin began as far as we know; numbers of
-- different epochs are never compared. Versions from before epochs had names are older than everything since, and are
-- ordered by number, then by revision, because the Python reader gives no revisions. All others are ordered by revision
-- (a TID's string order is its time order); those without one, by epoch and number. An entry of the Python reader
-- alongside ours gets a place between our revisions (src/event/epoch.rs), which many entries share: they, too, are
-- ordered by epoch and number. A revision without a number was made by an origin without numbering, and belongs to the
-- latter.
--
-- One revision is one event, whichever relay sends it and however often: a repeat changes nothing. But of several
-- entries of one event the first counts, so that a time taken from the entry's id does not depend on the order of
-- arrival. If there is neither revision nor number to tell events apart, the later entry is newer. Another program's
-- row has none of these, and loses to anything.
CREATE OR REPLACE FUNCTION standpipe.newer(
    rev text, seq text, ms bigint, sq bigint,
    than_rev text, than_seq text, than_ms bigint, than_sq bigint
) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN than_ms IS NULL OR ms IS NULL THEN than_ms IS NULL AND ms IS NOT NULL
        WHEN standpipe.is_named(rev, seq) <> standpipe.is_named(than_rev, than_seq) THEN standpipe.is_named(rev, seq)
        WHEN seq IS DISTINCT FROM than_seq AND NOT standpipe.is_named(rev, seq)
                AND standpipe.place(seq) <> standpipe.place(than_seq)
            THEN standpipe.place(seq) > standpipe.place(than_seq)
        WHEN coalesce(rev, '') <> coalesce(than_rev, '')
            THEN coalesce(rev, '') COLLATE "C" > coalesce(than_rev, '') COLLATE "C"
        WHEN seq IS DISTINCT FROM than_seq AND (coalesce(rev, '') = '' OR right(rev, 1) = '.')
                AND standpipe.place(seq) <> standpipe.place(than_seq)
            THEN standpipe.place(seq) > standpipe.place(than_seq)
        WHEN coalesce(rev, '') = '' AND standpipe.place(seq) = '{-1,-1}'
            THEN (ms, coalesce(sq, 0)) > (than_ms, coalesce(than_sq, 0))
        WHEN ms = than_ms AND coalesce(sq, 0) = coalesce(than_sq, 0)
            THEN standpipe.place(seq) > standpipe.place(than_seq)
        ELSE (ms, coalesce(sq, 0)) < (than_ms, coalesce(than_sq, 0))
    END
$$;

-- For an entry that names no epoch: the number with the epoch in force when the entry was appended.
CREATE OR REPLACE FUNCTION standpipe.placed(seq text, at_ms bigint) RETURNS text LANGUAGE plpgsql STABLE AS $$
DECLARE
    in_force bigint;
BEGIN
    SELECT max(e.epoch) INTO in_force FROM standpipe.epochs e WHERE e.epoch <= at_ms;
    RETURN seq || coalesce('@' || in_force, '');
END $$;

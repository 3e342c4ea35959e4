-- Which of two events about one record is newer: (rev, seq, ms, sq) of the one at hand against what the row or
-- the tombstone was written with. Both have a revision: revisions decide (a TID's string order is its time order).
-- Else, or where revisions are equal, both have the relay's sequence number: that decides. Else the id of the stream
-- entry, its sequence part included: hundreds of entries share a millisecond.
-- Equal in all that both have is the same event again, and changes nothing; but of several entries of one event the
-- first counts, so that a time that is taken from the entry's id is the same in whatever order they come.
-- A row that the old workers wrote has no revision and no number and loses to anything.
CREATE OR REPLACE FUNCTION standpipe.newer(
    rev text, seq text, ms bigint, sq bigint,
    than_rev text, than_seq text, than_ms bigint, than_sq bigint
) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN rev <> than_rev THEN rev COLLATE "C" > than_rev COLLATE "C"
        WHEN seq ~ '^[0-9]{1,18}$' AND than_seq ~ '^[0-9]{1,18}$' AND seq <> than_seq
            THEN seq::bigint > than_seq::bigint
        WHEN rev = than_rev OR seq = than_seq THEN coalesce((ms, sq) < (than_ms, than_sq), false)
        WHEN than_ms IS NULL THEN true
        ELSE (ms, sq) > (than_ms, coalesce(than_sq, 0))
    END
$$;

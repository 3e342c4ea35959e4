-- Which of two events about one record is newer: (rev, seq, ms, sq) of the one at hand against what the row or
-- the tombstone was written with. Both have a revision: revisions decide (a TID's string order is its time order).
-- Else both have the relay's sequence number: that decides. Else the id of the stream entry, its sequence part
-- included: hundreds of entries share a millisecond.
-- A row that the old workers wrote has neither and loses to anything. Equal is not newer: a repeat changes nothing.
CREATE OR REPLACE FUNCTION standpipe.newer(
    rev text, seq text, ms bigint, sq bigint,
    than_rev text, than_seq text, than_ms bigint, than_sq bigint
) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN rev IS NOT NULL AND than_rev IS NOT NULL THEN rev COLLATE "C" > than_rev COLLATE "C"
        WHEN seq ~ '^[0-9]{1,18}$' AND than_seq ~ '^[0-9]{1,18}$' THEN seq::bigint > than_seq::bigint
        WHEN than_ms IS NULL THEN true
        ELSE (ms, sq) > (than_ms, coalesce(than_sq, 0))
    END
$$;

-- When a record was committed, from its row's version: the time inside the revision (a TID,
-- https://atproto.com/specs/tid: 13 characters of base32-sortable hold microseconds and 10 bits of clock id), else that
-- of the stream entry, else the caller's fallback.
CREATE OR REPLACE FUNCTION standpipe.committed_at(rev text, ms bigint, otherwise timestamp) RETURNS timestamp
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    bits bigint := 0;
BEGIN
    IF rev ~ '^[2-7a-j][2-7a-z]{12}$' THEN
        FOR i IN 1 .. 13 LOOP
            bits := (bits << 5) | (position(substr(rev, i, 1) IN '234567abcdefghijklmnopqrstuvwxyz') - 1);
        END LOOP;
        RETURN timestamp 'epoch' + ((bits >> 10) & ((1::bigint << 54) - 1)) * interval '1 microsecond';
    END IF;
    RETURN coalesce(timestamp 'epoch' + ms * interval '1 millisecond', otherwise);
END $$;

-- The date by which a row is sorted: the earliest of its own, of the time in its key, if that is a TID, and of when it was
-- committed.
CREATE OR REPLACE FUNCTION standpipe.sorted_at(
    uri text, created_at timestamp, rev text, ms bigint, otherwise timestamp
) RETURNS timestamp LANGUAGE sql IMMUTABLE AS $$
    SELECT least(created_at, standpipe.committed_at(rev, ms, otherwise),
                 standpipe.committed_at(split_part(uri, '/', 5), NULL, NULL))
$$;

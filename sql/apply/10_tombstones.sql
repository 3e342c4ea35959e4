-- Every delete leaves a tombstone, whether or not there was a row: a create that arrives late must find it.
CREATE OR REPLACE FUNCTION standpipe.put_tombstone(o standpipe.op) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO standpipe.tombstones AS t (uri, commit_rev, commit_seq, stream_ms, stream_seq)
    VALUES (o.uri, o.rev, o.seq, o.ms, o.sq)
    ON CONFLICT (uri) DO UPDATE SET
        commit_rev = excluded.commit_rev, commit_seq = excluded.commit_seq,
        stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq
    WHERE standpipe.newer(
        excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
        t.commit_rev, t.commit_seq, t.stream_ms, t.stream_seq);
END $$;

-- Whether the record or its account has a delete that is not older than this operation.
--
-- An operation that is older than tombstones that were deleted because of their age (standpipe.swept) may have a delete
-- that nobody remembers. If the record has a row, that row decides. If it has none, the operation is refused. The tombstone
-- is looked up first: it can be deleted at any time, and leaves its revision behind in the same moment. What the Python
-- reader appended has no revision of its own, only a place between others (see standpipe.newer).
CREATE OR REPLACE FUNCTION standpipe.is_dead(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    outlives boolean;
BEGIN
    SELECT standpipe.newer(o.rev, o.seq, o.ms, o.sq, t.commit_rev, t.commit_seq, t.stream_ms, t.stream_seq) INTO outlives
    FROM standpipe.tombstones t WHERE t.uri = o.uri;
    IF NOT outlives THEN
        RETURN true;
    END IF;
    PERFORM FROM standpipe.accounts a
    WHERE a.did = o.repo AND a.deleted_time IS NOT NULL
      AND standpipe.before_deletion(o.rev, o.seq, o.ms, a.deleted_seq, a.deleted_time);
    IF FOUND THEN
        RETURN true;
    END IF;
    PERFORM FROM standpipe.swept s WHERE s.did = o.repo AND s.rev > o.rev COLLATE "C" AND right(o.rev, 1) <> '.';
    IF FOUND THEN
        PERFORM FROM standpipe.record_rows(o.uri);
        IF NOT FOUND THEN
            RAISE EXCEPTION 'the record may have been deleted' USING ERRCODE = '22S01';
        END IF;
    END IF;
    RETURN false;
END $$;
